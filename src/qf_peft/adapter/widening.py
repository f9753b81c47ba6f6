"""More modules for an adapter that chose its own: the MLPs' output projections beside attention's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import check_target_module_exists

from ..forward.blocks import block_ends, find_blocks, is_attention
from .config import QFConfig

if TYPE_CHECKING:
    from .model import QFModel


def further_modules(tuner: QFModel, adapter_name: str) -> list[str]:
    """The MLPs' output projections that an adapter could take in: none where its modules were named by the user, are
    the MLPs' already, or where something was taught to it or it holds something."""
    config = tuner.peft_config[adapter_name]
    layers = tuner.adapter_layers(adapter_name)
    if not (config.modules_by_default and config.grows and all(map(is_attention, layers))):
        return []
    zero = not any(bool(layer.lora_B[adapter_name].weight.any()) for layer in layers.values())
    if adapter_name in tuner.taught or not zero:
        return []
    path = find_blocks(tuner.model)[0]
    wanted = QFConfig(target_modules=block_ends(tuner.model, attention=False), exclude_modules=config.exclude_modules)
    wanted.layers_to_transform, wanted.layers_pattern = config.layers_to_transform, config.layers_pattern
    names = [n for n, _ in tuner.model.named_modules() if n.startswith(f"{path}.") and "lora_" not in n]
    return [n for n in names if n not in layers and check_target_module_exists(wanted, n) is True]


def widen(tuner: QFModel, adapter_name: str) -> None:
    """Let an adapter that is zero take in the MLPs' output projections, as if they had been named from the first."""
    config = tuner.peft_config[adapter_name]
    config.target_modules = {*config.target_modules, *block_ends(tuner.model, attention=False)}
    tuner.inject_adapter(tuner.model, adapter_name)
