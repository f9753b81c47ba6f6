"""What is said of each taught fact now, and what became of other questions: for pages and other eyes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.ledger import Entry
from ..data.rows import Text, text_of
from .metrics import normalise, prompt_rows
from .subject import Subject

OTHERS_TOKENS = 32  # of an answer to another question: further on any change of a long answer's words changes the rest


@dataclass(frozen=True)
class Fact:
    """A taught fact, and what is said when it is asked for."""

    entry: Entry
    answer: str
    state: Literal["said", "in other words", "not said"]


@dataclass(frozen=True)
class Other:
    """A question about something else."""

    prompt: Text
    before: str
    """The base model's answer."""
    now: str

    @property
    def kept(self) -> bool:
        """Whether the answer is the same, but for spaces and punctuation at its end."""
        return normalise(self.before) == normalise(self.now)

    @property
    def overlap(self) -> float:
        """The share of words that the answers have in common: F1 of their words, each as often as it is there."""
        before, now = (Counter(_words(text)) for text in (self.before, self.now))
        words = before.total() + now.total()
        return 2 * (before & now).total() / words if words else float(self.kept)


@dataclass(frozen=True)
class Checkup:
    """How an adapter does."""

    facts: tuple[Fact, ...]
    others: tuple[Other, ...]
    divergence: float | None
    """Mean KL in nats from the base model at held-out chats, measured by the last lesson where chats are preserved."""


def checkup(subject: Subject, questions: Sequence[Text] = (), most: int = 50) -> Checkup:
    """Ask for the last `most` facts of an adapter's ledger, and the questions with and without it, by free greedy
    generation to the model's own stop or the settings' `max_new_tokens`; for the questions to 32 tokens at most.

    A fact is *said* if the answer is its completion, and said *in other words* if the answer holds what is new in the
    completion: its words that the instruction has too and the prompt has not.

    Raises:
        ValueError: a question is empty.
    """
    entries = subject.facts[-most:]
    rows = prompt_rows(questions, "questions") if questions else []
    with subject.asking() as progress:
        progress.total = len(entries) + 2 * len(rows)
        ask = subject.evaluator(progress)
        answers = ask.answered([entry.row() for entry in entries])
        briefly = subject.evaluator(progress, most_tokens=OTHERS_TOKENS)
        now = briefly.answered(rows)
        with subject.tuner.without_adapters():
            before = briefly.answered(rows)
    taught = subject.tuner.taught.get(subject.adapter_name)
    return Checkup(
        tuple(Fact(e, text, _state(e, text, ended)) for e, (text, ended) in zip(entries, answers, strict=True)),
        tuple(Other(r.prompt, b, n) for r, (b, _), (n, _) in zip(rows, before, now, strict=True)),
        taught.divergence if taught is not None else None,
    )


def _state(entry: Entry, answer: str, ended: bool) -> Literal["said", "in other words", "not said"]:
    if ended and normalise(answer) == normalise(entry.completion):
        return "said"
    given, asked = set(_words(text_of(entry.instruction))), set(_words(text_of(entry.prompt)))
    new = set(_words(entry.completion)) & given - asked
    return "in other words" if new and new <= set(_words(answer)) else "not said"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
