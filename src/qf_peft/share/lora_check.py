"""Whether a directory is a LoRA adapter that every reader of LoRA files takes."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..forward.blocks import split_path

SMALLEST_RANK, LARGEST_RANK = 16, 128
_DTYPES = {"F32", "F16", "BF16"}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SUFFIX = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_BALANCE = 1.1  # ‖A‖ / ‖B‖ at most, either way
# What a configuration may say freely; the rules below see to the first line, and every other option has its default.
_RULED = {
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "layers_to_transform",
    "inference_mode",
    "init_lora_weights",
}
_FREE = {
    "inference_mode", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "fan_in_fan_out", "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip


def is_allowed(rank: Any, largest: int = LARGEST_RANK) -> bool:
    """Whether it is 16, 32, 64, … up to `largest`."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        return False
    return SMALLEST_RANK <= rank <= largest and rank & (rank - 1) == 0


def check_portable(directory: str | os.PathLike, num_layers: int | None = None) -> list[str]:
    """
    Check a LoRA adapter's directory against what vLLM, SGLang, llama.cpp, TGI, LoRAX, Ollama and PEFT have in common.

    Nothing in it is run, and of the tensors one at a time is read.

    Args:
        directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        num_layers: the number of the base model's blocks. If it is given, every kind of module must be there in every
            block, as TGI and LoRAX want it (`export_lora(..., all_layers=True)`).

    Returns:
        The problems, a sentence each; none for a directory that is portable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return [f"{directory} is not a directory"]
    problems = [
        f"{path.name} may run code when it is read; the weights belong in {SAFETENSORS_WEIGHTS_NAME} alone"
        for path in sorted(directory.iterdir())
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")
    ]
    config: dict[str, Any] = {}
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
        problems += _config_problems(config)
    except FileNotFoundError:
        problems.append(f"{CONFIG_NAME} is missing")
    except (OSError, ValueError) as error:
        config = {}
        problems.append(f"{CONFIG_NAME} cannot be read: {error}")
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return [*problems, f"{SAFETENSORS_WEIGHTS_NAME} is missing"]
    try:
        with safe_open(path, framework="pt") as file:
            modules, found = _tensor_problems(file, config)
    except (OSError, SafetensorError) as error:
        return [*problems, f"{SAFETENSORS_WEIGHTS_NAME} cannot be read: {error}"]
    return problems + found + _coverage_problems(modules, config, num_layers)


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = []

    def expect(right: bool, name: str, expected: str) -> None:
        if not right:
            problems.append(f"{name} is {config.get(name)!r}; expected {expected}")

    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    layers = config.get("layers_to_transform")
    expect(config.get("peft_type") == "LORA", "peft_type", "'LORA'")
    expect(is_allowed(rank), "r", "16, 32, 64 or 128")
    expect(isinstance(alpha, int) and not isinstance(alpha, bool) and alpha == rank, "lora_alpha", "an integer, r")
    expect(config.get("init_lora_weights", True) is True, "init_lora_weights", "true")
    bare = isinstance(targets, list) and bool(targets)
    bare = bare and all(isinstance(target, str) and _SUFFIX.fullmatch(target) for target in targets)
    expect(bare, "target_modules", "a list of bare name endings, such as 'down_proj'")
    indices = [layers] if isinstance(layers, int) else layers
    right = indices is None or (isinstance(indices, list) and bool(indices))
    right = right and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices or [])
    expect(right, "layers_to_transform", "null or indices of blocks")
    defaults = LoraConfig().to_dict()
    for name, value in sorted(config.items()):
        if name in _RULED or name in _FREE:
            continue
        if name not in defaults:
            problems.append(f"{name} is no field of a LoRA configuration")
        elif value != defaults[name] and (value or defaults[name]):
            problems.append(f"{name} is {value!r}; expected {defaults[name]!r}, which every reader takes")
    return problems


def _tensor_problems(file: Any, config: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The modules that have a pair of factors, and what is wrong with these."""
    problems: list[str] = []
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for key in file.keys():  # noqa: SIM118
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"the tensor {key!r} is not named base_model.model.….lora_A.weight or lora_B.weight")
        else:
            pairs[match["module"]][match["side"]] = key
    dtypes = set()
    for module, keys in pairs.items():
        if len(keys) < 2:
            problems.append(f"{module} has lora_{next(iter(keys))} alone; it needs both factors")
            continue
        slices = {side: file.get_slice(key) for side, key in keys.items()}
        shapes = {side: tuple(part.get_shape()) for side, part in slices.items()}
        kinds = {part.get_dtype() for part in slices.values()}
        dtypes |= kinds
        if not kinds <= _DTYPES:
            problems.append(f"{module} is stored as {', '.join(sorted(kinds))}; expected one of {sorted(_DTYPES)}")
        rank = config.get("r")
        if any(len(shape) != 2 for shape in shapes.values()) or not shapes["A"][0] == shapes["B"][1] == rank:
            problems.append(
                f"{module} has lora_A {shapes['A']}, lora_B {shapes['B']}; expected ({rank}, d_in), (d_out, {rank})"
            )
            continue
        if kinds <= _DTYPES:
            problems += _value_problems(module, *(float(_norm(file.get_tensor(keys[side]))) for side in "AB"))
    if len(dtypes & _DTYPES) > 1:
        problems.append(f"the tensors are stored in several dtypes ({', '.join(sorted(dtypes))}); expected one")
    if not pairs:
        problems.append("there is no pair of factors")
    return set(pairs), problems


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().norm()


def _value_problems(module: str, a: float, b: float) -> list[str]:
    if not (a < float("inf") and b < float("inf")):
        return [f"{module} has values that are not finite"]
    if max(a, b) > _BALANCE * min(a, b):
        return [f"{module} has ‖A‖ = {a:.3g} and ‖B‖ = {b:.3g}; expected them equal, as servers cast to 16 bits"]
    return []


def _coverage_problems(modules: set[str], config: dict[str, Any], num_layers: int | None) -> list[str]:
    """Whether the modules are those that the configuration names, and each kind of them in every block it should be."""
    problems, kinds = [], defaultdict(set)
    targets = config.get("target_modules")
    targets = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers if isinstance(layers, list) else None
    unused = set(targets)
    for module in sorted(modules):
        try:
            outer, index, suffix = split_path(module)
        except ValueError:
            problems.append(f"{module} lies in no numbered block")
            continue
        matched = {t for t in targets if module.endswith(f".{t}")}
        unused -= matched
        if targets and not matched:
            problems.append(f"{module} is none of target_modules {targets}")
        if layers is not None and index not in layers:
            problems.append(f"{module} is in none of the blocks of layers_to_transform {layers}")
        kinds[f"{outer}.….{suffix}"].add(index)
    if unused:
        problems.append(f"no tensors belong to the target_modules {sorted(unused)}")
    wanted = set().union(*kinds.values()) | set(layers or [])
    if num_layers is not None:
        wanted = set(range(num_layers))
    for kind, present in sorted(kinds.items()):
        if wanted - present:
            problems.append(f"{kind} is missing in the blocks {sorted(wanted - present)}; write zeros there")
    return problems
