"""What an adapter is of, in words: its base model, its blocks, and the versions it was made with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from ..forward.blocks import block_of, split_path
from .loading import hub_id


def base_model_id(model: PeftModel, adapter: str, given: str | None = None) -> str | None:
    """The base model's id on the Hub: the one given, or the name it was loaded by; None if that is a folder's.

    Raises:
        ValueError: the one given is no id.
    """
    if given is not None:
        validate_repo_id(given)
        return given
    return hub_id(model.peft_config[adapter].base_model_name_or_path) or hub_id(
        getattr(model.get_base_model(), "name_or_path", None)
    )


def blocks_in_words(names: list[str]) -> str:
    """The target modules in words: "`mlp.down_proj` of blocks 0 to 7"."""
    inside = [name for name in names if block_of(name) >= 0]
    outside = ", ".join(f"`{name}`" for name in sorted({*names} - {*inside}))
    if not inside:
        return outside or "no linear module"
    suffixes = sorted({split_path(name)[2] for name in inside})
    indices = sorted({split_path(name)[1] for name in inside})
    run = indices == list(range(indices[0], indices[-1] + 1)) and len(indices) > 2
    blocks = f"{indices[0]} to {indices[-1]}" if run else ", ".join(map(str, indices))
    modules = ", ".join(f"`{suffix}`" for suffix in suffixes)
    where = f"{modules} of {'block' if len(indices) == 1 else 'blocks'} {blocks}"
    return f"{where}, and {outside}" if outside else where


def versions() -> Iterable[tuple[str, str]]:
    for name in ("qf-peft", "peft", "transformers", "torch"):
        try:
            yield name, version(name).split("+")[0]
        except PackageNotFoundError:  # run from its sources
            continue
