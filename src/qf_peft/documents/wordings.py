"""Other wordings of rows' questions, written by the model itself and taught as further rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..data.rows import Text, read_rows
from ..evaluate.metrics import normalise
from .in_context import ContextModel
from .model_output import parse_questions

_REQUEST = (
    "Write {count} other ways to ask the following question, so that each has the same answer ({answer!r}). Keep names "
    "and numbers, and the question's language. One question a line, numbered, and nothing else.\n\n{question}"
)
_WRITTEN_TOKENS = 512
_TURNS = 6  # sampled for each wording wanted


def with_wordings(
    rows: Iterable[Mapping[str, Any]],
    model: nn.Module,
    processing_class: Any,
    *,
    count: int = 4,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Rows, each followed by up to `count` rows that ask the same otherwise, to broaden what the question is known by.

    The base model, with the row's instruction in context, is asked for other wordings; where that gives too few, it
    samples user turns of its own behind the instruction. A wording is kept if the model, asked it in context, greedily
    gives the row's answer.

    Args:
        rows: with `instruction`, `prompt` (a string) and `completion`; others are returned as they are.
        model: a causal language model, with or without adapters (they are off meanwhile).
        processing_class: its tokenizer.
        count: further rows for each row, at most.
        batch_tokens, seed, progress: see [`facts_from_document`].

    Returns:
        New dicts: the rows' own columns, in the further ones with another `prompt`.

    Raises:
        ValueError: a row is not one; the message names it.
    """
    rows = [dict(row) for row in rows]
    read_rows(rows, "rows")
    reader = ContextModel(model, processing_class, batch_tokens=batch_tokens, seed=seed, progress=progress)
    plain = [
        i for i, row in enumerate(rows) if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
    ]
    facts = [(rows[i]["instruction"], rows[i]["prompt"], rows[i]["completion"]) for i in plain]
    found = dict(zip(plain, wordings(reader, facts, count), strict=True))
    return [new for i, row in enumerate(rows) for new in [row, *({**row, "prompt": p} for p in found.get(i, []))]]


def wordings(reader: ContextModel, facts: Sequence[tuple[Text, str, str]], count: int) -> list[list[str]]:
    """For each fact (instruction, prompt, completion) at most `count` other prompts with the same answer in context.
    A wording serves one fact only, and none is another fact's prompt."""
    kept: list[list[str]] = [[] for _ in facts]
    if not facts or count < 1:
        return kept
    taken = {same_question(prompt) for _, prompt, _ in facts}

    def check(candidates: list[list[str]]) -> None:
        new = []
        for i, prompts in enumerate(candidates):
            for prompt in prompts:
                if same_question(prompt) not in taken:
                    taken.add(same_question(prompt))
                    new.append((i, prompt))
        answers = reader.answers([(facts[i][0], prompt) for i, prompt in new])
        for (i, prompt), answer in zip(new, answers, strict=True):
            if answer is not None and normalise(answer) == normalise(facts[i][2]) and len(kept[i]) < count:
                kept[i].append(prompt)

    requests = [
        (instruction, _REQUEST.format(count=count, answer=completion, question=prompt))
        for instruction, prompt, completion in facts
    ]
    outputs = reader.written(requests, _WRITTEN_TOKENS, "writing other wordings")
    check([parse_questions(text, ended)[: 2 * count] for text, ended in outputs])
    short = [i for i, found in enumerate(kept) if len(found) < count]
    turns = reader.user_turns([facts[i][0] for i in short], _TURNS * count)
    candidates: list[list[str]] = [[] for _ in facts]
    for i, written in zip(short, turns, strict=True):
        instruction, prompt, completion = facts[i]
        source = " ".join([*_texts(instruction), prompt, completion])
        candidates[i] = [turn for turn in written if not foreign_names(turn, source)]
    check(candidates)
    return kept


def same_question(prompt: str) -> str:
    """What two prompts share that differ in case, whitespace and punctuation alone."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def foreign_names(text: str, source: str) -> set[str]:
    """Names and numbers in a text that its source does not hold: words with a digit, or with a capital that does not
    begin the text. A sampled question that has some is about something else."""
    there = {word.casefold() for word in re.findall(r"\w+", source)}
    words = re.findall(r"\w+", text)
    named = [w for i, w in enumerate(words) if any(c.isdigit() for c in w) or (i and w[0].isupper() and w != "I")]
    return {word for word in named if word.casefold() not in there}


def asks_about(prompt: str, answer: str, source: str) -> bool:
    """Whether a sampled question asks about its source and the answer comes from there: the question has a word of the
    source, and the answer another one. Words count that have four letters, begin with a digit, or are names. True of
    languages that do not divide words, where it cannot be told."""
    if len(source.split()) < 3:
        return True
    words = [re.findall(r"\w+", text) for text in (prompt, answer, source)]
    names = {word for part in words for word in part[1:] if word[0].isupper()}  # the first may be none
    of_question, of_answer, of_source = (
        {w.casefold() for w in p if len(w) > 3 or w in names or w[0].isdigit()} for p in words
    )
    return bool(of_source & of_question) and bool(of_source & (of_answer - of_question))


def _texts(instruction: Text) -> list[str]:
    return [instruction] if isinstance(instruction, str) else [message["content"] for message in instruction]
