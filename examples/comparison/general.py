"""What a model can do besides: perplexity of text, and tasks of the LM Evaluation Harness where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qf_peft.evaluate.metrics import Evaluator

from .bench import Bench, Unfit


def perplexity(bench: Bench, model: nn.Module, texts: Sequence[str]) -> float:
    """exp of the mean negative log likelihood of the texts' tokens."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Evaluator(network, bench.encoder, batch_tokens=bench.batch_tokens).perplexity(texts)


def harness(
    bench: Bench, model: nn.Module, tasks: Sequence[str], limit: int | None = None, folder: Path | None = None
) -> dict[str, float]:
    """Scores of tasks of the LM Evaluation Harness (the library lm_eval), by "task metric", such as
    "mmlu acc" or "gsm8k exact_match,strict-match".

    Args:
        bench: the model's tokenizer and batches.
        model: the one to score.
        tasks: their names.
        limit: questions of each task at most.
        folder: tasks of the user's own, as YAML files.

    Raises:
        Unfit: lm_eval is not installed, or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Unfit(f'{", ".join(tasks)} need the library lm_eval: pip install ".[harness]"') from error
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise Unfit(f"lm_eval knows no tasks {unknown}; `lm_eval ls tasks` lists them")
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped = HFLM(pretrained=network, tokenizer=bench.tokenizer, batch_size=8)
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, apply_chat_template=bench.encoder.chat,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in metric
    }


def harness_or_reason(*given: Any, **options: Any) -> dict[str, Any]:
    """The scores, or why there are none."""
    try:
        return harness(*given, **options)
    except Unfit as error:
        return {"skipped": str(error)}
