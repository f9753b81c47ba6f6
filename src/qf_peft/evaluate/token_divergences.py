"""How far the model is, token by token, from what it says with the instruction: before lessons and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.rows import Row
from ..forward.unembedding import diverged, head_inputs
from .coloured import Token, ansi, html
from .known import known_rows
from .subject import Subject


@dataclass(frozen=True)
class TokenRow:
    """A row's predicted tokens, with how far the model is at each from the prediction it makes with the instruction."""

    row: Row
    tokens: tuple[Token, ...]

    @property
    def before(self) -> float:
        """Mean KL in nats over the answer's tokens, base model."""
        return _mean([token.before for token in self.tokens if token.answer])

    @property
    def after(self) -> float:
        """The same, now."""
        return _mean([token.after for token in self.tokens if token.answer])

    def __str__(self) -> str:
        """The tokens with their KL before and now as numbers."""
        return " ".join(f"{token.shown}({token.before:.2f}→{token.after:.2f})" for token in self.tokens)

    def ansi(self) -> str:
        """Two lines for a terminal of 256 colours: the more a token's background glows, the more it needed the
        instruction before, and needs it now."""
        return f"before {ansi(self.tokens, 'before')}\nnow    {ansi(self.tokens, 'after')}"

    def html(self) -> str:
        """The same as two lines of HTML, escaped; a token's numbers are its tooltip."""
        return (
            '<div style="font-family: monospace; white-space: pre-wrap; margin: .6em 0">'
            f"before {html(self.tokens, 'before')}<br>now    {html(self.tokens, 'after')}</div>"
        )

    _repr_html_ = html


@torch.no_grad()
def token_divergences(subject: Subject, rows: Sequence[Row] | None = None) -> list[TokenRow]:
    """For every predicted token of the taught rows the KL divergence, in nats, from the base model's prediction with
    the instruction in context to the prediction without it: by the base model (`before`) and by the model as it is now
    (`after`). A large first number is a token that needed the instruction; the second is what is left to be learnt.

    Three passes of the rows.

    Args:
        subject: whose rows and adapter.
        rows: by default [`known_rows`].

    Raises:
        ValueError: nothing was taught and there is nothing to teach.
    """
    rows = known_rows(subject) if rows is None else rows
    with subject.asking():
        examples = [subject.encoder.encode(row) for row in rows]
        positions, bare = [e.taught for e in examples], [e.bare_ids for e in examples]
        network, options = subject.network, subject.pass_options

        with subject.tuner.without_adapters():
            in_context = head_inputs(network, [e.context_ids for e in examples], positions, **options)
            before = diverged(network, bare, positions, in_context, **options)
        after = diverged(network, bare, positions, in_context, **options)
    found = []
    for row, example, old, new in zip(rows, examples, before.split(positions), after.split(positions), strict=True):
        texts = _pieces(subject.encoder.tokenizer, example.targets)
        answer = [k >= example.header for k in range(example.taught)]
        parts = zip(texts, old.tolist(), new.tolist(), answer, strict=True)
        found.append(TokenRow(row, tuple(Token(*part) for part in parts)))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character spread over several tokens belongs to its last one."""
    pieces, text = [], ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if longer.endswith("\ufffd"):
            pieces.append("\ufffd")
        else:
            pieces.append(longer[len(text) :] if longer.startswith(text) else tokenizer.decode([ids[end - 1]]))
            text = longer
    return pieces
