"""Sections cut into passages that fit a model's context window, each with its headings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .reading import Section

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])|\n+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document that is read at once."""

    text: str
    """The headings on a line of their own, joined by " > ", then the text."""
    sentences: tuple[str, ...]
    """The text's."""
    place: str
    """Where it is from: headings and page."""


def split_passages(sections: Iterable[Section], count: Callable[[str], int], limit: int) -> list[Passage]:
    """Cut sections into passages of whole paragraphs, or sentences where a paragraph is too long.

    Args:
        sections: the document's.
        count: the number of tokens of a text.
        limit: of a passage's tokens, with its headings. Only a longer single word exceeds it.
    """
    passages = []
    for section in sections:
        title = " > ".join(section.headings)
        place = ", ".join(part for part in (title, f"page {section.page}" if section.page else "") if part)
        room = max(1, limit - (count(title + "\n") if title else 0))
        if title and room < limit / 2:  # a heading as long as a passage is left out of it
            title, room = "", limit
        for text in _packed(section.text, count, room):
            passages.append(Passage(f"{title}\n{text}" if title else text, tuple(sentences(text)), place))
    return passages


def sentences(text: str) -> list[str]:
    """A text's sentences and lines."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _packed(text: str, count: Callable[[str], int], limit: int) -> Iterator[str]:
    """Pieces as long as the limit allows, joined as they were."""
    piece = ""
    for glue, part in _parts(text, count, limit):
        longer = f"{piece}{glue}{part}" if piece else part
        if piece and count(longer) > limit:
            yield piece
            longer = part
        piece = longer
    if piece:
        yield piece


def _parts(text: str, count: Callable[[str], int], limit: int) -> Iterator[tuple[str, str]]:
    """Paragraphs, or else sentences, or else words, each with what stands before it."""
    for paragraph in (p.strip() for p in re.split(r"\n\s*\n", text)):
        if not paragraph:
            continue
        if count(paragraph) <= limit:
            yield "\n\n", paragraph
            continue
        glue = "\n\n"
        for sentence in sentences(paragraph):
            for part in [sentence] if count(sentence) <= limit else sentence.split():
                yield glue, part
                glue = " "
