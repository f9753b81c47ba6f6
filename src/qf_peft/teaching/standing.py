"""Standing instructions: those that change what the model says everywhere ("Answer briefly."), not at one fact."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence

from ..data.rows import Row, Text
from ..evaluate.metrics import normalise

_TRIED = 16  # preserved chats on which an instruction is tried

Ask = Callable[[list[Row], bool], list[tuple[str, bool]]]
"""Rows, and whether with their instructions → the model's own answer to each, and whether it ended."""


def split_lessons(rows: Sequence[Row], prompts: Sequence[Text], ask: Ask) -> list[tuple[list[Row], bool]]:
    """The rows in the lessons they are taught in, and whether it is a standing instruction's, with preserved `prompts`
    answered under it behind the rows. What changes everything comes first, so that facts are solved on top of it."""
    groups = standing_instructions(rows, prompts, ask)
    stands = {id(row) for group in groups for row in group}
    facts = [row for row in rows if id(row) not in stands]
    lessons = [(group + answered_under(group, prompts, ask), True) for group in groups]
    return lessons + ([(facts, False)] if facts else [])


def standing_instructions(rows: Sequence[Row], prompts: Sequence[Text], ask: Ask) -> list[list[Row]]:
    """The rows whose instruction stands, one list for each such instruction.

    Only an instruction that at least five rows and a tenth of all share is tried, on up to 16 of the prompts, evenly
    spaced. It stands if with it the base model answers at least half of them otherwise than without it. What was taught
    as standing before stands, however many rows there are now.
    """
    shared: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        shared[json.dumps(row.instruction)].append(row)
    tried = prompts[:: max(1, len(prompts) // _TRIED)][:_TRIED]
    found, plain = [], []
    for group in shared.values():
        if any(row.standing for row in group):
            found.append(group)
            continue
        if len(group) < max(5, len(rows) / 10) or not tried:
            continue
        questions = [Row(i, group[0].instruction, prompt, None) for i, prompt in enumerate(tried)]
        plain = plain or [normalise(text) for text, _ in ask(questions, False)]
        instructed = [normalise(text) for text, _ in ask(questions, True)]
        if 2 * sum(a != b for a, b in zip(plain, instructed, strict=True)) >= len(tried):
            found.append(group)
    return found


def answered_under(group: Sequence[Row], prompts: Sequence[Text], ask: Ask) -> list[Row]:
    """The prompts, but those of the group's own rows, with the model's answers under the group's instruction, as rows
    to be taught with it. Answers that are empty or do not end are left out."""
    own = {json.dumps(row.prompt) for row in group}
    rows = [
        Row(-1, group[0].instruction, prompt, None)  # of no place in the dataset
        for prompt in prompts
        if json.dumps(prompt) not in own
    ]
    return [
        Row(row.index, row.instruction, row.prompt, text)
        for row, (text, ended) in zip(rows, ask(rows, True), strict=True)
        if ended and text
    ]
