"""Tokens as coloured text, for terminals and HTML."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_FULL = 5.0  # nats at which the colour is full, as in a token's significance
_LEVELS = ((3.0, 208), (1.0, 215), (0.3, 222), (0.05, 230))  # from so many nats on: a colour of 256


@dataclass(frozen=True)
class Token:
    """A predicted token."""

    text: str
    before: float
    """KL in nats from the prediction with the instruction to the base model's without it."""
    after: float
    """The same, now."""
    answer: bool
    """False for the assistant header, which is given at inference and not predicted."""

    @property
    def shown(self) -> str:
        """The text with what cannot be seen, or would steer a terminal or turn the reading direction, made visible."""
        return "".join(map(_visible, self.text))


def _visible(character: str) -> str:
    if character in "\n\t":
        return "⏎" if character == "\n" else "⇥"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return f"\\u{ord(character):04x}"
    return character


def ansi(tokens: Sequence[Token], which: Literal["before", "after"]) -> str:
    """A line for a terminal of 256 colours, in which tokens glow by their KL."""
    parts = []
    for token in tokens:
        nats = getattr(token, which)
        colour = next((colour for least, colour in _LEVELS if nats >= least), None)
        parts.append(f"\x1b[38;5;16;48;5;{colour}m{token.shown}\x1b[0m" if colour else token.shown)
    return "".join(parts)


def html(tokens: Sequence[Token], which: Literal["before", "after"]) -> str:
    """Spans whose backgrounds glow by KL, on light and dark pages alike; the assistant header is dimmed. Escaped."""
    parts = []
    for token in tokens:
        strength = min(getattr(token, which) / _FULL, 1.0) * 70
        dimmed = "" if token.answer else ";opacity:.5"
        parts.append(
            f'<span style="background:rgb(240 120 20 / {strength:.0f}%){dimmed}" '
            f'title="before {token.before:.3f}, now {token.after:.3f} nats">{escape(token.shown)}</span>'
        )
    return "".join(parts)
