"""A QF adapter written as a LoRA adapter that every reader of LoRA files takes, without this package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from ..adapter.checks import portable_adapter
from ..adapter.factors import padded
from ..data.writing import saving_to
from ..forward.blocks import find_blocks, linear_shape, split_path
from ..runtime.devices import wide
from ..runtime.processes import by_main
from ..solve.least_squares import LowRankDelta
from .lora_check import LARGEST_RANK, SMALLEST_RANK, is_allowed
from .lora_gguf import write_gguf

logger = logging.get_logger(__name__)

FORMATS = ("peft", "mlx", "gguf")
MLX_WEIGHTS_NAME = "adapters.safetensors"
# What MLX-LM calls the list of blocks, by model type, where it is not `model.layers` in transformers.
_MLX_BLOCKS = {"gpt2": "model.h", "gpt_neox": "model.h"}


@by_main
@torch.no_grad()
def export_lora(
    model: PeftModel,
    directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    rank: int | None = None,
    all_layers: bool = False,
    format: Literal["peft", "mlx", "gguf"] = "peft",
) -> dict[str, Any]:
    """
    Write a QF adapter as a plain LoRA adapter, for PEFT without `qf_peft`, inference servers, llama.cpp or MLX-LM.

    The files keep to what all of them read: one rank for all modules, `lora_alpha = r`, no patterns, modules named by
    bare endings, safetensors. The factors of each module are Σ^½ Vᵀ and U Σ^½ of its change's singular value
    decomposition (found from the factors, the change itself is never formed), so that they are equally large, direction
    by direction, and servers may cast them to 16 bits. Nothing is lost but rounding if `rank` is left out.

    Args:
        model: a model with a QF adapter.
        directory: a folder; it is made if it does not exist. Files of the same names are replaced, others stay.
        adapter_name: which adapter; by default the active one.
        rank: 16, 32, 64, 128 or a larger power of two. A change that needs more is truncated to the nearest (in
            Frobenius norm) of this rank; one that needs less gets zeros. By default the smallest of these that loses
            nothing. Some servers refuse more than 128, and vLLM more than its `--max-lora-rank` (16 unless set).
        all_layers: write pairs of zeros for the same modules in the blocks that the adapter does not edit. Some
            servers (TGI, LoRAX) drop a kind of module that is not there in every block.
        format: "peft"; "mlx" for MLX-LM (`adapters.safetensors`, to be given as `--adapter-path`); or "gguf" for
            llama.cpp, Ollama and the like (`adapter.gguf`, to be given as `--lora` beside a GGUF file of the base).

    Returns:
        `rank` (as written), `needed_rank` (of the module that needs most), `loss` (‖ΔW − written‖ / ‖ΔW‖ over all
        modules, in Frobenius norm, rounding included), `module_losses` (the same by module name), `modules` (how many
        the adapter edits) and `zero_modules` (how many are written as zeros besides).

    Raises:
        ValueError: the model has no such QF adapter, it is merged, `rank` or `format` is not one of those above, or
            MLX-LM's or GGUF's names of the model's modules are not known.
        ImportError: `format="gguf"` without the package `gguf`.
        FileExistsError: the directory is a file, or holds an adapter of the other format.
        FloatingPointError: the adapter holds values that are not finite.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; expected one of {', '.join(FORMATS)}")
    if rank is not None and not is_allowed(rank, LARGEST_RANK * 64):
        raise ValueError(f"rank={rank!r}; expected 16, 32, 64, 128 or a larger power of two, or None for no loss")
    adapter_name = portable_adapter(model, adapter_name)
    target = Path(directory)
    _check_target(target, format)
    tuner, network = model.base_model, model.get_base_model()
    source = tuner.peft_config[adapter_name]
    layers = tuner.adapter_layers(adapter_name)
    deltas = {name: tuner.delta(adapter_name, name) for name in layers}
    for name, delta in deltas.items():
        if not bool(torch.isfinite(delta.A).all() and torch.isfinite(delta.B).all()):
            raise FloatingPointError(f"the adapter {adapter_name!r} holds values at {name} that are not finite")
    exact = {name: delta.compressed() for name, delta in deltas.items()}
    changing = {name: layer for name, layer in layers.items() if exact[name].rank}
    layers = changing or layers
    needed = max(delta.rank for delta in exact.values())
    rank = rank if rank is not None else _rank_for(needed)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_bare_suffixes(network, list(layers)),
        layers_to_transform=None if all_layers else sorted({split_path(name)[1] for name in layers}),
        fan_in_fan_out=source.fan_in_fan_out, task_type=source.task_type, inference_mode=True,
        base_model_name_or_path=source.base_model_name_or_path, revision=source.revision,
    )  # fmt: skip

    dtype = network.get_input_embeddings().weight.dtype  # of the base model: servers compute in it
    written, losses, lost, whole = {}, {}, 0.0, 0.0
    for name, module in _linear_modules(network).items():
        if not check_target_module_exists(config, name):
            continue
        if name not in deltas:
            d_in, d_out = linear_shape(module)
            written[name] = torch.zeros(rank, d_in, dtype=dtype), torch.zeros(d_out, rank, dtype=dtype)
            continue
        cut = exact[name].A[:rank].to(dtype), exact[name].B[:, :rank].to(dtype)
        written[name] = padded(cut, rank)
        missing = _norm(deltas[name] + LowRankDelta(A=cut[0].float(), B=-cut[1].float()))
        size = _norm(deltas[name])
        losses[name] = missing / size if size else 0.0
        lost, whole = lost + missing**2, whole + size**2

    _write_as(format, target, network, written, config)
    return {
        "rank": rank,
        "needed_rank": needed,
        "loss": (lost / whole) ** 0.5 if whole else 0.0,
        "module_losses": losses,
        "modules": len(layers),
        "zero_modules": len(written) - len(layers),
    }


def _rank_for(needed: int) -> int:
    """The smallest rank that servers take and nothing is lost by."""
    rank = SMALLEST_RANK
    while rank < needed:
        rank *= 2
    if rank > LARGEST_RANK:
        logger.warning(
            f"the adapter needs rank {needed} and is written with {rank}; some servers refuse more than "
            f"{LARGEST_RANK}: give rank={LARGEST_RANK} to truncate it (the loss is returned)"
        )
    return rank


def _write_as(
    format: str, target: Path, network: nn.Module, written: dict[str, tuple[Tensor, Tensor]], config: LoraConfig
) -> None:
    """Write the modules' factors A (r, d_in) and B (d_out, r) and the configuration in one of the forms."""
    if format == "peft":
        tensors = {
            f"base_model.model.{name}.lora_{side}.weight": factor
            for name, pair in written.items()
            for side, factor in zip("AB", pair, strict=True)
        }
        _write(target, SAFETENSORS_WEIGHTS_NAME, tensors, _peft_fields(config))
    elif format == "gguf":
        write_gguf(target, network, written, config.r)
    else:
        tensors, fields = _mlx(network, written, config.r)
        _write(target, MLX_WEIGHTS_NAME, tensors, fields)


def save_as_lora(model: PeftModel, directory: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """The earlier name of [`export_lora`]; PEFT has a function of this name that does something else."""
    warnings.warn("qf_peft.save_as_lora is called export_lora now", FutureWarning, stacklevel=2)
    return export_lora(model, directory, **options)


def _linear_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a network, with or without PEFT's layers in it, by their names without these."""
    return {
        name: module
        for name, module in network.named_modules()
        if ".base_layer" not in name and ".lora_" not in name and linear_shape(module) is not None
    }


def _bare_suffixes(network: nn.Module, names: list[str]) -> list[str]:
    """Name endings, as short as can be, that match the modules named and only modules of the same place in a block."""

    def place(name: str) -> str | None:
        try:
            return split_path(name)[2]
        except ValueError:
            return None

    others = {place(name) or name for name in _linear_modules(network)}
    suffixes = set()
    for full in {split_path(name)[2] for name in names}:
        parts = full.split(".")
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if not any(o != full and (o == short or o.endswith(f".{short}")) for o in others):
                break
        suffixes.add(short)
    return sorted(suffixes)


def _norm(delta: LowRankDelta) -> float:
    """‖B A‖ in Frobenius norm, from QR of the factors (their Gram matrices would lose half the digits)."""
    r_in = torch.linalg.qr(wide(delta.A).T, mode="r").R
    r_out = torch.linalg.qr(wide(delta.B), mode="r").R
    return float((r_out @ r_in.T).norm())


def _peft_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields that all readers know; newer ones at their defaults are left out, for older versions of PEFT."""
    names = (
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
        "lora_dropout", "bias", "target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "init_lora_weights", "use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern",
    )  # fmt: skip
    values = config.to_dict()
    values["target_modules"] = sorted(values["target_modules"])
    return {"auto_mapping": None, "peft_version": peft.__version__, **{name: values[name] for name in names}}


def _mlx(
    network: nn.Module, written: dict[str, tuple[Tensor, Tensor]], rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """MLX-LM's tensors and configuration: `lora_a` (d_in, r), `lora_b` (r, d_out); layers are counted from the last."""
    path, blocks = find_blocks(network)
    prefix = path if path == "model.layers" else _MLX_BLOCKS.get(network.config.model_type)
    keys, first, tensors = set(), len(blocks), {}
    for name, (a, b) in written.items():
        outer, index, suffix = split_path(name)
        if prefix is None or outer != path or "experts." in suffix:
            raise ValueError(f"format='mlx': what MLX-LM calls {name!r} of {type(network).__name__} is not known")
        keys.add(suffix)
        first = min(first, index)
        tensors[f"{prefix}.{index}.{suffix}.lora_a"] = a.T
        tensors[f"{prefix}.{index}.{suffix}.lora_b"] = b.T
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return tensors, {"fine_tune_type": "lora", "num_layers": len(blocks) - first, "lora_parameters": parameters}


def _check_target(target: Path, format: str) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a directory")
    if format == "gguf":
        return
    other, name = (MLX_WEIGHTS_NAME, "an MLX") if format == "peft" else (SAFETENSORS_WEIGHTS_NAME, "a PEFT")
    if (target / other).exists():
        raise FileExistsError(f"{target} holds {name} adapter ({other}), and both have an {CONFIG_NAME}; give another")


def _write(target: Path, weights_name: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Write both files to a temporary directory beside the target, then move them there."""
    with saving_to(target, "the adapter"):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
        try:
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(stored, temporary / weights_name, metadata={"format": "pt"})
            (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            target.mkdir(exist_ok=True)
            for name in (weights_name, CONFIG_NAME):
                (temporary / name).replace(target / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
