"""What an adapter's file may do to a model: fill the adapter's factors, and nothing else.

PEFT reads the file and leaves what does not fit to `load_state_dict`, under which a tensor with a base weight's name
would replace that weight. Adapters come from strangers, so here every tensor is checked first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn


def refuse_pickles(model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> None:
    """Refuse an adapter whose weights are only there as a pickle (`adapter_model.bin`), before PEFT would load it.

    Args:
        model_id, subfolder: a folder, or a repository's id on the Hub.
        hub: what else says where on the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: there is a pickle and no safetensors file.
    """
    folder = Path(model_id, subfolder or "")
    local = (folder / CONFIG_NAME).is_file()
    offline = constants.HF_HUB_OFFLINE or hub.get("local_files_only")

    def there(name: str) -> bool:
        if local:
            return (folder / name).is_file()
        path = f"{subfolder}/{name}" if subfolder else name
        if offline:
            cached = try_to_load_from_cache(model_id, path, hub.get("cache_dir"), hub.get("revision"))
            return isinstance(cached, str)
        return file_exists(model_id, path, revision=hub.get("revision"), token=hub.get("token"))

    if not there(SAFETENSORS_WEIGHTS_NAME) and there(WEIGHTS_NAME):
        raise ValueError(
            f"{model_id} has its weights in {WEIGHTS_NAME}, a pickle, which can run code; QF adapters are loaded from "
            f"{SAFETENSORS_WEIGHTS_NAME} only: ask for it from whoever made the adapter"
        )


def hub_id(name: str | None) -> str | None:
    """A model's name if it is one of the Hub's; None if it is a folder, or no name at all."""
    if not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def fit(model: nn.Module, config: PeftConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors that are to become an adapter's factors, and give the adapter's layers their rank.

    Args:
        model: the model around the layers.
        config: the adapter's.
        adapter_name: its name.
        tensors: by the model's own names: `<module>.lora_A.<adapter_name>.weight` (r, d_in) and `lora_B` (d_out, r).

    Raises:
        ValueError: a tensor belongs to no target module, is not a matrix of floating-point numbers of the right shape,
            or holds a value that is not finite in the layer's dtype. The message names it. A tensor that is missing
            is PEFT's to warn of.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}
    names = {f"{n}.{part}.{adapter_name}.weight": (n, part) for n in layers for part in ("lora_A", "lora_B")}
    if extra := sorted(tensors.keys() - names.keys()):
        shown = ", ".join(repr(name) for name in extra[:5]) + (", …" if len(extra) > 5 else "")
        raise ValueError(
            f"the adapter {adapter_name!r}: {len(extra)} of its tensors belong to no target module of "
            f"{type(model).__name__} ({shown}); a QF adapter has two factors for each target module and nothing else. "
            "Load it on the base model that it was made for; if it was saved with save_embedding_layers, save it "
            "again without"
        )
    for name, tensor in tensors.items():
        module, part = names[name]
        weight = getattr(layers[module], part)[adapter_name].weight
        rank = config.r
        shape = (rank, weight.shape[1]) if part == "lora_A" else (weight.shape[0], rank)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the adapter {adapter_name!r}: {module}.{part} has shape {tuple(tensor.shape)}; with r={rank} and "
                f"this model's layer it must be {shape}. The file does not fit its configuration, or the adapter was "
                "made for another base model"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"the adapter {adapter_name!r}: {module}.{part} is of {tensor.dtype}, not floating point")
        if not bool(torch.isfinite(tensor.to(weight.dtype)).all()):
            raise ValueError(
                f"the adapter {adapter_name!r}: {module}.{part} holds values that are not finite in the layer's "
                f"{weight.dtype}; the file is broken, or needs a base model of a wider dtype"
            )
    for layer in layers.values():
        if layer.r[adapter_name] != config.r:  # made small, because nothing vouched for so large a rank yet
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            put_factors(layer, adapter_name, a.new_zeros(config.r, a.shape[1]), b.new_zeros(b.shape[0], config.r))


def put_factors(layer: LoraLayer, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Replace an adapter's factors in one layer by A (r, d_in) and B (d_out, r), whatever rank it had."""
    rank = a.shape[0]
    for part, weight in ((layer.lora_A[adapter_name], a), (layer.lora_B[adapter_name], b)):
        part.weight = nn.Parameter(weight, part.weight.requires_grad)
    layer.lora_A[adapter_name].out_features = layer.lora_B[adapter_name].in_features = rank
    layer.r[adapter_name] = layer.lora_alpha[adapter_name] = rank
    layer.scaling[adapter_name] = 1.0
