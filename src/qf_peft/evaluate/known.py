"""All rows that an adapter's measurements speak of: the ledger's and the trainer's own."""

from __future__ import annotations

from ..data.ledger import question_key
from ..data.rows import Row
from .subject import Subject


def known_rows(subject: Subject) -> list[Row]:
    """All that the adapter was taught, in the ledger's order, and the trainer's own rows: in the place of what the
    ledger has for the same prompt, else behind it. Those without a completion the base model answers in context.

    Raises:
        ValueError: there is nothing of either.
    """
    rows = {question_key(e): e.row() for e in subject.facts}
    with subject.asking() as progress:
        rows.update(
            {question_key(row): row for row in (subject.completed(progress, subject.rows) if subject.rows else [])}
        )
    if not rows:
        raise ValueError("there is nothing to show: the adapter's ledger is empty and train_dataset is missing")
    return list(rows.values())
