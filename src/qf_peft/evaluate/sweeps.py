"""Recall against locality over the strength of preservation λ."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.ledger import question_key
from .known import known_rows
from .metrics import Metric
from .plots import lines
from .subject import Subject


@dataclass(frozen=True)
class Sweep:
    """The same facts taught at several strengths of preservation."""

    strengths: tuple[float, ...]
    metrics: tuple[dict[str, Metric | float], ...]
    """What [`QFTrainer.evaluate`] returned at each."""
    lessons: tuple[dict[str, float], ...]
    """What [`QFTrainer.train`] returned at each."""

    def svg(self) -> str:
        """Recall, paraphrases, locality and unknown over λ, with intervals."""
        names = [n for n in ("recall", "paraphrase", "locality", "unknown") if n in self.metrics[0]]
        series = {name: [metrics[name] for metrics in self.metrics] for name in names}
        labels = [f"{strength:g}" for strength in self.strengths]
        return lines("Recall and locality over the strength of preservation", labels, series, "preserve_strength")

    _repr_svg_ = svg


@torch.no_grad()
def strength_sweep(
    trainer: Subject,
    strengths: Iterable[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    locality: Iterable[Any] | None = None,
    unknown: Iterable[Any] | None = None,
) -> Sweep:
    """Teach everything anew, as in one lesson, at each `preserve_strength`, and evaluate it: what recall costs.

    As slow as so many lessons. The adapter, its ledger and the versions for `rollback` are put back as they were, bit
    for bit, also when this is interrupted.

    Args:
        trainer: whose rows, settings and adapter.
        strengths: values of `QFTrainingArguments.preserve_strength`.
        locality, unknown: as in [`QFTrainer.evaluate`].

    Raises:
        ValueError: a strength is out of range, there are none, or nothing to teach.
    """
    strengths = tuple(strengths)
    if not strengths:
        raise ValueError("strengths is empty; give some values of preserve_strength, such as (0.3, 1, 3)")
    settings = [replace(trainer.args, preserve_strength=s) for s in strengths]
    unrelated = {name: list(asks) for name, asks in (("locality", locality), ("unknown", unknown)) if asks is not None}
    with trainer.tuner.serving.changing():  # else other threads would meet the adapters tried in between
        metrics, lessons = _tried(trainer, settings, unrelated)
    return Sweep(strengths, tuple(metrics), tuple(lessons))


def _tried(trainer: Subject, settings: list[Any], unrelated: dict[str, list[Any]]) -> tuple[list[dict], list[dict]]:
    """The evaluation and the lesson's metrics under each of the settings; then all is put back."""
    rows, tuner, adapter = known_rows(trainer), trainer.tuner, trainer.adapter_name
    paraphrases = {
        question_key(row): raw.get("paraphrases") for row, raw in zip(trainer.rows, trainer.dataset, strict=True)
    }
    twin = copy.copy(trainer)
    twin.trackers = None
    twin.rows, twin.dataset = rows, [{"paraphrases": paraphrases.get(question_key(row))} for row in rows]
    version, versions = tuner.version(adapter), tuner.versions.get(adapter)
    lessons, metrics = [], []
    try:
        for args in settings:
            twin.args = args
            twin.forget(lambda entry: True)
            lessons.append(twin.train())
            metrics.append(twin.evaluate(**unrelated))
    finally:
        tuner.restore(adapter, version)
        tuner.versions.pop(adapter, None)
        if versions is not None:
            tuner.versions[adapter] = versions
    return metrics, lessons
