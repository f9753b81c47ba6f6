"""The ledger: which rows an adapter was taught, so that they can be listed, corrected, forgotten and taught again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any

from .rows import Row, Text, read_messages

LEDGER_NAME = "qf_ledger.jsonl"  # in an adapter's folder
_SHARED = tuple(field.name for field in fields(Row) if field.name != "index")  # by rows and entries


@dataclass(frozen=True)
class Entry:
    """One row as it was taught."""

    id: str
    """Twelve hexadecimal digits: a hash of instruction, prompt and completion."""
    instruction: Text
    prompt: Text
    completion: str
    significance: tuple[float, ...] | float
    date: str
    """When, in UTC (ISO 8601)."""
    standing: bool = False
    """Whether it was taught as an example of a standing instruction."""
    wordings: tuple[str, ...] = ()
    """Other wordings of the prompt that were taught along, where the row gave some."""
    settled: bool = False
    """Whether the adapter's weights were changed by others since: what was taught is part of them and can no longer be
    undone."""

    def row(self) -> Row:
        """The row to be taught again; of no place in a dataset."""
        return Row(-1, **{name: getattr(self, name) for name in _SHARED})


def entry(row: Row, standing: bool = False) -> Entry:
    """A row that was just taught, or taught again (its date stays); its completion must be known."""
    content = json.dumps([row.instruction, row.prompt, row.completion])
    shared = {name: getattr(row, name) for name in _SHARED}
    shared["date"] = row.date or datetime.now(timezone.utc).isoformat(timespec="seconds")
    shared.update(completion=str(row.completion), standing=standing)
    return Entry(hashlib.sha256(content.encode()).hexdigest()[:12], **shared)


def question_key(of: Row | Entry) -> str:
    """What makes two rows answers to one question: the prompt."""
    return json.dumps(of.prompt)


def check_consistent(rows: Iterable[Row]) -> None:
    """Refuse a dataset that teaches two answers to one prompt.

    Raises:
        ValueError: two rows have the same prompt and different completions; the message names both.
    """
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(question_key(row), row)
        if other.completion != row.completion:
            raise ValueError(
                f"rows {other.index} and {row.index} contradict each other: the prompt {row.prompt!r} has the "
                f"completions {other.completion!r} and {row.completion!r}; keep one of them"
            )


def joined(entries: Sequence[Entry], new: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries with the new ones behind them, which replace those of the same prompt."""
    prompts = {question_key(e) for e in new}
    return (*(e for e in entries if question_key(e) not in prompts), *{question_key(e): e for e in new}.values())


def to_lines(entries: Iterable[Entry]) -> str:
    """JSON Lines, one entry a line."""
    return "".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in entries)


def from_lines(text: str, where: str) -> tuple[Entry, ...]:
    """Read what `to_lines` wrote.

    Raises:
        ValueError: a line is not an entry; the message names it.
    """
    entries = []
    for number, line in enumerate(text.split("\n"), 1):  # other characters that end lines may stand in a text
        if not line:
            continue
        try:
            raw: dict[str, Any] = json.loads(line)
            significance = raw["significance"]
            many = isinstance(significance, list)
            raw["significance"] = tuple(map(float, significance)) if many else float(significance)
            found = Entry(**{**raw, "wordings": tuple(raw.get("wordings", ()))})
            for part in (found.instruction, found.prompt):
                if not isinstance(part, str):
                    read_messages(part, "message")
            if not all(isinstance(part, str) for part in (found.id, found.completion, found.date, *found.wordings)):
                raise TypeError("id, completion, date and wordings are strings")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where}, line {number} is no entry of a ledger ({error})") from error
        entries.append(found)
    return tuple(entries)
