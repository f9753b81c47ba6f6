"""Thinned wordings: a row's prompt with some of its words left out, taught along.

What a question is known by must not be its exact words. Which words matter no rule can tell, but the name must: so
wordings are made that keep the names and lose each other word with even chances, down to the name alone. No model
writes them, and they suit any language that divides words.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from ..data.rows import Row, Text
from .constants import THINNING_TRIES, WORDS_KEPT
from .contrast import row_names


def thinned(row: Row, count: int, seed: int) -> list[Row]:
    """At most `count` rows that ask a row's prompt thinned, the first by its names alone, all different.

    None where the prompt has no name that the completion or the instruction shares, or no words beside.
    """
    text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    names = [name for name in row_names(row) if name in text]
    if not names:
        return []
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.findall(rf"\S*?(?:{either})\S*|\S+", text)
    named = [any(name in part for name in names) for part in parts]
    r, found = random.Random(f"{seed} {text}"), [" ".join(names)]
    for _ in range(THINNING_TRIES * count):
        kept = [name or r.random() < WORDS_KEPT for name in named]
        found.append(" ".join(part for part, keep in zip(parts, kept, strict=True) if keep))
    return [asked_as(row, other) for other in dict.fromkeys(found) if other != text][:count]


def asked_as(row: Row, wording: str) -> Row:
    """The row with another prompt, or last message of its prompt."""
    prompt: Text = wording
    if not isinstance(row.prompt, str):
        prompt = [*row.prompt[:-1], {**row.prompt[-1], "content": wording}]
    return replace(row, prompt=prompt, wordings=())
