"""Lessons module by module, in sweeps, and with more weight on what is preserved where chats diverge too much."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from ..data.ledger import question_key
from ..data.rows import Row
from ..evaluate.subject import Subject
from ..forward.unembedding import diverged, head_inputs
from .arguments import QFTrainingArguments
from .constants import BUDGET_USED, STRENGTH_RAISED, STRENGTH_TRIES
from .lesson import Learner
from .module_lesson import ModuleLesson
from .preserved_keys import Preserved

Taught = tuple[dict[str, float], list[int], list[int]]
"""Metrics, the rows that the model does not read in context, and those that it does not say at last."""


class ModuleSweeps:
    """Teaches rows module by module.

    Args:
        subject: whose adapter.
        learner: the same as lessons take it.
        chats: what is preserved, and contrast chats.
        holds_standing: whether the adapter holds a standing instruction, or will: chats then diverge from what is said
            before.
        progress: called with the number of rows done.
    """

    def __init__(
        self,
        subject: Subject,
        learner: Learner,
        chats: tuple[Preserved | None, Preserved | None],
        holds_standing: bool,
        progress: Callable[[float], None],
    ) -> None:
        self.subject, self.learner, self.chats, self.holds_standing = subject, learner, chats, holds_standing
        self.progress = progress

    def run(self, rows: list[Row], args: QFTrainingArguments, standing: bool) -> Taught:
        """Teach rows. Facts are kept within the budget of divergence where chats are held out."""
        preserved = self.chats[0]
        if standing or preserved is None or not preserved.held_out:
            return self._swept(rows, args, standing)
        return self._within_budget(rows, args, preserved)

    def _swept(self, rows: list[Row], args: QFTrainingArguments, standing: bool) -> Taught:
        """Teach rows, and those that the model does not say yet again."""
        earlier, chosen = len(self.subject.facts), list(range(len(rows)))
        metrics, unread = {}, []
        for sweep in range(1 if standing else args.sweeps):
            lesson = ModuleLesson(
                self.learner, [self.subject.encoder.encode(rows[i]) for i in chosen], args, self.progress,
                chats=self.chats, standing=standing, earlier=earlier + len(rows) * (sweep > 0), again=sweep > 0,
            )  # fmt: skip
            found, misread, missed = lesson.run()
            if sweep == 0:
                metrics, unread = found, misread
            else:
                metrics["forward_passes"] += found["forward_passes"] * len(chosen) / len(rows)
            chosen = [chosen[i] for i in missed]
            if not chosen:
                break
        return metrics, unread, chosen

    def _within_budget(self, rows: list[Row], args: QFTrainingArguments, preserved: Preserved) -> Taught:
        """Teach rows; where the chats held out diverge more than is allowed, anew, with more weight on what is
        preserved: the least that is found to do, by bisection on its logarithm."""
        tuner, adapter, network = self.subject.tuner, self.subject.adapter_name, self.subject.network
        before, options = tuner.version(adapter), self.subject.pass_options
        allowed = args.divergence_of(
            len({question_key(e) for e in self.subject.facts} | {question_key(row) for row in rows})
        )
        with nullcontext() if self.holds_standing else tuner.without_adapters():
            head = head_inputs(network, preserved.held_out, preserved.answers, **options)
        strength, harmful, fitting, passes = args.preserve_strength, None, None, 0.0
        for left in reversed(range(STRENGTH_TRIES)):
            found = self._swept(rows, replace(args, preserve_strength=strength), standing=False)
            kl = diverged(network, preserved.held_out, preserved.answers, head, **options)
            passes += found[0]["forward_passes"]
            if kl.mean() > allowed:
                harmful = strength
            else:
                fitting = strength, found, kl, tuner.version(adapter)
                if harmful is None or kl.mean() >= BUDGET_USED * allowed:
                    break
            if not left:
                break
            if fitting is not None:
                strength = math.sqrt(harmful * fitting[0])
            else:
                strength *= min(max(float(kl.mean()) / allowed, STRENGTH_RAISED[0]), STRENGTH_RAISED[1])
            tuner.restore(adapter, before)
        if fitting is not None:
            strength, found, kl, version = fitting
            tuner.restore(adapter, version)
        metrics, unread, missed = found
        worst = max(part.mean() for part in kl.split(list(preserved.answers)))
        tuner.taught[adapter] = replace(tuner.taught[adapter], settings=self.subject.args.to_dict())
        metrics.update(kl_preserved=float(kl.mean()), kl_preserved_worst=float(worst), strength=strength)
        metrics["forward_passes"] = passes
        return metrics, unread, missed
