"""Rows from files and datasets: JSON Lines, JSON, CSV, Parquet, or a dataset on the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .rows import read_rows

_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def load_rows(source: str, name: str | None = None) -> list[dict[str, Any]]:
    """Rows to be taught.

    Args:
        source: a file by its ending (JSON Lines; JSON, one list of rows; CSV with a line of column names; Parquet), or
            a dataset's id on the Hub, perhaps with a split: `user/name` or `user/name:split` (by default "train").
        name: what errors call it; by default the source itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or a row is not one (see [`QFTrainer`]); the message names file and row.
        ImportError: Parquet and the Hub need the library `datasets`.
    """
    rows = load_records(source)
    read_rows(rows, name or source)
    return rows


def load_records(source: str) -> list[dict[str, Any]]:
    """The same without a check of the columns."""
    path, kind = Path(source).expanduser(), Path(source).suffix.lower()
    if not path.is_file():
        if kind in _KINDS or path.is_dir() or path.is_absolute() or source.count("/") > 1:
            raise FileNotFoundError(f"no file {source}")
        return _from_hub(source)
    if kind == ".parquet":
        return _plain(_datasets().Dataset.from_parquet(str(path)))
    if kind not in _KINDS:
        raise ValueError(f"{source}: the ending {kind!r} is not known; expected one of {', '.join(_KINDS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: byte {error.start} is no UTF-8 text; save it as UTF-8") from error
    if kind == ".jsonl":
        rows = list(_lines(text, source))
    elif kind == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error})") from error
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"{source}: expected one list of objects, the rows")
    else:
        rows = list(_table(text, source))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _lines(text: str, source: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number} is no JSON ({error}); each line is one row") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number} is a {type(row).__name__}; expected an object, one row a line")
        yield row


def _table(text: str, source: str) -> Iterator[dict[str, Any]]:
    """CSV: cells that are empty are left out; `significance` is a number, or several between spaces; `wordings` are
    divided by |."""
    reader = csv.DictReader(text.splitlines(keepends=True), restkey="")
    try:
        for row in reader:
            if "" in row:
                raise ValueError(f"{source}, line {reader.line_num} has more cells than the first line has columns")
            cells: dict[str, Any] = {key: value for key, value in row.items() if value}
            if "significance" in cells:
                try:
                    numbers = [float(number) for number in cells["significance"].split()] or [1.0]
                except ValueError as error:
                    raise ValueError(
                        f"{source}, line {reader.line_num}: significance is {cells['significance']!r}; expected a "
                        "number, or one for each word of the completion between spaces"
                    ) from error
                cells["significance"] = numbers if len(numbers) > 1 else numbers[0]
            if "wordings" in cells:
                cells["wordings"] = [wording.strip() for wording in cells["wordings"].split("|")]
            yield cells
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num} is no CSV ({error})") from error


def _from_hub(source: str) -> list[dict[str, Any]]:
    repo, _, split = source.partition(":")
    datasets = _datasets()
    try:
        return _plain(datasets.load_dataset(repo, split=split or "train"))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"no file {source}, and no such dataset on the Hub") from error


def _plain(dataset: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if value is not None} for row in dataset]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading Parquet or the Hub needs the library datasets: pip install datasets") from error
    return datasets
