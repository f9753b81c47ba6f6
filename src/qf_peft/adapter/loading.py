"""What an adapter's file may do to a model: fill the adapter's factors, and nothing else.

PEFT reads the file and leaves what does not fit to `load_state_dict`, under which a tensor with a base weight's name
would replace that weight. Adapters come from strangers, so here every tensor is checked first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


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
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in factored(m)}
    names = {f"{n}.{part}.{adapter_name}.weight": (n, part) for n in layers for part in ("lora_A", "lora_B")}
    others = _own(model, config, adapter_name)
    if extra := sorted(tensors.keys() - names.keys() - others.keys()):
        shown = ", ".join(repr(name) for name in extra[:5]) + (", …" if len(extra) > 5 else "")
        raise ValueError(
            f"the adapter {adapter_name!r}: {len(extra)} of its tensors belong to no target module of "
            f"{type(model).__name__} ({shown}); a QF adapter has two factors for each target module and what its "
            "configuration names besides, nothing else. Load it on the base model that it was made for; if it was "
            "saved with save_embedding_layers, save it again without"
        )
    for name, tensor in tensors.items():
        if name in names:
            module, part = names[name]
            weight, rank = getattr(layers[module], part)[adapter_name].weight, rank_of(config, module)
            shape = (rank, weight.shape[1]) if part == "lora_A" else (weight.shape[0], rank)
            _check(tensor, f"{module}.{part}", shape, weight.dtype, f"r={rank} and ", adapter_name)
        else:
            _check(tensor, name, tuple(others[name].shape), others[name].dtype, "", adapter_name)
    for name, layer in layers.items():
        rank = rank_of(config, name)
        if layer.r[adapter_name] != rank:  # made small, because nothing vouched for so large a rank yet
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            factors = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
            put_factors(layer, adapter_name, *factors, alpha_of(config, name))


def _own(model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, Tensor]:
    """What else is the adapter's by its configuration, by name: factors of modules that are not linear, copies of
    `modules_to_save`, new tokens' embeddings, biases."""
    found, biased = {}, []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
            for name, tensor in module.state_dict().items():
                if adapter_name in name.split("."):
                    found[prefix + name] = tensor
        if config.bias == "all" or (config.bias == "lora_only" and isinstance(module, LoraLayer)):
            biased.append(prefix)
    state = model.state_dict() if biased else {}
    biases = {f"{prefix}{name}" for prefix in biased for name in ("bias", "base_layer.bias")}
    return {**found, **{name: state[name] for name in biases & state.keys()}}


def _check(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, given: str, adapter_name: str
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"the adapter {adapter_name!r}: {name} has shape {tuple(tensor.shape)}; with {given}this model's layer it "
            f"must be {shape}. The file does not fit its configuration, or the adapter was made for another base model"
        )
    if not dtype.is_floating_point and tensor.dtype == dtype:
        return  # a counter, say, of a module that is saved whole
    if not tensor.is_floating_point():
        raise ValueError(f"the adapter {adapter_name!r}: {name} is of {tensor.dtype}, not floating point")
    if not tensor.is_meta and not bool(torch.isfinite(tensor.to(dtype)).all()):
        raise ValueError(
            f"the adapter {adapter_name!r}: {name} holds values that are not finite in the layer's {dtype}; the file "
            "is broken, or needs a base model of a wider dtype"
        )


def factored(layer: LoraLayer) -> dict[str, nn.Module]:
    """By adapter name, a layer's factors A beside a linear module; none where the module is of another kind."""
    return {name: part for name, part in layer.lora_A.items() if isinstance(part, nn.Linear)}


def rank_of(config: PeftConfig, name: str) -> int:
    """The rank that a configuration gives a module's factors."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)


def alpha_of(config: PeftConfig, name: str) -> float:
    """The `lora_alpha` that a configuration gives a module."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)


def scale_of(layer: LoraLayer, adapter_name: str, alpha: float, rank: int) -> float:
    """How often the product of factors counts, as in LoRA."""
    return alpha / (math.sqrt(rank) if layer.use_rslora.get(adapter_name) else rank)


def put_factors(layer: LoraLayer, adapter_name: str, a: Tensor, b: Tensor, alpha: float) -> None:
    """Replace an adapter's factors in one layer by A (r, d_in) and B (d_out, r), whatever rank it had. Their product
    counts `alpha` / r times."""
    rank = a.shape[0]
    for part, weight in ((layer.lora_A[adapter_name], a), (layer.lora_B[adapter_name], b)):
        part.weight = nn.Parameter(weight, part.weight.requires_grad)
    layer.lora_A[adapter_name].out_features = layer.lora_B[adapter_name].in_features = rank
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    layer.scaling[adapter_name] = scale_of(layer, adapter_name, alpha, rank)


def warn_of_another_base(model: nn.Module, config: LoraConfig) -> None:
    """Say so if the adapter names another model of the Hub than the one it is put into."""
    made_for, present = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if made_for != present and hub_id(made_for) and hub_id(present):
        logger.warning(
            f"the adapter was made for {made_for!r} and is put into {present!r}; what it was taught holds only for "
            "weights that (nearly) equal those it was made for"
        )
