"""A joint lesson's least squares, fitted to what its solution does in the model, and kept within what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    margins: Tensor
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
    write: Callable[[Tensor, float], object]
    """Solves for a change of the stream at the taught steps, by a ridge, and puts the solution into the adapter."""
    margin: Tensor
    """(n): by how many nats the gold tokens shall lead: what is needed, and more where answers shall begin so."""
    stream: Tensor
    """(n, d): where the stream ended before."""
    passed: float = 1.0
    """How much of a write reaches the end, in nats."""

    @property
    def moving(self) -> Tensor:
        """(n): the taught positions where something is missing."""
        return self.steps.taught & (self.steps.margins < self.margin - 1e-3)

    @property
    def wanted(self) -> Tensor:
        """(n, d): the change of the stream by which the gold tokens lead so."""
        return pushed(self.unembedding, self.stream, self.steps.gold, self.margin)[0] - self.stream

    def lowered(self, wanted: Tensor, margin: Tensor) -> Tensor:
        """Lower the margin: what is left of a wanted change of the stream (n, d)."""
        margins = self.steps.margins
        part = (margin - margins) / (self.margin - margins).clamp(min=1e-3)
        self.margin = margin
        return wanted * part.clamp(0, 1)[:, None]

    def fitted(self, wanted: Tensor, ridge: float, passes: int, again: bool = False) -> Tensor:
        """Solve for a change of the stream, look at what it does in the model, and correct it by what is missing:
        the change that is installed at last."""
        steps, last = self.steps, len(self.walk.blocks) - 1
        for step in range(passes):
            self.write(wanted[steps.taught], ridge)
            if step == passes - 1:
                break
            after = self.walk.look(last, {"stream": self.end})["stream"]
            aimed, now = pushed(self.unembedding, after, steps.gold, self.margin)
            late = again or step >= tuned.PASSES_EVERYWHERE  # from here on only for what is not said yet
            if late and bool((now > tuned.LEAD / 2)[steps.own][steps.taught[steps.own]].all()):
                break
            if not again and step == 0 and bool(self.moving.any()):
                part = ((now - steps.margins) / (self.margin - steps.margins))[self.moving].median()
                self.passed = float(part.clamp(tuned.LEAST_PASSED, 1.0))
            more = (aimed - after) / self.passed
            if late:
                more = more * (now < tuned.LEAD).to(more)[:, None]
            wanted = wanted + more
        return wanted

    def without_strays(self, strays: Strays, allowed: float) -> tuple[Tensor, float]:
        """Fit, and lower the surplus until no more than `allowed` of the contrasting rows that are held out are given
        taught answers: the change of the stream (n, d) that is solved for, and the share of those rows that are."""
        wanted = self.fitted(self.wanted, tuned.RIDGE, tuned.PASSES)
        share = strays.share()
        shrinks = 0
        while share > allowed and shrinks < tuned.SURPLUS_SHRINKS:
            wanted = self.lowered(wanted, tuned.LEAD + (self.margin - tuned.LEAD) * tuned.SURPLUS_SHRUNK)
            wanted = self.fitted(wanted, tuned.RIDGE, tuned.PASSES_BETWEEN, again=True)
            share, shrinks = strays.share(), shrinks + 1
        if shrinks:
            wanted = self.fitted(wanted, tuned.RIDGE, tuned.PASSES_AGAIN, again=True)
            share = strays.share()
        return wanted, share

    def within_budget(self, chats: HeldOutChats, wanted: Tensor, allowed: float) -> tuple[Tensor, float, Tensor]:
        """Raise the ridge until the held-out chats diverge by no more than `allowed` nats, or lower it while they
        diverge less and more is said by that: the change of the stream (n, d) that is solved for at last, the
        ridge, and the divergence (positions) of what is installed then.

        Where they diverge far beyond it the surplus is bounded first, and fitted from the beginning. Each higher ridge
        is fitted from the same start. So many corrections take a share of the change that falls with the ridge in every
        direction (iterated Tikhonov regularisation), and least where the keys tell little apart. Lower ones are fitted
        from the beginning: what made up for the ridge before would be too much.
        """
        ridge, kl = tuned.RIDGE, chats.divergence()
        if kl.mean() > tuned.SURPLUS_BEYOND * allowed:
            self.margin = self.margin.clamp(max=tuned.LEAD + tuned.SURPLUS_MOST)
            wanted = self.fitted(self.wanted, ridge, tuned.PASSES)
            kl = chats.divergence()
        start, below = wanted, ridge
        for _ in range(tuned.RIDGE_TRIES):
            if kl.mean() <= allowed:
                break
            below = ridge
            ridge *= min(max(float(kl.mean()) / allowed, tuned.RIDGE_RAISED[0]), tuned.RIDGE_RAISED[1])
            wanted, kl = self.fitted(start, ridge, tuned.PASSES_AGAIN, again=True), chats.divergence()
        if ridge > tuned.RIDGE:
            return self._between(chats, start, (below, ridge), wanted, kl, allowed)
        missing = self.missing()
        for _ in range(tuned.RIDGE_TRIES):
            if not missing:
                break
            lower = ridge * tuned.RIDGE_LOWERED
            other = self.fitted(self.wanted, lower, tuned.PASSES, again=True)
            left, moved = self.missing(), chats.divergence()
            if left >= missing or moved.mean() > allowed:
                self.write(wanted[self.steps.taught], ridge)
                break
            wanted, ridge, kl, missing = other, lower, moved, left
        return wanted, ridge, kl

    def _between(
        self,
        chats: HeldOutChats,
        start: Tensor,
        ridges: tuple[float, float],
        wanted: Tensor,
        kl: Tensor,
        allowed: float,
    ) -> tuple[Tensor, float, Tensor]:
        """The same between a ridge that is too low and one that leaves room, where something is not said: a ridge
        raised by the divergence is raised too far where that falls faster than the ridge rises. Then what is missing is
        corrected further while there is room."""
        below, ridge = ridges
        missing = self.missing() if kl.mean() <= tuned.RIDGE_ROOM * allowed else 0
        if missing:
            between = math.sqrt(below * ridge)
            other, moved = self.fitted(start, between, tuned.PASSES_AGAIN, again=True), chats.divergence()
            if moved.mean() <= allowed:
                wanted, ridge, kl, missing = other, between, moved, self.missing()
            else:
                self.write(wanted[self.steps.taught], ridge)
        for _ in range(tuned.CORRECTED_FURTHER):
            if not missing or kl.mean() > tuned.RIDGE_ROOM * allowed:
                break
            other, moved = self.fitted(wanted, ridge, tuned.PASSES_AGAIN, again=True), chats.divergence()
            left = self.missing()
            if moved.mean() > allowed or left >= missing:
                self.write(wanted[self.steps.taught], ridge)
                break
            wanted, kl, missing = other, moved, left
        return wanted, ridge, kl

    def missing(self) -> int:
        """How many tokens of the rows' own answers are not the likeliest now."""
        own, taught = self.steps.own, self.steps.taught
        stream = self.walk.look(len(self.walk.blocks) - 1, {"stream": self.end})["stream"]
        margins = leads(self.unembedding, stream[own], self.steps.gold[own])
        return int((margins < 0)[taught[own]].sum())
