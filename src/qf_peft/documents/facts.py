"""Facts from documents: the model reads passages, writes questions and answers, and checks them, to be taught."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.files import load_rows
from ..data.rows import Text
from ..data.writing import whole_file
from ..evaluate.metrics import normalise
from .in_context import ContextModel
from .model_output import parse_pairs
from .passages import Passage, split_passages
from .reading import read_document
from .wordings import asks_about, foreign_names, same_question, wordings

_REQUEST = (
    "Write {count} questions about the text above that someone who has not seen it might ask, each with its answer "
    "from the text alone. Name in each question what it is about, so that it can be understood without the text. "
    "Answer in a short full sentence, in the text's language. Use this form and write nothing else:\n"
    "Q: the question\nA: the answer"
)
_PAIR_TOKENS = 96  # of the model's output, for each question asked for
_SURE = 0.5  # of the geometric mean of an answer's tokens' probabilities
_TURNS = 12  # sampled for each sentence


@dataclass(frozen=True)
class DocumentReport:
    """What became of a document's questions."""

    passages: int = 0
    """How many passages the document was cut into."""
    prompted: int = 0
    """Questions with answers that the model wrote when asked to."""
    sampled: int = 0
    """Questions that it wrote as user turns of its own, where asking gave nothing."""
    silent: int = 0
    """Passages about which it wrote nothing that can be read as a question."""
    repeated: int = 0
    """Questions dropped because the same one was there already."""
    unread: int = 0
    """Dropped: with the passage in context the model greedily gives no answer, or another than it wrote."""
    foreign: int = 0
    """Sampled questions dropped that name, or whose answers name, what the passage does not, or whose answers are not
    from there."""
    known: int = 0
    """Dropped: the model gives the same answer without the passage."""
    surplus: int = 0
    """Dropped: other sampled questions of the passage have the same answer, or there were more than asked for."""
    facts: int = 0
    """Rows with a question of their own."""
    wordings: int = 0
    """Further rows, which ask the same otherwise."""
    sure: int = 0
    """Facts whose answers the model reads surely: with a `read` of a half or more."""

    @property
    def weak(self) -> bool:
        """Whether the model seems too weak to write about such a document: it found less than a fact a passage, or
        reads less than half of them surely."""
        return self.facts < self.passages or 2 * self.sure < self.facts

    def __str__(self) -> str:
        dropped = {
            "repeated": self.repeated, "not read back in context": self.unread, "about something else": self.foreign,
            "known without the text": self.known, "beyond what was asked for": self.surplus,
        }  # fmt: skip
        parts = [
            f"{self.facts} facts ({self.sure} read surely) and {self.wordings} other wordings from {self.passages} "
            "passages",
            f"{self.prompted} questions written on request, {self.sampled} sampled",
            "dropped: " + (", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "none"),
        ]
        if self.silent:
            parts.append(f"no question about {self.silent} passages")
        return "; ".join(parts)


class DocumentFacts(list[dict[str, Any]]):
    """Rows for [`QFTrainer`]: `instruction` (the sentence that holds the answer, or the passage), `prompt`,
    `completion`, `read` (how surely the model reads the answer with the instruction in context: the geometric mean of
    its tokens' probabilities, from 0 to 1), and `document`, `place` and `passage`, where they are from. `report` counts
    what was dropped."""

    def __init__(self, rows: Iterable[dict[str, Any]] = (), report: DocumentReport | None = None) -> None:
        super().__init__(rows)
        self.report = report if report is not None else DocumentReport()


def facts_from_document(
    path: str | Path,
    model: nn.Module,
    processing_class: Any,
    *,
    questions: int = 5,
    paraphrases: int = 4,
    passage_tokens: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DocumentFacts:
    """Questions and answers that the base model writes about a document itself, each checked.

    The document is cut into passages, headings kept. With a passage in context the model is asked for questions and
    answers; about passages where that gives none it samples user turns behind each sentence (Magpie, arXiv 2406.08464),
    of which those are dropped that name what the sentence does not or whose answers are not from it. Then it is asked
    each question with the passage in context: its greedy answer is the completion, if it agrees with the one it wrote
    (all words of the shorter are in the longer). Repeated questions, answers that cannot be read back, and answers that
    it gives without the passage as well are dropped. Where the one sentence nearest to question and answer is enough to
    get the same answer, it is the row's instruction instead of the passage.

    Args:
        path: a Markdown, text, HTML or PDF file (`pip install 'qf-peft[documents]'`).
        model: a causal language model, with or without adapters (they are off meanwhile).
        processing_class: its tokenizer, or a processor that has one.
        questions: how many the model is asked for about each passage.
        paraphrases: how many other wordings of each question are added as rows of their own, at most
            (see [`with_wordings`]).
        passage_tokens: of a passage, at most; by default a sixteenth of the model's positions, from 32 to 384.
        batch_tokens: how many tokens go through the model at once.
        seed: of sampled questions.
        progress: called with a word for what is done, how many prompts are done and how many there are.

    Returns:
        The rows, with a `report`. Both are empty of facts, not an error, where the model writes nothing of use.

    Raises:
        FileNotFoundError, ValueError, ImportError: the document cannot be read (see [`read_document`]), or a number is
            out of range.
    """
    for name, value, least in (("questions", questions, 1), ("paraphrases", paraphrases, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"facts_from_document: {name}={value!r}; expected an integer from {least} up")
    if passage_tokens is not None and (not isinstance(passage_tokens, int) or passage_tokens < 8):
        raise ValueError(f"facts_from_document: passage_tokens={passage_tokens!r}; expected an integer from 8 up")
    sections = read_document(path)
    reader = ContextModel(model, processing_class, batch_tokens=batch_tokens, seed=seed, progress=progress)
    window = reader.window or 1 << 20
    limit = passage_tokens if passage_tokens is not None else min(384, max(32, window // 16))
    passages = split_passages(sections, reader.count, min(limit, window // 2))
    facts, report = _questions(reader, passages, questions)
    facts, report = _checked(reader, facts, report, questions)
    others = wordings(reader, [(fact.instruction, fact.prompt, fact.answer) for fact in facts], paraphrases)
    rows = []
    for fact, more in zip(facts, others, strict=True):
        for prompt in (fact.prompt, *more):
            rows.append(
                {
                    "instruction": fact.instruction, "prompt": prompt, "completion": fact.answer,
                    "document": Path(path).name, "place": fact.passage.place, "passage": fact.passage.text,
                }
            )  # fmt: skip
    read = reader.surety([(row["instruction"], row["prompt"], row["completion"]) for row in rows])
    for row, surety in zip(rows, read, strict=True):
        row["read"] = round(surety, 3)
    questions = {fact.prompt for fact in facts}
    sure = sum(row["read"] >= _SURE for row in rows if row["prompt"] in questions)
    return DocumentFacts(rows, replace(report, facts=len(facts), wordings=len(rows) - len(facts), sure=sure))


@dataclass(frozen=True)
class _Fact:
    passage: Passage
    text: str
    """What the question was written about and is answered from: the passage, or one sentence of it."""
    prompt: str
    answer: str
    """As written, later as read; of sampled questions none until read."""
    sampled: bool = False
    instruction: Text = ""
    """The text as it is told."""


def _questions(reader: ContextModel, passages: list[Passage], count: int) -> tuple[list[_Fact], DocumentReport]:
    """What the model writes about each passage on request, or else of its own about each of its sentences."""
    request = _REQUEST.format(count=count)
    outputs = reader.written(
        [(reader.as_instruction(passage.text), request) for passage in passages],
        _PAIR_TOKENS * count,
        "writing questions",
    )
    facts = [
        [_Fact(passage, passage.text, question, answer) for question, answer in parse_pairs(text, ended)[: 2 * count]]
        for passage, (text, ended) in zip(passages, outputs, strict=True)
    ]
    prompted = sum(map(len, facts))
    # Sampled questions stray less, and are read more surely, with one sentence in context than with many.
    single = [(i, text) for i, found in enumerate(facts) if not found for text in passages[i].sentences]
    turns = reader.user_turns([reader.as_instruction(text) for _, text in single], _TURNS)
    for (i, text), written in zip(single, turns, strict=True):
        facts[i] += [_Fact(passages[i], text, turn, "", sampled=True) for turn in written]
    return [fact for found in facts for fact in found], DocumentReport(
        passages=len(passages), prompted=prompted, sampled=sum(map(len, facts)) - prompted,
        silent=sum(not found for found in facts),
    )  # fmt: skip


def _checked(
    reader: ContextModel, facts: list[_Fact], report: DocumentReport, count: int
) -> tuple[list[_Fact], DocumentReport]:
    """The facts that can be read back and are news, with the model's own answers."""
    native = [f for f in facts if not f.sampled or not foreign_names(f.prompt, f.text)]
    fresh = list({same_question(fact.prompt): fact for fact in reversed(native)}.values())[::-1]
    instructions = {fact.text: reader.as_instruction(fact.text) for fact in fresh}
    answers = reader.answers([(instructions[fact.text], fact.prompt) for fact in fresh])
    read, strayed = [], 0
    for fact, answer in zip(fresh, answers, strict=True):
        if answer is None or not (fact.sampled or agree(fact.answer, answer)):
            continue
        if fact.sampled and (
            foreign_names(answer, f"{fact.text} {fact.prompt}") or not asks_about(fact.prompt, answer, fact.text)
        ):
            strayed += 1
            continue
        read.append(replace(fact, answer=answer, instruction=instructions[fact.text]))
    without = reader.answers([("", fact.prompt) for fact in read], instructed=False)
    news = [f for f, bare in zip(read, without, strict=True) if bare is None or normalise(bare) != normalise(f.answer)]
    chosen: list[_Fact] = []
    kept: dict[Passage, int] = {}
    answered: set[tuple[str, str]] = set()
    for fact in news:  # of sampled questions with one answer the first: the others are wordings of it
        key = (fact.text, normalise(fact.answer))
        if kept.get(fact.passage, 0) < count and not (fact.sampled and key in answered):
            chosen.append(fact)
            kept[fact.passage] = kept.get(fact.passage, 0) + 1
            answered.add(key)
    nearest = [_nearest_sentence(fact) for fact in chosen]
    short = reader.answers(
        [(reader.as_instruction(text), fact.prompt) for text, fact in zip(nearest, chosen, strict=True)]
    )
    chosen = [
        replace(fact, instruction=reader.as_instruction(text)) if answer == fact.answer else fact
        for fact, text, answer in zip(chosen, nearest, short, strict=True)
    ]
    return chosen, replace(
        report, foreign=len(facts) - len(native) + strayed, repeated=len(native) - len(fresh),
        unread=len(fresh) - len(read) - strayed, known=len(read) - len(news), surplus=len(news) - len(chosen),
    )  # fmt: skip


def agree(written: str, read: str) -> bool:
    """Whether two answers say the same as far as their words tell: all words of the shorter are in the longer."""
    if normalise(written) == normalise(read):
        return True
    first, second = (re.findall(r"\w+", text.casefold()) for text in (written, read))
    shorter, longer = sorted((first, second), key=len)
    return bool(shorter) and set(shorter) <= set(longer)


def _nearest_sentence(fact: _Fact) -> str:
    """The passage's sentence that shares most words with question and answer."""
    if fact.sampled:
        return fact.text
    words = set(re.findall(r"\w+", f"{fact.prompt} {fact.answer}".casefold()))
    return max(fact.passage.sentences, key=lambda s: len(words & set(re.findall(r"\w+", s.casefold()))))


def write_review(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines for someone to edit: change, delete or add lines, then `read_review` them.

    Raises:
        OSError: the file cannot be written; an earlier one is then as it was.
    """
    with whole_file(Path(path)) as file:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_review(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows from JSON Lines, as they were edited; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, or a row is none; the message names it.
    """
    return load_rows(os.fspath(path))
