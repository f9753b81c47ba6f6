"""Whether the order of facts matters, and whether a fact can be taken back exactly."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from statistics import fmean
from typing import Any

from .learners import Learner, Rows, distance
from .scoring import Answers, normalise, share
from .tasks import Task

Teach = Callable[[Rows], Learner]
Ask = Callable[[Learner], Answers]


def _equal(one: Answers, other: Answers) -> dict[str, Any] | None:
    """The share of answers that are alike after normalisation."""
    return share([normalise(one[prompt].text) == normalise(other[prompt].text) for prompt in one])


def orders(task: Task, teach: Teach, ask: Ask, count: int = 3) -> dict[str, Any]:
    """Teach a task's rows in several orders. Returns over all pairs of them the mean `distance` of the weights' changes
    (see [`learners.distance`]; None where no weights change), and the mean share of `equal_answers`."""
    found = []
    for number in range(count):
        rows = list(task.rows)
        random.Random(number).shuffle(rows)
        learner = teach(rows)
        found.append((learner.change(), ask(learner)))
        del learner  # so that there is one model at a time
    pairs = list(itertools.combinations(found, 2))
    moved = any(change for change, _ in found)
    return {
        "distance": fmean(distance(a, b) for (a, _), (b, _) in pairs) if moved else None,
        "equal_answers": fmean(_equal(a, b)["value"] for (_, a), (_, b) in pairs),
    }


def deletion(task: Task, teach: Teach, ask: Ask) -> dict[str, Any]:
    """Teach all of a task's rows and take the middle one back; teach others all but that one. Returns the `distance` of
    the weights' changes and the share of `equal_answers` of the two, to all questions, that of the lost row too."""
    gone = len(task.rows) // 2
    learner = teach(task.rows)
    learner.forget(task.rows[gone])
    change, answers = learner.change(), ask(learner)
    del learner
    never = teach([*task.rows[:gone], *task.rows[gone + 1 :]])
    other = never.change()
    return {
        "distance": distance(other, change) if change or other else None,
        "equal_answers": _equal(answers, ask(never))["value"],
    }
