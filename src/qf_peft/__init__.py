"""QF adapters for PEFT: knowledge from a prompt into the weights, solved in closed form from forward activations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .app.tiny import TINY_MODEL
from .registration import register_when_imported

if TYPE_CHECKING:
    from .adapter.config import QFConfig
    from .adapter.joining import interference, merge_taught
    from .adapter.model import QFModel
    from .app.session import Session
    from .data.records import (
        rows_from_counterfact,
        rows_from_easyedit,
        rows_from_knowedit,
        rows_from_mquake,
        rows_from_qaedit,
        rows_from_requests,
        rows_from_wikibigedit,
        rows_from_zsre,
    )
    from .documents.facts import DocumentFacts, facts_from_document, read_review, write_review
    from .documents.wordings import with_wordings
    from .evaluate.attribution import Attribution, Explanation
    from .evaluate.retention import retention
    from .evaluate.shares import layer_shares
    from .evaluate.sweeps import strength_sweep
    from .evaluate.token_divergences import token_divergences
    from .share.card import model_card
    from .share.hub import push_to_hub
    from .share.lora_check import check_portable
    from .share.lora_export import export_lora, save_as_lora
    from .teaching.arguments import QFTrainingArguments
    from .teaching.own_loop import teach
    from .teaching.preserved_statistics import PreservedStatistics
    from .teaching.trainer import QFTrainer

# Where the names are, which are looked up when they are first used: torch and transformers take seconds to import.
_WHERE = {
    name: module
    for module, names in {
        "adapter.config": "QFConfig",
        "adapter.joining": "interference merge_taught",
        "adapter.model": "QFModel",
        "app.session": "Session",
        "data.records": "rows_from_counterfact rows_from_easyedit rows_from_knowedit rows_from_mquake rows_from_qaedit "
        "rows_from_requests rows_from_wikibigedit rows_from_zsre",
        "documents.facts": "DocumentFacts facts_from_document read_review write_review",
        "documents.wordings": "with_wordings",
        "evaluate.attribution": "Attribution Explanation",
        "evaluate.retention": "retention",
        "evaluate.shares": "layer_shares",
        "evaluate.sweeps": "strength_sweep",
        "evaluate.token_divergences": "token_divergences",
        "share.card": "model_card",
        "share.hub": "push_to_hub",
        "share.lora_check": "check_portable",
        "share.lora_export": "export_lora save_as_lora",
        "teaching.arguments": "QFTrainingArguments",
        "teaching.own_loop": "teach",
        "teaching.preserved_statistics": "PreservedStatistics",
        "teaching.trainer": "QFTrainer",
    }.items()
    for name in names.split()
}

__all__ = [
    "Attribution",
    "DocumentFacts",
    "Explanation",
    "PreservedStatistics",
    "QFConfig",
    "QFModel",
    "QFTrainer",
    "QFTrainingArguments",
    "Session",
    "TINY_MODEL",
    "check_portable",
    "export_lora",
    "facts_from_document",
    "interference",
    "layer_shares",
    "merge_taught",
    "model_card",
    "push_to_hub",
    "read_review",
    "retention",
    "rows_from_counterfact",
    "rows_from_easyedit",
    "rows_from_knowedit",
    "rows_from_mquake",
    "rows_from_qaedit",
    "rows_from_requests",
    "rows_from_wikibigedit",
    "rows_from_zsre",
    "save_as_lora",
    "strength_sweep",
    "teach",
    "token_divergences",
    "with_wordings",
    "write_review",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("peft")  # before the module that needs it, so that it finds QF registered
    globals()[name] = value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
