"""Solve-based editors, MEMIT's, AlphaEdit's, UltraEdit's and RLSEdit's, with QF's target in the place of their own.

Each writes into the MLPs' ends of the last blocks, each block its share of what is missing at the end, towards the
model's own state with the instruction in context, from which the completion is forced where the model misreads it. So
they need no subject and no gradients; their published forms optimise each fact's value by gradients first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from editors import UltraEdit, alphaedit, memit, rlsedit, solving_by

from qf_peft import QFTrainingArguments
from qf_peft.forward.blocks import block_ends
from qf_peft.solve.least_squares import LowRankDelta

from .bench import Bench
from .learners import QF, Rows

_MARGIN = 6.0  # nats by which a completion's token leads where it is forced; QFTrainingArguments' default
_UNBOUND = 1e9  # of a divergence: QF's own budget is not these methods'


class Editor(QF):
    """One of the solves.

    Settings:
        solve: "memit", "alphaedit", "ultraedit" or "rlsedit".
        depth: the share of the blocks, from the end, that is edited.
        strength: how much preserved keys weigh (λ over what is taught); not UltraEdit's.
        ridge: AlphaEdit's ε, relative to λ times the preserved moment's mean diagonal.
        rate: UltraEdit's η.
    """

    def __init__(
        self, bench: Bench, preserved: list[Any] | None = None, *, solve: str, depth: float, strength: float = 1.0,
        ridge: float = 1e-3, rate: float = 1e-3,
    ) -> None:  # fmt: skip
        self.depth, self.strength, self.ridge = depth, strength, ridge
        self.edited = max(1, round(depth * bench.depth))
        self.solve = self._solve(solve, rate)
        super().__init__(bench, preserved)
        self.setting = {"solve": solve, "depth": depth, "strength": strength, "ridge": ridge}
        if solve == "ultraedit":
            self.setting = {"solve": solve, "depth": depth, "rate": rate}

    def _solve(self, name: str, rate: float) -> Callable[..., LowRankDelta]:
        if name == "ultraedit":
            return UltraEdit(rate, self.edited)
        return {"memit": memit, "alphaedit": alphaedit, "rlsedit": rlsedit}[name]

    def where(self) -> dict[str, Any]:
        last = range(self.bench.depth - self.edited, self.bench.depth)
        return {"layers_to_transform": list(last), "target_modules": sorted(block_ends(self.model, attention=False))}

    def arguments(self) -> QFTrainingArguments:
        return QFTrainingArguments(
            target="context", margin=_MARGIN, significance="rows", remeasure=0, contrast_chats=0, sweeps=1,
            rehearse=0.0, standing=False, max_divergence=_UNBOUND, preserve_strength=self.strength, ridge=self.ridge,
            rank_tolerance=0.0, disable_tqdm=True, cache_dir=self.bench.cache, batch_tokens=self.bench.batch_tokens,
        )  # fmt: skip

    def learn(self, rows: Rows) -> None:
        with solving_by(self.solve):
            super().learn(rows)

    def forget(self, row: dict[str, Any]) -> None:
        with solving_by(self.solve):
            super().forget(row)
