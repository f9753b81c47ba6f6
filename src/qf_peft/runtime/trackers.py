"""Metrics sent to experiment trackers (TensorBoard, Weights & Biases, MLflow, …) through accelerate's."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

PROJECT = "qf_peft"


class Trackers:
    """One run with every tracker asked for; it is begun with the first metrics.

    Trackers named by a string are finished when this object goes or Python ends; a user's own tracker objects are the
    user's to finish. Only the main process of several reports.

    Args:
        report_to: `QFTrainingArguments.report_to`.
        settings: what the run is begun with.

    Raises:
        ValueError: a tracker is unknown, or its package is not installed.
    """

    def __init__(self, report_to: Any, settings: Mapping[str, Any]) -> None:
        wanted = list(report_to) if isinstance(report_to, (list, tuple)) else [report_to]
        self._step = 0
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR", "runs")  # as transformers' trainer has it
        try:
            self._accelerator = Accelerator(log_with=wanted, project_dir=os.path.expanduser(folder))  # noqa: PTH111
        except ValueError as error:
            raise ValueError(f"report_to={report_to!r}: {error}") from error
        there = [str(tracker) for tracker in self._accelerator.log_with if not isinstance(tracker, GeneralTracker)]
        for name in wanted:
            if not isinstance(name, GeneralTracker) and name != "all" and str(name) not in there:
                raise ValueError(
                    f"report_to={report_to!r}: {name} is not installed; `pip install {name}`, or leave it out"
                )
        self._accelerator.init_trackers(PROJECT, config=dict(settings))
        ours = [t for t in self._accelerator.trackers if not any(t is given for given in wanted)]
        # Not `end_training`, which would end the process group of a distributed run too.
        weakref.finalize(self, _finish, ours)

    def log(self, group: str, metrics: Mapping[str, Any]) -> None:
        """Report metrics, numbers or means with intervals, as `group/name`; the ends of an interval as
        `group/name_low` and `group/name_high`."""
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if hasattr(value, "low"):
                values[f"{group}/{name}"] = value.value
                values[f"{group}/{name}_low"], values[f"{group}/{name}_high"] = value.low, value.high
            else:
                values[f"{group}/{name}"] = value
        self._accelerator.log(values, step=self._step)
        self._step += 1


def _finish(trackers: list[GeneralTracker]) -> None:
    for tracker in trackers:
        tracker.finish()
