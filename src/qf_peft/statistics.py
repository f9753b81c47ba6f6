"""What an adapter must remember of the tokens it was taught, so that it can be taught more and solved again."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .solve import LowRankDelta


@dataclass(frozen=True)
class TaughtTokens:
    """The rows of one module's least squares, one a taught position."""

    keys: Tensor
    """(n, d_in) float32: the module's inputs in the bare pass."""
    residual: Tensor
    """(n, d_out) float32: what the module's outputs should change by, measured from the base weights."""
    significance: Tensor
    """(n) float32: how much each row counts."""

    def __add__(self, other: TaughtTokens) -> TaughtTokens:
        return TaughtTokens(
            torch.cat([self.keys, other.keys]),
            torch.cat([self.residual, other.residual]),
            torch.cat([self.significance, other.significance]),
        )


@dataclass(frozen=True)
class TaughtAdapter:
    """One adapter's statistics: never changed in place, so that a failure midway loses nothing."""

    tokens: dict[str, TaughtTokens] = field(default_factory=dict)
    """By module name."""
    offset: dict[str, LowRankDelta] = field(default_factory=dict)
    """By module name: change that came from elsewhere (a loaded file, say) and is kept as it is."""
    installed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By module name: the factors A and B that the solve put into the adapter, to notice a change by others."""
    facts: int = 0
    """How many rows were taught."""
    standing: dict[str, Tensor] = field(default_factory=dict)
    """By module name: the keys (m, d_in) float32 of the chats that were taught with standing instructions, whose change
    is in `offset`. What is taught later preserves these instead of the chats as they were before."""
