"""Files of the user's as data: records in benchmarks' published formats, or facts in CSV, JSON Lines, JSON, Parquet."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qf_peft import (
    rows_from_counterfact,
    rows_from_knowedit,
    rows_from_mquake,
    rows_from_qaedit,
    rows_from_requests,
    rows_from_wikibigedit,
    rows_from_zsre,
)
from qf_peft.data.files import load_records
from qf_peft.data.rows import read_rows

from .tasks import TAUGHT, Data, Question, Task, question
from .worlds import EnglishWorld, general, strangers

_DEVELOPMENT = 4  # one record of so many is kept for choosing settings
_LOCALITY = 60  # questions asked for locality at least, other records' where a task has fewer of its own
_MULTI_HOP = ("MQuAKE", "WikiBigEdit")  # whose portability is questions over several facts


@dataclass(frozen=True)
class _Format:
    name: str
    fields: tuple[str, ...]
    """Which a record has; the first format whose fields are all there is taken."""
    convert: Callable[[list], Any]
    truth: tuple[str, ...] = ()
    """Where the answer before the edit stands."""


_FORMATS = (
    _Format("zsRE", ("src", "alt"), rows_from_zsre, ("pred",)),
    _Format("MQuAKE", ("requested_rewrite", "questions"), rows_from_mquake),
    _Format("CounterFact", ("requested_rewrite",), rows_from_counterfact, ("requested_rewrite", "target_true", "str")),
    _Format("WikiBigEdit", ("update", "ans"), rows_from_wikibigedit),
    _Format("QAEdit", ("prompt", "target"), rows_from_qaedit),
    _Format("KnowEdit", ("ent", "pos"), rows_from_knowedit),
    _Format("KnowEdit", ("text", "labels"), rows_from_knowedit),
    _Format("KnowEdit", ("prompt", "target_new", "portability"), rows_from_knowedit, ("ground_truth",)),
    _Format("requests", ("prompt", "target_new"), rows_from_requests, ("ground_truth",)),
)


def open_file(path: str) -> Data:
    """A file of records or facts, told apart by its fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or a record lacks a field; the message names the file, the record and the field.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; give a file, or 'english' or 'tiny'")
    text = Path(path).read_text(encoding="utf-8-sig") if path.endswith(".json") else ""
    if text.lstrip().startswith("{"):  # KnowEdit's Sanitation is one object
        return RecordFile(path, [json.loads(text)], _Format("KnowEdit", (), lambda one: rows_from_knowedit(one[0])))
    records = load_records(path)
    found = next((form for form in _FORMATS if all(name in records[0] for name in form.fields)), None)
    if found is not None:
        return RecordFile(path, records, found)
    if not {"instruction", "prompt", "messages"} & set(records[0]):
        known = "; ".join(f"{form.name}: {', '.join(form.fields)}" for form in _FORMATS)
        raise ValueError(
            f"{path}: the fields {sorted(records[0])} are of no known format; facts have 'instruction', 'prompt' and "
            f"'completion', records {known}"
        )
    return FactsFile(path, records)


@dataclass(frozen=True)
class _Unit:
    """One record: its rows, and the questions that come with it."""

    rows: list[dict[str, Any]]
    locality: list[Question]
    following: list[Question]
    truth: str | None


class RecordFile:
    """Records of an editing benchmark. A quarter of them, the same for every seed, is kept for choosing settings.

    Each of a task's "facts" is a record; MQuAKE's have up to four rows.
    """

    def __init__(self, path: str, records: list[dict[str, Any]], form: _Format) -> None:
        self.name, self.form = Path(path).stem, form
        try:
            form.convert(records)  # all at once first, so that errors name the record
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        units = [unit for record in records for unit in self._units(record)]
        random.Random("records").shuffle(units)
        known: dict[str, str] = {}
        self.units = []
        for unit in units:  # records that contradict each other cannot be taught together
            if all(known.get(row["prompt"], row["completion"]) == row["completion"] for row in unit.rows):
                known.update((row["prompt"], row["completion"]) for row in unit.rows)
                self.units.append(unit)
        self.held = len(self.units) // _DEVELOPMENT
        self.most = len(self.units) - self.held
        if not self.held:
            raise ValueError(f"{path}: {len(self.units)} records can be taught; at least {_DEVELOPMENT} are needed")

    def _units(self, record: dict[str, Any]) -> list[_Unit]:
        if self.form.name == "zsRE" and record["alt"] == "":
            return []
        edits = self.form.convert([record])
        kept = []
        for asked in edits.locality:
            right = (asked["answer"],) if "answer" in asked else ()
            kept.append(Question(asked["prompt"], right, right, edits.rows[0]["completion"] if edits.rows else None))
        if self.form.fields == ():  # one object with many rows
            return [_Unit([row], kept if i == 0 else [], [], None) for i, row in enumerate(edits.rows)]
        following = [question(row) for row in edits.portability]
        return [_Unit(edits.rows, kept, following, _at(record, self.form.truth))] if edits.rows else []

    def task(self, facts: int, seed: int, development: bool = False) -> Task:
        pool = self.units[self.most :] if development else self.units[: self.most]
        if facts > len(pool):
            raise ValueError(f"{self.name} has {len(pool)} records to teach; {facts} were asked for")
        order = random.Random(f"{self.name} {seed}").sample(pool, len(pool))
        chosen = order[:facts]
        rows: dict[str, tuple[dict[str, Any], str | None]] = {}
        for unit in chosen:
            for row in unit.rows:
                rows.setdefault(row["prompt"], (row, unit.truth))
        prompts = {prompt for row, _ in rows.values() for prompt in (row["prompt"], *row.get("paraphrases", ()))}
        kept: dict[str, Question] = {}
        for number, unit in enumerate(order):
            if number >= facts and len(kept) >= _LOCALITY:
                break
            kept.update((asked.prompt, asked) for asked in unit.locality if asked.prompt not in prompts)
        others = [(row, other, truth) for row, truth in rows.values() for other in row.get("paraphrases", ())]
        asked = {
            "reliability": [question(row, against=truth) for row, truth in rows.values()],
            "generalisation": [question(row, other, against=truth) for row, other, truth in others],
            "multi_hop" if self.form.name in _MULTI_HOP else "portability": [
                q for unit in chosen for q in unit.following
            ],
        }
        return Task(
            rows=[{key: row[key] for key in TAUGHT if key in row} for row, _ in rows.values()],
            asked={name: questions for name, questions in asked.items() if questions},
            locality=list(kept.values()),
            unknown=strangers(seed),
        )


class FactsFile:
    """A user's own facts: `instruction`, `prompt`, `completion`; perhaps `paraphrases` (other wordings, to be asked and
    not taught), and `answer` (what a right answer contains, several divided by |; by default the whole completion).

    All of them are taught, so settings are chosen on as many facts of the English world.
    """

    def __init__(self, path: str, records: list[dict[str, Any]]) -> None:
        self.name = Path(path).stem
        checked = read_rows(records, path)
        for row in checked:
            if row.completion is None or not isinstance(row.prompt, str):
                what = "completion" if row.completion is None else "prompt that is one string"
                raise ValueError(f"{path}, row {row.index}: there is no {what}, which is needed to score answers")
        self.rows = [
            {
                **{key: record[key] for key in TAUGHT if key in record}, "instruction": row.instruction,
                "prompt": row.prompt, "completion": row.completion,
                "paraphrases": _several(record, "paraphrases", f"{path}, row {row.index}"),
                "answer": _several(record, "answer", f"{path}, row {row.index}"),
            }
            for row, record in zip(checked, records, strict=True)
        ]  # fmt: skip
        self.most, self.held = len(self.rows), None

    def task(self, facts: int, seed: int, development: bool = False) -> Task:
        if development:
            return EnglishWorld().task(facts, seed, development=True)
        if facts > self.most:
            raise ValueError(f"{self.name} has {self.most} facts; {facts} were asked for")
        rows = self.rows if facts == self.most else random.Random(f"{self.name} {seed}").sample(self.rows, facts)
        asked = {
            "reliability": [question(row, None, tuple(row["answer"])) for row in rows],
            "generalisation": [
                question(row, other, tuple(row["answer"])) for row in rows for other in row["paraphrases"]
            ],
        }
        return Task(
            rows=[{key: row[key] for key in TAUGHT if key in row} for row in rows],
            asked={name: questions for name, questions in asked.items() if questions},
            locality=general(),
            unknown=strangers(seed),
        )


def _several(record: dict[str, Any], column: str, where: str) -> list[str]:
    """A column that holds a list of strings, or one string, divided by | (as in CSV)."""
    value = record.get(column) or []
    value = value.split("|") if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{where}: {column} is {value!r}; expected strings, in CSV divided by |")
    return [text.strip() for text in value]


def _at(record: Any, path: tuple[str, ...]) -> str | None:
    """A string within a record, the first of a list; None where there is none."""
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    while isinstance(record, list) and record:
        record = record[0]
    return record.strip() if path and isinstance(record, str) and record.strip() else None
