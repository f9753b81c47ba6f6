"""What an adapter must remember of the tokens it was taught, so that it can be taught more and solved again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.ledger import Entry
from ..solve.least_squares import LowRankDelta, TaughtTokens
from ..solve.second_moment import SecondMoment


@dataclass(frozen=True)
class TaughtAdapter:
    """One adapter's statistics: never changed in place, so that a failure midway loses nothing."""

    tokens: dict[str, TaughtTokens] = field(default_factory=dict)
    """By module name, where nothing is preserved: all that was taught, to be solved anew with every lesson."""
    offset: dict[str, LowRankDelta] = field(default_factory=dict)
    """By module name, beside `tokens`: change that came from elsewhere (a loaded file, say) and is kept as it is."""
    bound: dict[str, SecondMoment] = field(default_factory=dict)
    """By module name: what binds later lessons, P = λ C + Yᵀ S Y + ε I over all that was preserved and taught. A new
    lesson's change is solved beside it (recursive least squares), so that no token needs to be remembered."""
    delta: dict[str, LowRankDelta] = field(default_factory=dict)
    """By module name, beside `bound`: the change in float32, before it was rounded to the adapter's dtype."""
    installed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By module name: the factors A and B that the solve put into the adapter, to notice a change by others."""
    entries: tuple[Entry, ...] = ()
    """What was taught, in order."""
    rehearsed: int = 0
    """How many entries there were when all were last seen to."""
    holds_standing: bool = False
    """Whether a standing instruction was taught: preserved chats then stay as they are, not as the base model's."""
    divergence: float | None = None
    """Mean KL in nats from the base model's predictions at the held-out preserved chats after the last lesson, where it
    was measured."""
    foundation: dict[str, LowRankDelta] = field(default_factory=dict)
    """By module name: the change that the adapter held before the first entry (a loaded file's, say), if any."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The last lesson's settings, as `QFTrainingArguments.to_dict` gives them."""

    @property
    def facts(self) -> int:
        """How many rows were taught."""
        return len(self.entries)

    def map(self, move: Callable[[Tensor], Tensor]) -> TaughtAdapter:
        """The same with every tensor moved."""

        def delta(given: LowRankDelta) -> LowRankDelta:
            return LowRankDelta(move(given.A), move(given.B))

        return replace(
            self,
            tokens={
                name: TaughtTokens(move(t.keys), move(t.residual), move(t.significance))
                for name, t in self.tokens.items()
            },
            bound={name: bound.map(move) for name, bound in self.bound.items()},
            installed={name: (move(a), move(b)) for name, (a, b) in self.installed.items()},
            **{
                part: {name: delta(given) for name, given in getattr(self, part).items()}
                for part in ("offset", "delta", "foundation")
            },
        )

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    def on_host(self) -> TaughtAdapter:
        """The same in the host's memory: between lessons nothing of it lies on an accelerator."""
        return self.map(lambda tensor: tensor.cpu())

    def settled(self, installed: dict[str, tuple[Tensor, Tensor]], deltas: dict[str, LowRankDelta]) -> TaughtAdapter:
        """The same after others changed the adapter's weights: these, as factors and as changes by module, are what it
        begins with from now on, and what was taught can no longer be undone."""
        return TaughtAdapter(
            foundation={name: delta for name, delta in deltas.items() if delta.A.any() and delta.B.any()},
            bound=dict(self.bound), installed=installed, holds_standing=self.holds_standing, rehearsed=self.rehearsed,
            entries=tuple(replace(entry, settled=True) for entry in self.entries), settings=self.settings,
        )  # fmt: skip

    def holds(self, name: str, present: tuple[Tensor, Tensor]) -> bool:
        """Whether a module's present factors A (r, d_in) and B (d_out, r) are those that the solve put there, but for
        directions behind them along the rank that change nothing."""
        ours = self.installed.get(name)
        if ours is None:
            return False
        (a, b), rank = present, ours[0].shape[0]
        same = a[:rank], b[:, :rank]
        equal = all(x.shape == y.shape and torch.equal(x, y.to(x)) for x, y in zip(same, ours, strict=True))
        return equal and not bool(b[:, rank:].any())
