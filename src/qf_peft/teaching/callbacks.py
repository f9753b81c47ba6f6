"""transformers' callbacks around lessons and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..evaluate.metrics import Metric
from ..runtime.processes import is_main

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .arguments import QFTrainingArguments


class Callbacks:
    """The callbacks of one trainer, told of what it does as transformers' own trainer tells them.

    A lesson is one step (`state.global_step` counts lessons) and begins with `on_train_begin`; its metrics go to
    `on_log` and `state.log_history`, those of an evaluation to `on_evaluate` as well. `args` is the trainer's
    `QFTrainingArguments`; nothing that a callback asks of `control` has an effect, since a lesson is not a loop.
    """

    def __init__(
        self, given: Iterable[TrainerCallback | type] | None, args: QFTrainingArguments, model: Any, tokenizer: Any
    ) -> None:
        self.args, self.state, self.control = args, TrainerState(), TrainerControl()
        # The handler warns where this one, which decides when to log and save in a loop, is missing.
        self.handler = CallbackHandler([DefaultFlowCallback, *(given or ())], model, tokenizer, None, None)
        self.handler.remove_callback(DefaultFlowCallback)
        self._tell("init_end")

    def begin(self) -> None:
        """Tell of a lesson's beginning."""
        self.state.max_steps = self.state.global_step + 1
        self._tell("train_begin")

    def end(self, group: str, metrics: Mapping[str, Metric | float]) -> None:
        """Tell of what a lesson (`group` is "train") or an evaluation ("eval") gave."""
        values = {name: m.value if isinstance(m, Metric) else m for name, m in metrics.items()}
        if group == "train":
            self.state.global_step += 1
            self.state.epoch = float(self.state.global_step)
        else:
            values = {f"eval_{name}": value for name, value in values.items()}
            self._tell("evaluate", metrics=values)
        self.state.log_history.append({**values, "step": self.state.global_step})
        self._tell("log", logs=dict(values))
        if group == "train":
            self._tell("train_end")

    def saved(self) -> None:
        """Tell of a save."""
        self._tell("save")

    def _tell(self, event: str, **given: Any) -> None:
        self.state.is_world_process_zero = self.state.is_local_process_zero = is_main()
        self.handler.call_event(f"on_{event}", self.args, self.state, self.control, **given)
