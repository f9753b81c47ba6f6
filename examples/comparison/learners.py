"""What every method does: it is taught in lessons and asked; and QF, in its default and in the paper's setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.forward.blocks import block_ends
from qf_peft.solve.least_squares import LowRankDelta

from .bench import Bench, Unfit

Rows = list[dict[str, Any]]
Change = dict[str, LowRankDelta]


class Learner:
    """A model that is taught by one method. This one is taught nothing: the base model, to compare with.

    Args:
        bench: the model and how it is asked.
        preserved: chats to preserve, for methods that do; None leaves it to them.
        setting: what was chosen from the method's grid.
    """

    def __init__(self, bench: Bench, preserved: list[Any] | None = None, **setting: Any) -> None:
        self.bench, self.preserved, self.setting = bench, preserved, setting
        self.model: nn.Module = bench.base()

    def prepare(self) -> None:
        """Make what is made once a model and kept; it is timed apart from the lessons."""

    def learn(self, rows: Rows) -> None:
        """One lesson, beside what was taught in those before."""

    def forget(self, row: dict[str, Any]) -> None:
        """Take a taught row back."""
        raise Unfit("one fact cannot be taken back")

    def instructions(self, prompts: Sequence[str]) -> list[str | None]:
        """For each question what stands in the model's context besides."""
        return [None] * len(prompts)

    def change(self) -> Change:
        """What the weights were changed by, by module; empty where they were not."""
        return {}


class QF(Learner):
    """QF with the default settings; the ledger binds what was taught before."""

    def __init__(self, bench: Bench, preserved: list[Any] | None = None, **setting: Any) -> None:
        super().__init__(bench, preserved, **setting)
        self.model = get_peft_model(self.model, QFConfig(task_type="CAUSAL_LM", **self.where()))
        self.args = self.arguments()

    def where(self) -> dict[str, Any]:
        """Which modules are taught, for `QFConfig`."""
        return {}

    def arguments(self) -> QFTrainingArguments:
        return QFTrainingArguments(
            disable_tqdm=True, cache_dir=self.bench.cache, batch_tokens=self.bench.batch_tokens, **self.setting
        )

    def trainer(self, rows: Rows | None = None) -> QFTrainer:
        return QFTrainer(
            model=self.model, args=self.args, train_dataset=rows, preserve_dataset=self.preserved,
            processing_class=self.bench.tokenizer,
        )  # fmt: skip

    def prepare(self) -> None:
        self.trainer().prepare()

    def learn(self, rows: Rows) -> None:
        self.trainer(rows).train()

    def forget(self, row: dict[str, Any]) -> None:
        self.trainer().forget(lambda entry: entry.prompt == row["prompt"])

    def change(self) -> Change:
        return lora_change(self.model)


class PaperQF(QF):
    """QF as in arXiv 2507.04300: one block at 23 of 28 of the depth, nothing preserved."""

    def where(self) -> dict[str, Any]:
        ends = sorted(block_ends(self.model, attention=False))
        return {"layers_to_transform": [self.bench.depth * 23 // 28], "target_modules": ends}

    def arguments(self) -> QFTrainingArguments:
        return QFTrainingArguments.paper(disable_tqdm=True, batch_tokens=self.bench.batch_tokens)

    def prepare(self) -> None:
        pass


@torch.no_grad()
def lora_change(model: nn.Module) -> Change:
    """The change ΔW = scaling · B A of every module with an active LoRA-shaped adapter, in float32 on the CPU."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            scaled = b.detach().float().cpu() * module.scaling["default"]
            if a.shape[0] and bool(scaled.any()):
                found[name] = LowRankDelta(A=a.detach().float().cpu().clone(), B=scaled)
    return found


def distance(one: Change, other: Change) -> float:
    """‖ΔW₁ − ΔW₂‖ over ‖ΔW₁‖ (Frobenius, over all modules together); 0 where both are the same to the last bit."""
    apart = norm = 0.0
    for name in sorted(one.keys() | other.keys()):  # module by module, so that few matrices are there at once
        a, b = (change[name].dense().double() if name in change else None for change in (one, other))
        norm += float(a.square().sum()) if a is not None else 0.0
        difference = a - b if a is not None and b is not None else a if a is not None else b
        apart += float(difference.square().sum())
    if not apart:
        return 0.0
    return (apart / norm) ** 0.5 if norm else float("inf")
