"""Everything of PEFT that is changed, because PEFT has no hook for it. Adapters of other types meet what they met.

`tests/test_peft_patches.py` has a test for each that fails once PEFT makes it needless.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it if it is not there.

    `PeftType` is a closed enum, and `register_peft_method` refuses names that are not in it.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)  # EnumType's own __setattr__ is for ordinary attributes
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def patch() -> None:
    """Wrap the three methods of `PeftModel` below. Doing it again changes nothing."""
    for name, wrap in (
        ("create_or_update_model_card", _with_card),
        ("push_to_hub", _with_push),
        ("save_pretrained", _with_save),
    ):
        method = getattr(PeftModel, name)
        method = getattr(method, "before_qf_peft", method)  # this package may have been loaded before
        wrapped = wrap(method)
        wrapped.before_qf_peft = method
        setattr(PeftModel, name, wrapped)


def _with_card(saved: Any) -> Any:
    """A tuner is not asked for the card of its adapters, and PEFT's says nothing of what a QF adapter holds."""

    @functools.wraps(saved)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        from .share.card import model_card, save_card

        # `save_pretrained` puts the adapter named default there, the others into folders.
        adapter = "default" if "default" in self.peft_config else self.active_adapters[0]
        if not _is_qf(self, adapter):
            return saved(self, output_dir)
        return save_card(model_card(self, adapter_name=adapter), output_dir)

    return create_or_update_model_card


def _with_push(pushed: Any) -> Any:
    """`push_to_hub` is transformers' own: it puts a card over the adapter's that names the wrong library and no base
    model, and pushes the taught texts."""

    @functools.wraps(pushed)
    def push_to_hub(self: PeftModel, repo_id: str, *, max_shard_size: int | str | None = None, **options: Any) -> Any:
        from .share.hub import logger
        from .share.hub import push_to_hub as push_qf

        active = self.active_adapters
        if not _is_qf(self, active[0]):
            if max_shard_size is not None:
                options["max_shard_size"] = max_shard_size
            return pushed(self, repo_id, **options)
        if len(self.peft_config) > 1:
            logger.warning(f"one adapter is pushed, the active one ({active}), of {list(self.peft_config)}")
        return push_qf(self, repo_id, **options)

    return push_to_hub


def _with_save(saved: Any) -> Any:
    """`save_pretrained` writes its files in place, one after the other, and a tuner has none of its own in them: a save
    that is broken off would leave weights of one time beside a ledger of another."""

    @functools.wraps(saved)
    def save_pretrained(self: PeftModel, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
        from .adapter.saving import save_at_once

        given = inspect.signature(saved).bind(self, save_directory, *args, **options).arguments
        names = given.get("selected_adapters") or list(self.peft_config)
        main = given.get("is_main_process", True)
        if not all(_is_qf(self, name) for name in names) or not main or Path(save_directory).is_file():
            return saved(self, save_directory, *args, **options)
        return save_at_once(self, save_directory, names, saved, *args, **options)

    return save_pretrained


def _is_qf(model: PeftModel, adapter: str) -> bool:
    return getattr(model.peft_config.get(adapter), "peft_type", None) == "QF"
