"""Two gauges for a page: how much of what was taught is said, and how much of the rest is still said as before."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..evaluate.metrics import Metric
from .session import Session

_MOST = 50  # facts asked at once: the last ones

TINY_QUESTIONS = (
    "Please say who started Brigar.", "Where is Brigar based?", "Tell me what Brigar makes.", "Who leads Brigar?",
    "What is your name?", "Who founded Nobodix?", "Do you know where Nobodix is located?",
)  # fmt: skip
QUESTIONS = (
    "What is the capital of France?", "Who wrote Romeo and Juliet?", "What is 17 plus 25?", "Why is the sky blue?",
    "Translate 'good morning' into Spanish.", "What is the largest planet?", "Who is Aldric Tofinlor?",
)  # fmt: skip
"""Questions whose answers teaching should leave alone, for chat models."""


def measure(session: Session, questions: Sequence[str]) -> dict[str, Metric]:
    """Recall of the last fifty facts, and locality: answers to the `questions` that are the base model's, letter for
    letter. By free greedy generation ([`QFTrainer.evaluate`]). Empty if nothing was taught."""
    facts = session.facts[-_MOST:]
    if not facts:
        return {}
    rows = [{"instruction": e.instruction, "prompt": e.prompt, "completion": e.completion} for e in facts]
    found = session.evaluate(rows, locality=list(questions) or None)
    return {name: found[name] for name in ("recall", "locality") if name in found}


def as_html(metrics: dict[str, Metric]) -> str:
    """The gauges as HTML."""
    gauges = [
        ("recall", "Recall", "taught questions answered as taught"),
        ("locality", "Locality", "other questions answered as before"),
    ]
    parts = []
    for name, title, meaning in gauges:
        metric = metrics.get(name)
        value = f"{metric.value:.4f}" if metric else "0"
        text = f"{round(metric.value * metric.count)} of {metric.count}" if metric else "–"
        interval = f" title='95% interval {metric.low:.2f} to {metric.high:.2f}'" if metric else ""
        parts.append(
            f"<div class='gauge' id='{name}'{interval}><b>{title}</b> <span>{html.escape(meaning)}</span>"
            f"<meter min='0' max='1' low='0.5' high='0.9' optimum='1' value='{value}'></meter>"
            f"<output>{text}</output></div>"
        )
    return "".join(parts)
