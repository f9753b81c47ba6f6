"""The comparison itself: settings are chosen on other facts, then every method is taught and asked, job by job."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .bench import Bench, Cost, Unfit
from .forced import teacher_forced
from .general import harness_or_reason, perplexity
from .learners import Learner, Rows
from .methods import METHODS
from .scoring import Answers, Scorer, overall
from .stability import deletion, orders
from .store import Store
from .tasks import Data, Task
from .worlds import general

_TUNED_ON = 40  # questions of a kind by which a setting is chosen
_TUNED_BY = ("reliability", "generalisation")
_FIXED = 20  # facts whose lesson takes as long as the questions asked besides, for the estimate of the time left


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    kind: str
    """"lesson", "orders" or "deletion"."""
    method: str
    facts: int
    seed: int
    step: int
    """Facts taught at a time; 0: all at once."""


@dataclass
class Plan:
    """What is to be measured."""

    facts: list[int]
    seeds: list[int] = field(default_factory=lambda: [0])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    steps: list[int] = field(default_factory=lambda: [0])
    orders: bool = False
    deletion: bool = False
    limit: int | None = None
    """Questions of each kind at most."""
    tune_up_to: int = 100
    """Settings of larger lessons are those chosen at so many facts."""
    texts: list[str] = field(default_factory=list)
    """For perplexity."""
    harness: list[str] = field(default_factory=list)
    """Tasks of the LM Evaluation Harness."""
    harness_limit: int | None = None
    harness_folder: Path | None = None

    def jobs(self) -> list[Job]:
        """All of them, small ones first."""
        kinds = ["lesson", *(["orders"] if self.orders else []), *(["deletion"] if self.deletion else [])]
        return [
            Job(kind, method, facts, seed, step)
            for facts in sorted(set(self.facts))
            for step in dict.fromkeys(step if step < facts else 0 for step in self.steps)
            for seed in dict.fromkeys(self.seeds)
            for method in dict.fromkeys(self.methods)
            for kind in kinds
            if kind == "lesson" or (method != "base" and facts > 1)
        ]


def chunks(rows: Rows, step: int) -> list[Rows]:
    """The rows in lessons of so many; 0: one lesson."""
    size = step or len(rows)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


class Comparison:
    """Measures what a plan asks for and a store does not hold yet.

    Args:
        bench, data, plan, store: the model, where facts come from, what to measure, where it is kept.
        show_progress: whether a bar is shown, with an estimate of the time left, or lines in a file.
    """

    def __init__(self, bench: Bench, data: Data, plan: Plan, store: Store, show_progress: bool = True) -> None:
        self.bench, self.data, self.plan, self.store = bench, data, plan, store
        watched = sys.stderr.isatty()
        self.lines = show_progress and not watched
        self.bar = tqdm(
            disable=not (show_progress and watched), bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
        )

    def run(self) -> None:
        """Measure, and write after every job. What could not be done is tried again: a library may be there now."""
        self.store.drop_skipped()
        done = {tuple(run["job"].values()) for run in self.store.runs}
        left = [job for job in self.plan.jobs() if tuple(asdict(job).values()) not in done]
        tuned = {(job.method, self._tuned_at(job.facts)) for job in left}
        trials = sum((facts + _FIXED) * len(self._untried(method, facts)) for method, facts in tuned)
        self.bar.total = trials + sum(job.facts + _FIXED for job in left)
        for job in left:
            try:
                setting = self.chosen(job.method, job.facts)
                self._say(f"{job.facts} facts, seed {job.seed}: {METHODS[job.method].title}, {job.kind}")
                found = {"setting": setting, **getattr(self, job.kind)(job, setting)}
            except Unfit as error:
                found = {"skipped": str(error)}
            self.store.runs.append({"job": asdict(job), **found})
            self.store.save()
            self.bar.update(job.facts + _FIXED)
        self.bar.close()

    def lesson(self, job: Job, setting: dict[str, Any]) -> dict[str, Any]:
        """Teach, ask, and score: answers, teacher-forced scores, general ability, and what it took."""
        task = self.data.task(job.facts, job.seed)
        scorer = self._scorer(task, self.plan.limit)  # first, so that the base model is gone before there is another
        before = self._perplexity_before() if self.plan.texts else None
        learner, cost = self._taught(task, job, setting)
        with Cost(self.bench.device) as asking:
            answers = scorer.answers(learner)
        self.store.write_answers(asdict(job), answers)
        found = {**cost, "ask_seconds": asking.seconds / len(answers), "scores": scorer.score(answers)}
        found["forced"] = teacher_forced(self.bench, learner, task, self.plan.limit)
        changed = METHODS[job.method].weights
        if self.plan.texts and changed:
            found["perplexity"] = perplexity(self.bench, learner.model, self.plan.texts) / before
        if self.plan.harness and changed:
            found["harness"] = harness_or_reason(
                self.bench, learner.model, self.plan.harness, self.plan.harness_limit, self.plan.harness_folder
            )
        return found

    def orders(self, job: Job, setting: dict[str, Any]) -> dict[str, Any]:
        """How far apart three orders of the same facts are."""
        task = self.data.task(job.facts, job.seed)
        return orders(task, lambda rows: self._taught(replace(task, rows=rows), job, setting)[0], self._said(task))

    def deletion(self, job: Job, setting: dict[str, Any]) -> dict[str, Any]:
        """How far what is left after a fact was taken back is from never having been taught it."""
        if METHODS[job.method].make.forget is Learner.forget:
            raise Unfit("one fact cannot be taken back")
        task = self.data.task(job.facts, job.seed)
        return deletion(task, lambda rows: self._taught(replace(task, rows=rows), job, setting)[0], self._said(task))

    def _said(self, task: Task) -> Any:
        """Gives a learner's answers to the taught questions and their other wordings."""
        asked = {name: task.asked[name] for name in _TUNED_BY if name in task.asked}
        bare = replace(task, asked=asked, locality=[], unknown=[])
        return Scorer(self.bench, bare, [], self.plan.limit, self._before).answers

    def _taught(self, task: Task, job: Job, setting: dict[str, Any]) -> tuple[Learner, dict[str, Any]]:
        """A learner that was taught a task's rows, and what that took."""
        learner = METHODS[job.method].make(self.bench, task.preserved, **setting)
        with Cost(self.bench.device) as once:
            learner.prepare()
        costs = []
        for rows in chunks(task.rows, job.step):
            with Cost(self.bench.device) as cost:
                learner.learn(rows)
            costs.append(cost)
        seconds = [cost.seconds for cost in costs]
        return learner, {
            "once": once.seconds, "seconds": sum(seconds), "last_seconds": seconds[-1],
            "memory_mb": max(cost.memory_mb for cost in costs),
        }  # fmt: skip

    def chosen(self, method: str, facts: int) -> dict[str, Any]:
        """The best of a method's settings on facts that are kept for choosing."""
        settings, size = self._grid(method, self._tuned_at(facts)), self._tuned_at(facts)
        if len(settings) == 1:
            return settings[0]
        for number, setting in enumerate(self._untried(method, size)):
            self._say(f"{size} other facts: {METHODS[method].title}, setting {number + 1}")
            self.store.development.append(self._trial(method, size, setting))
            self.store.save()
            self.bar.update(size + _FIXED)
        tried = [t for t in self.store.development if (t["method"], t["facts"]) == (method, size)]
        fit = [trial for trial in tried if "skipped" not in trial]
        if not fit:
            raise Unfit(tried[-1]["skipped"])
        return max(fit, key=lambda trial: trial["overall"])["setting"]

    def _tuned_at(self, facts: int) -> int:
        return min(facts, self.plan.tune_up_to, *([self.data.held] if self.data.held else []))

    def _grid(self, method: str, facts: int) -> list[dict[str, Any]]:
        return METHODS[method].grid(self.bench.tiny, facts)

    def _untried(self, method: str, facts: int) -> list[dict[str, Any]]:
        settings = self._grid(method, facts)
        tried = [t["setting"] for t in self.store.development if (t["method"], t["facts"]) == (method, facts)]
        return [setting for setting in settings if setting not in tried] if len(settings) > 1 else []

    def _trial(self, method: str, facts: int, setting: dict[str, Any]) -> dict[str, Any]:
        """One setting, scored on the facts kept for choosing."""
        task = self.data.task(facts, 0, development=True)
        task = replace(task, unknown=[], asked={n: q for n, q in task.asked.items() if n in _TUNED_BY})
        found: dict[str, Any] = {"method": method, "facts": facts, "setting": setting}
        scorer = self._scorer(task, _TUNED_ON)
        try:
            learner, cost = self._taught(task, Job("lesson", method, facts, 0, 0), setting)
        except Unfit as error:
            return {**found, "skipped": str(error)}
        scores = scorer.score(scorer.answers(learner))
        return {**found, "overall": list(overall(scores)), "scores": scores, "seconds": cost["seconds"]}

    def _scorer(self, task: Task, most: int | None) -> Scorer:
        return Scorer(self.bench, task, general(), most, self._before)

    def _before(self, prompts: list[str]) -> Answers:
        return self.store.before(self.bench, prompts)

    def _perplexity_before(self) -> float:
        """The base model's, which is measured once."""
        found = self.store.found
        if "perplexity_before" not in found:
            found["perplexity_before"] = perplexity(self.bench, self.bench.base(), self.plan.texts)
        return found["perplexity_before"]

    def _say(self, what: str) -> None:
        self.bar.set_postfix_str(what)
        if self.lines:
            print(what, file=sys.stderr, flush=True)
