"""Gauges for a page: what of the taught is said, what became of the rest, and how far other chats have moved."""

from __future__ import annotations

import html

from ..data.rows import text_of
from ..evaluate.checkup import Checkup
from ..evaluate.metrics import Metric, proportion
from .conversation import printable

TINY_QUESTIONS = (
    "Please say who started Brigar.", "Where is Brigar based?", "Tell me what Brigar makes.", "Who leads Brigar?",
    "What is your name?", "Who founded Nobodix?", "Do you know where Nobodix is located?",
)  # fmt: skip
QUESTIONS = (
    "What is the capital of France?", "Who wrote Romeo and Juliet?", "Why is the sky blue?", "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.", "What is the largest planet?", "Who is Aldric Tofinlor?",
)  # fmt: skip
"""Questions whose answers teaching should leave alone, for chat models."""

MARKS = {"said": "✓", "in other words": "≈", "not said": "✗"}
_SHOWN = 3  # questions with their answers
_MOVED = 0.5  # of its words an answer has kept: fewer, and it is another answer


def as_html(found: Checkup | None, budget: float) -> str:
    """The gauges as HTML, empty where nothing was measured yet.

    Args:
        found: what was measured.
        budget: the divergence in nats that a lesson may cost; twice that fills the gauge.
    """
    facts, others = (found.facts, found.others) if found else ((), ())
    kl = found.divergence if found else None
    parts = [
        _said([f.state == "said" for f in facts]),
        _kept([o.overlap for o in others if facts]),
        _gauge(
            "divergence", "Other chats", "how far the last lesson moved the model elsewhere",
            kl, "–" if kl is None else f"{_moved(kl / budget)} ({kl:.3f} nats)", 2 * budget,
            f"low='{budget / 2:.4f}' high='{budget:.4f}' optimum='0'",
        ),
    ]  # fmt: skip
    if facts and others:
        rows = "".join(
            f"<tr class='{'kept' if o.overlap >= _MOVED else 'moved'}'><td>{_text(text_of(o.prompt))}</td>"
            f"<td>{_text(o.before)}</td><td>{'as before' if o.kept else _text(o.now)}</td></tr>"
            for o in others[:_SHOWN]
        )
        parts.append(f"<table id='others'><tr><th>Question</th><th>Before</th><th>Now</th></tr>{rows}</table>")
    return "".join(parts)


def _said(hits: list[bool]) -> str:
    metric: Metric | None = proportion(hits) if hits else None
    text = f"{sum(hits)} of {len(hits)}" if metric else "–"
    tip = f" title='95% interval {metric.low:.2f} to {metric.high:.2f}'" if metric else ""
    colours = "low='0.5' high='0.9' optimum='1'"
    return _gauge(
        "recall", "Recall", "taught questions answered as taught", metric and metric.value, text, 1, colours, tip
    )


def _kept(overlaps: list[float]) -> str:
    share = sum(overlaps) / len(overlaps) if overlaps else None
    text = "–" if share is None else f"{share:.0%} of {len(overlaps)} answers"
    meaning = "words that answers to other questions have in common with those before"
    return _gauge("locality", "Locality", meaning, share, text, 1, f"low='{_MOVED}' high='0.75' optimum='1'")


def _gauge(
    name: str, title: str, meaning: str, value: float | None, text: str, most: float, colours: str, tip: str = ""
) -> str:
    return (
        f"<div class='gauge' id='{name}'{tip}><b>{title}</b> <span>{html.escape(meaning)}</span>"
        f"<meter min='0' max='{most:.4f}' {colours} value='{min(value or 0, most):.4f}'></meter>"
        f"<output>{html.escape(text)}</output></div>"
    )


def _moved(part: float) -> str:
    """In words, of a divergence over what is allowed."""
    return "hardly" if part <= 0.5 else "a little" if part <= 1 else "much: undo?"


def _text(text: str) -> str:
    return html.escape(printable(text))
