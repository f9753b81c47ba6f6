"""Everything public of `qf_peft`; importing it registers QF with PEFT."""

from . import logs
from .registration import register

logs.configure()
register()

from .card import model_card  # noqa: E402
from .config import QFConfig  # noqa: E402
from .documents import DocumentFacts, facts_from_document, read_review, write_review  # noqa: E402
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
from .session import Session  # noqa: E402
from .strengths import strength_sweep  # noqa: E402
from .tiny import TINY_MODEL  # noqa: E402
from .trainer import QFTrainer  # noqa: E402
from .training_args import QFTrainingArguments  # noqa: E402
from .wordings import with_wordings  # noqa: E402

__all__ = [
    "DocumentFacts", "QFConfig", "QFModel", "QFTrainer", "QFTrainingArguments", "Session", "TINY_MODEL",
    "check_portable", "facts_from_document", "interference", "layer_shares", "merge_taught", "model_card",
    "push_to_hub", "read_review", "retention", "rows_from_counterfact", "rows_from_easyedit", "rows_from_knowedit",
    "rows_from_requests", "rows_from_zsre", "save_as_lora", "strength_sweep", "token_divergences", "with_wordings",
    "write_review",
]  # fmt: skip
