"""QF adapters for PEFT: knowledge from a prompt into the weights, solved in closed form from forward activations."""

from . import logs
from .registration import register

logs.configure()
register()

from .card import model_card  # noqa: E402
from .config import QFConfig  # noqa: E402
from .hub import push_to_hub  # noqa: E402
from .joining import interference, merge_taught  # noqa: E402
from .model import QFModel  # noqa: E402
from .portable import save_as_lora  # noqa: E402
from .portable_check import check_portable  # noqa: E402
from .records import (  # noqa: E402
    rows_from_counterfact,
    rows_from_easyedit,
    rows_from_knowedit,
    rows_from_requests,
    rows_from_zsre,
)
from .seeing import layer_shares, retention, token_divergences  # noqa: E402
from .strengths import strength_sweep  # noqa: E402
from .tiny import TINY_MODEL  # noqa: E402
from .trainer import QFTrainer  # noqa: E402
from .training_args import QFTrainingArguments  # noqa: E402

__all__ = [
    "QFConfig", "QFModel", "QFTrainer", "QFTrainingArguments", "TINY_MODEL", "check_portable", "interference",
    "layer_shares", "merge_taught", "model_card", "push_to_hub", "retention", "rows_from_counterfact",
    "rows_from_easyedit", "rows_from_knowedit", "rows_from_requests", "rows_from_zsre", "save_as_lora",
    "strength_sweep", "token_divergences",
]  # fmt: skip
