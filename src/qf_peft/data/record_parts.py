"""Records of datasets, read field by field, with errors that name the record and the field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


class Part:
    """A record, or a part of it, that knows its name for errors. Fields that are None count as missing."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is a {type(value).__name__}; expected a dict")
        self.value, self.where = value, where

    def __contains__(self, field: str) -> bool:
        return self.value.get(field) is not None

    def name(self, field: str) -> str:
        return f"{self.where}{'.' if ': ' in self.where else ': '}{field}"

    def _missing(self, field: str) -> ValueError:
        return ValueError(f"{self.name(field)} is missing; the fields are {sorted(map(str, self.value))}")

    def part(self, field: str) -> Part:
        if field not in self:
            raise self._missing(field)
        return Part(self.value[field], self.name(field))

    def text(self, field: str) -> str:
        """A string; of nested lists (answers with aliases) the first, of `{"str": …}` (ROME's targets) its string."""
        if field not in self:
            raise self._missing(field)
        found = first_of(self.value[field])
        if not isinstance(found, str):
            raise ValueError(f"{self.name(field)} is {found!r}; expected a string")
        if not found.strip():
            raise ValueError(f"{self.name(field)} is empty")
        return found.strip()

    def texts(self, field: str) -> list[str]:
        """The strings of an optional field, which may hold one or a list."""
        if field not in self:
            return []
        found = self.value[field]
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{self.name(field)} is {found!r}; expected a string or a list of strings")
        return [text.strip() for text in found if text.strip()]

    def parts(self, field: str) -> Iterator[Part]:
        """The dicts of an optional field, which may hold one or a list."""
        if field in self:
            found = self.value[field]
            many = [found] if isinstance(found, Mapping) else found
            if not isinstance(many, Sequence) or isinstance(many, str):
                raise ValueError(f"{self.name(field)} is {found!r}; expected a list of dicts")
            for index, value in enumerate(many):
                yield Part(value, f"{self.name(field)}[{index}]")


def first_of(found: Any) -> Any:
    """Of nested lists the first entry, of `{"str": …}` its string, else the value itself."""
    if isinstance(found, Mapping) and "str" in found:
        return found["str"]
    while isinstance(found, Sequence) and not isinstance(found, str) and len(found):
        found = found[0]
    return found


def read_records(records: Any, name: str) -> Iterator[Part]:
    """The records one after another; `name` is the dataset's, for errors."""
    if isinstance(records, (str, bytes, Mapping)) or not isinstance(records, Iterable):
        raise ValueError(f"{name}: got a {type(records).__name__}; expected a list of records, as json.load gives it")
    empty = True
    for index, record in enumerate(records):
        empty = False
        yield Part(record, f"{name}, record {index}")
    if empty:
        raise ValueError(f"{name}: there are no records")
