"""Which modules an adapter names: those that are there, and those that can be taught."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..forward.blocks import block_ends, block_of, find_blocks, linear_shape, split_path
from ..forward.residual_stream import grows_with_depth
from .config import QFConfig
from .loading import factored


def default_names(model: nn.Module) -> set[str]:
    """The modules to teach where none are named: attention's output projections where the stream grows with depth, else
    what ends each block's MLP.

    Raises:
        ValueError: the model is no transformer that they could be found in.
    """
    try:
        if not hasattr(model, "config"):
            raise ValueError("the model has no configuration")
        return block_ends(model, attention=grows_with_depth(model))
    except ValueError as error:
        raise ValueError(f"Please specify `target_modules` in `peft_config`: {error}") from error


def check_named(model: nn.Module, config: QFConfig) -> list[nn.Module]:
    """Refuse names that no module has, and blocks that are not there, before the model is touched.

    Returns:
        The modules that are named, of all blocks.

    Raises:
        ValueError: a transformer has no module of these names, or not in these blocks. The message says which it has.
    """
    names = {
        name: module
        for name, module in model.named_modules()
        if name and ".base_layer" not in name and ".lora_" not in name
    }
    everywhere = QFConfig(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
    if everywhere.target_modules == "all-linear":
        return []  # PEFT's own word, which it has not spelt out yet
    targets = [name for name in names if check_target_module_exists(everywhere, name)]
    wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    if not targets and wanted and not config.exclude_modules:
        try:
            path, blocks = find_blocks(model)
        except (ValueError, AttributeError):
            return []  # no transformer: the error is PEFT's
        linear = [n for n, m in blocks[0].named_modules() if linear_shape(m) is not None and ".base_layer" not in n]
        linear = [n for n in linear if "lora_" not in n]
        raise ValueError(
            f"target_modules={wanted!r} matches no module of {type(model).__name__}; its blocks ({path}.0, …) have the "
            f"linear modules {linear}"
        )
    indices = config.layers_to_transform
    if indices is None or isinstance(config.target_modules, str):
        indices = []  # a regular expression chooses the layers itself
    present = sorted({block_of(name) for name in targets} - {-1})
    for index in [indices] if isinstance(indices, int) else indices:
        if present and index not in present:
            raise ValueError(
                f"layers_to_transform={indices!r}: layer {index} is out of range; the modules {wanted!r} are in layers "
                f"{present[0]} to {present[-1]}"
            )
    return [names[name] for name in targets]


def check_linear(tuner: nn.Module, adapter_name: str) -> None:
    """Refuse to teach an adapter with modules that lessons cannot change.

    Raises:
        ValueError: a module is not linear, or lies in no block. The message names it.
    """
    for name, layer in tuner.model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in {*layer.lora_A, *layer.lora_embedding_A}:
            continue
        if adapter_name not in factored(layer):
            raise ValueError(
                f"the adapter {adapter_name!r} has {name!r}, a {type(layer.get_base_layer()).__name__}, which is not "
                "linear; QFTrainer changes the weights of linear modules only: choose other target_modules"
            )
        split_path(name)
