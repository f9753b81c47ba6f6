"""A joint lesson's least squares, fitted to what its solution does in the model, and kept within what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward.capture import Point
from ..forward.unembedding import Unembedding
from ..forward.walk import Walk
from . import constants as tuned
from .held_out import HeldOutChats, Strays
from .targets import leads, pushed


@dataclass(frozen=True)
class Steps:
    """The steps at which something is said: n positions, the rows' own first."""

    gold: Tensor
    """(n): the completions' tokens."""
    taught: Tensor
    """(n): whether a position is taught."""
    own: slice
    """The positions of the rows' own prompts; behind them are those of other wordings."""
    lead: Tensor
    """(n): by how many nats the gold token led before."""
    needed: Tensor
    """(n): by how many it shall lead at least."""


@dataclass
class JointFit:
    """What is asked of a lesson's least squares, and what has come of it."""

    walk: Walk
    """The bare sequences, halted before the first taught block."""
    end: Point
    """Where the stream ends."""
    unembedding: Unembedding
    steps: Steps
    write: Callable[[Tensor], object]
    """Solves for a change of the stream at the taught steps, and puts the solution into the adapter."""
    margin: Tensor
    """(n): by how many nats the gold tokens shall lead: what is needed, and more where answers shall begin so."""
    passed: float = 1.0
    """How much of a write reaches the end, in nats."""
    reach: float = tuned.LOUDEST
    """Times the size of what was asked for first, that may be asked for at most."""
    first: Tensor | None = None
    """(n): the sizes of what was asked for first, the small ones raised to their median."""

    @property
    def moving(self) -> Tensor:
        """(n): the taught positions where something is missing."""
        return self.steps.taught & (self.steps.lead < self.margin - 1e-3)

    def lowered(self, wanted: Tensor, margin: Tensor) -> Tensor:
        """Lower the margin: what is left of a wanted change of the stream (n, d)."""
        lead = self.steps.lead
        part = (margin - lead) / (self.margin - lead).clamp(min=1e-3)
        self.margin = margin
        return wanted * part.clamp(0, 1)[:, None]

    def held(self, wanted: Tensor) -> Tensor:
        """A change of the stream (n, d), drawn in where it is beyond reach: what others outweigh, time and again, would
        be asked for ever more loudly."""
        size = torch.linalg.vector_norm(wanted, dim=1)
        if self.first is None:
            moving = size[self.moving]
            self.first = size.clamp(min=float(moving.median()) if len(moving) else 0.0)
        return wanted * (self.reach * self.first / size.clamp(min=1e-9)).clamp(max=1)[:, None]

    def fitted(self, wanted: Tensor, passes: int, again: bool = False) -> Tensor:
        """Solve for a change of the stream, look at what it does in the model, and correct it by what is missing, as
        far as the reach allows: the change that is installed at last."""
        steps, wanted = self.steps, self.held(wanted)
        for step in range(passes):
            self.write(wanted[steps.taught])
            if step == passes - 1:
                break
            after = self._end()
            aimed, now = pushed(self.unembedding, after, steps.gold, self.margin)
            late = again or step >= tuned.PASSES_EVERYWHERE  # from here on only for what is not said yet
            if late and self._all_said(now):
                break
            if not again and step == 0 and bool(self.moving.any()):
                part = ((now - steps.lead) / (self.margin - steps.lead))[self.moving].median()
                self.passed = float(part.clamp(tuned.LEAST_PASSED, 1.0))
            more = (aimed - after) / self.passed
            if late:
                more = more * (now < tuned.LEAD).to(more)[:, None]
            wanted = self.held(wanted + more)
        return wanted

    def _all_said(self, now: Tensor) -> bool:
        """Whether by leads of the gold tokens (n) the rows themselves are said."""
        return bool((now > tuned.LEAD / 2)[self.steps.own][self.steps.taught[self.steps.own]].all())

    def without_strays(self, strays: Strays, wanted: Tensor) -> tuple[Tensor, float]:
        """Fit, and lower the surplus until few contrasting rows that are held out are given taught answers: the change
        of the stream (n, d) that is solved for, and the share of those rows that still are."""
        wanted = self.fitted(wanted, tuned.PASSES)
        share = strays.share()
        shrinks = 0
        while share > tuned.STRAYS and shrinks < tuned.SURPLUS_SHRINKS:
            wanted = self.lowered(wanted, tuned.LEAD + (self.margin - tuned.LEAD) * tuned.SURPLUS_SHRUNK)
            wanted = self.fitted(wanted, tuned.PASSES_BETWEEN, again=True)
            share, shrinks = strays.share(), shrinks + 1
        if shrinks:
            wanted = self.fitted(wanted, tuned.PASSES_AGAIN, again=True)
            share = strays.share()
        return wanted, share

    def within_budget(self, chats: HeldOutChats, wanted: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
        """Fit the reach to a divergence of the held-out chats of no more than `allowed` nats: the change of the stream
        (n, d) that is solved for at last, and the divergence (positions) of what is installed then.

        While something is not said and the budget allows it, the reach is lengthened. Where chats diverge by more, it
        is shortened, and the write with it, by the slope of the divergence's logarithm over the reach's, without new
        passes of the rows: what is asked for most loudly feels it first.
        """
        kl, slope = chats.divergence(), 2.0
        for _ in range(tuned.RAISED_AT_MOST):
            if float(kl.mean()) > tuned.BUDGET_FILLED * allowed or self._all_said(self._leads()):
                break
            self.reach *= tuned.LOUDER
            wanted = self.fitted(wanted, tuned.PASSES_AGAIN, again=True)
            kl = chats.divergence()
        for _ in range(tuned.QUIETENINGS):
            before, mean = self.reach, float(kl.mean())
            if mean <= allowed:
                break
            self.reach *= max((tuned.BUDGET_AIMED * allowed / mean) ** (1 / slope), tuned.QUIETER)
            wanted = self.held(wanted)
            self.write(wanted[self.steps.taught])
            kl = chats.divergence()
            shorter = math.log(before / self.reach)
            slope = min(max(math.log(mean / max(float(kl.mean()), 1e-9)) / shorter, 1.0), 4.0)
        return wanted, kl

    def _leads(self) -> Tensor:
        """By how many nats the gold tokens (n) lead with what is installed."""
        return leads(self.unembedding, self._end(), self.steps.gold)

    def _end(self) -> Tensor:
        """The stream (n, d) at its end, with what is installed."""
        return self.walk.look(len(self.walk.blocks) - 1, {"stream": self.end})["stream"]
