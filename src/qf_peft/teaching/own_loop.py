"""Teaching without a trainer, for those who bring their own loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel

from .arguments import QFTrainingArguments
from .preserved_statistics import PreservedStatistics
from .trainer import QFTrainer


def teach(
    model: PeftModel,
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    preserve_dataset: Iterable[Any] | PreservedStatistics | None = None,
    **settings: Any,
) -> dict[str, float]:
    """
    Fill a model's active QF adapter with what rows say, in place, before a training loop of one's own goes on from it
    (as `peft.initialize_lora_eva_weights` does with what EVA computes). An optimizer is made after it: the factors may
    be other tensors then, of another rank.

    Args:
        model: a model with one active QF adapter, from `get_peft_model(model, QFConfig(...))`.
        dataset: rows, see [`QFTrainer`].
        tokenizer: the model's.
        preserve_dataset: what the model must go on saying, see [`QFTrainer`].
        settings: those of [`QFTrainingArguments`], by name.

    Returns:
        What [`QFTrainer.train`] returns.

    Raises:
        ValueError: the model, a row or a setting is unfit; the message says what to change.
        TypeError: there is no such setting.

    Example:
        ```python
        model = get_peft_model(base_model, QFConfig(r=16, task_type="CAUSAL_LM"))
        teach(model, facts, tokenizer)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ```
    """
    args = QFTrainingArguments(**settings)
    return QFTrainer(model, args, dataset, preserve_dataset, tokenizer).train()
