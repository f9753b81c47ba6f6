"""What one run teaches and asks, whatever data it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

TAUGHT = ("instruction", "prompt", "completion", "wordings", "significance")  # columns that methods are given


@dataclass(frozen=True)
class Question:
    """A question and what a right answer to it is."""

    prompt: str
    answers: tuple[str, ...] = ()
    """Any of which is right if it is the whole answer."""
    holds: tuple[str, ...] = ()
    """Any of which a right answer contains."""
    against: str | None = None
    """What a right answer must be likelier than, where completions are given to the model: the answer before the edit,
    or, of a question of locality, the one that its record teaches."""


@dataclass(frozen=True)
class Task:
    """Facts to teach and the questions asked before and after."""

    rows: list[dict[str, Any]]
    """What is taught, with the columns of `TAUGHT`."""
    asked: dict[str, list[Question]]
    """By column of the table: "reliability", "generalisation", "portability", "multi_hop", "reversed": questions with
    right answers; "negated": questions whose answer must not hold what was taught."""
    locality: list[Question]
    """Questions whose answers shall stay what they are, with right answers where the data have them."""
    unknown: list[str]
    """Questions about things that nobody taught."""
    preserved: list[Any] | None = None
    """For methods that preserve chats; None leaves it to them."""

    @property
    def taught_answers(self) -> list[str]:
        """What the taught questions' answers contain."""
        return sorted({text for question in self.asked["reliability"] for text in question.holds})


class Data(Protocol):
    """Where tasks come from."""

    name: str
    most: int | None
    """The most facts that a task can have; None if there is no end to them."""
    held: int | None
    """The most that a task for choosing settings can have."""

    def task(self, facts: int, seed: int, development: bool = False) -> Task:
        """So many facts of a seed. With `development` others, of which settings are chosen."""
        ...


def question(
    row: dict[str, Any], prompt: str | None = None, holds: tuple[str, ...] = (), against: str | None = None
) -> Question:
    """The question of a row, or another wording of it. A right answer contains `holds`, by default the completion."""
    completion = row["completion"]
    return Question(prompt or row["prompt"], (completion,), holds or (completion,), against)


def spread(items: list, most: int | None) -> list:
    """At most so many of a list, evenly spread over it."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
