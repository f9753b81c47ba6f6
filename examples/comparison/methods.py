"""The methods by name, and the settings of each that are tried on other facts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .context import InContext, Retrieval
from .editing import Editor
from .finetuning import LocFT, LoRA, PromptBaking
from .learners import QF, Learner, PaperQF

Settings = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    title: str
    make: type[Learner]
    grid: Callable[[bool, int], Settings] = lambda tiny, facts: [{}]
    """The settings tried for so many facts; for the tiny model, whose weights are few and take larger steps, others."""
    weights: bool = True
    """Whether facts go into the weights (and not into the prompt)."""


def over(**choices: Any) -> Settings:
    """Every combination of the values given in lists; other values stand in all."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in choices.items()}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _lora(target: str, **more: Any) -> Callable[[bool, int], Settings]:
    def grid(tiny: bool, facts: int) -> Settings:
        rates, epochs = ([3e-3, 1e-2], [30, 60]) if tiny else ([2e-4, 5e-4, 1e-3], [10, 30])
        return over(target=target, rate=rates, epochs=epochs, **more)

    return grid


def _editor(solve: str, **choices: Any) -> Callable[[bool, int], Settings]:
    def grid(tiny: bool, facts: int) -> Settings:
        # Early blocks of the tiny model can be written into, late ones of pretrained models only: their streams grow.
        return over(solve=solve, depth=[1.0] if tiny else [0.15, 0.3], **choices)

    return grid


def _locft(tiny: bool, facts: int) -> Settings:
    return over(rate=[2e-3, 8e-3] if tiny else [5e-4, 2e-3], depth=[0.2, 0.7], batch=[10, 100] if facts > 10 else 10)


METHODS: dict[str, Method] = {
    "base": Method("nothing taught", Learner),
    "qf": Method("QF", QF),
    "qf-paper": Method("QF, `paper()`", PaperQF),
    "in-context": Method("in context", InContext, lambda tiny, facts: over(brief=[False, True]), weights=False),
    "retrieval": Method(
        "retrieval (BM25)", Retrieval, lambda tiny, facts: over(top=[1, 3, 5], brief=[False, True]), weights=False
    ),
    "lora": Method("LoRA, all-linear", LoRA, _lora("all-linear")),
    "lora-down": Method("LoRA, down_proj", LoRA, _lora("mlp")),
    "locft-bf": Method("LocFT-BF", LocFT, _locft),
    "baking": Method("prompt baking", PromptBaking, _lora("all-linear", own=[True, False])),
    "memit": Method("MEMIT's solve", Editor, _editor("memit", strength=[0.3, 3.0, 30.0])),
    "alphaedit": Method("AlphaEdit's solve", Editor, _editor("alphaedit", ridge=[1e-3, 1e-1, 10.0])),
    "ultraedit": Method("UltraEdit's solve", Editor, _editor("ultraedit", rate=[1e-4, 1e-3, 1e-2])),
    "rlsedit": Method("RLSEdit's solve", Editor, _editor("rlsedit", strength=[0.3, 3.0, 30.0])),
}
