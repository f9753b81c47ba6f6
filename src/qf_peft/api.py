"""Everything public of `qf_peft`; importing it registers QF with PEFT."""

from .adapter.registration import register
from .adapter.saving import save_at_once
from .runtime import logs
from .share.hub import describe_rightly

logs.configure()
register()
save_at_once()
describe_rightly()

from .adapter.config import QFConfig  # noqa: E402
from .adapter.joining import interference, merge_taught  # noqa: E402
from .adapter.model import QFModel  # noqa: E402
from .app.session import Session  # noqa: E402
from .app.tiny import TINY_MODEL  # noqa: E402
from .data.records import (  # noqa: E402
    rows_from_counterfact,
    rows_from_easyedit,
    rows_from_knowedit,
    rows_from_mquake,
    rows_from_qaedit,
    rows_from_requests,
    rows_from_wikibigedit,
    rows_from_zsre,
)
from .documents.facts import DocumentFacts, facts_from_document, read_review, write_review  # noqa: E402
from .documents.wordings import with_wordings  # noqa: E402
from .evaluate.retention import retention  # noqa: E402
from .evaluate.shares import layer_shares  # noqa: E402
from .evaluate.sweeps import strength_sweep  # noqa: E402
from .evaluate.token_divergences import token_divergences  # noqa: E402
from .share.card import model_card  # noqa: E402
from .share.hub import push_to_hub  # noqa: E402
from .share.lora_check import check_portable  # noqa: E402
from .share.lora_export import save_as_lora  # noqa: E402
from .teaching.arguments import QFTrainingArguments  # noqa: E402
from .teaching.trainer import QFTrainer  # noqa: E402

__all__ = [
    "DocumentFacts", "QFConfig", "QFModel", "QFTrainer", "QFTrainingArguments", "Session", "TINY_MODEL",
    "check_portable", "facts_from_document", "interference", "layer_shares", "merge_taught", "model_card",
    "push_to_hub", "read_review", "retention", "rows_from_counterfact", "rows_from_easyedit", "rows_from_knowedit",
    "rows_from_mquake", "rows_from_qaedit", "rows_from_requests", "rows_from_wikibigedit", "rows_from_zsre",
    "save_as_lora", "strength_sweep", "token_divergences", "with_wordings", "write_review",
]  # fmt: skip
