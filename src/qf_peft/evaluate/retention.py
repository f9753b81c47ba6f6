"""What is recalled of the oldest facts up to the newest."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from .metrics import Evaluator, Metric, normalise, proportion
from .plots import lines
from .subject import Subject

_GROUPS = 10  # of facts in the order in which they were taught


@dataclass(frozen=True)
class Group:
    """Facts taught one after another."""

    first: str
    """When the first was taught, in UTC (ISO 8601)."""
    last: str
    start: int
    """The first one's place in the ledger, from 0."""
    recall: Metric


@dataclass(frozen=True)
class Retention:
    """Recall by when facts were taught, the oldest first."""

    groups: tuple[Group, ...]

    def svg(self) -> str:
        labels = [
            f"{g.start + 1}" + (f"–{g.start + g.recall.count}" if g.recall.count > 1 else "") for g in self.groups
        ]
        recall = [g.recall for g in self.groups]
        return lines("Recall by order of teaching", labels, {"recall": recall}, "facts, the oldest first")

    _repr_svg_ = svg


@torch.no_grad()
def retention(subject: Subject, ask: Evaluator | None = None) -> Retention:
    """Ask everything in the ledger, freely, and say what is recalled of the oldest facts up to the newest, in at most
    ten groups of (nearly) equal size.

    Args:
        subject: whose adapter.
        ask: by default one with the trainer's settings.

    Raises:
        ValueError: the ledger is empty.
    """
    entries = subject.facts
    if not entries:
        raise ValueError("the ledger is empty: nothing was taught, or what an adapter's file was taught is not known")
    rows = [e.row() for e in entries]
    with subject.asking() as progress:
        ask = ask or subject.evaluator(progress)
        answers = ask.answers(rows)
    right = [answer == normalise(str(row.completion)) for answer, row in zip(answers, rows, strict=True)]
    count = min(_GROUPS, len(rows))
    ends = [round(len(rows) * k / count) for k in range(count + 1)]
    return Retention(
        tuple(Group(entries[a].date, entries[b - 1].date, a, proportion(right[a:b])) for a, b in pairwise(ends))
    )
