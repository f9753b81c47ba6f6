"""The blocks of a transformer and the linear modules in them."""

from __future__ import annotations

import re

from torch import nn

# Lazily: the first number in a module's path is its block's index, as PEFT's `layers_to_transform` counts.
_PATH = re.compile(r"(?P<list>.*?[^.]+)\.(?P<index>\d+)(\.(?P<suffix>.*))?$")


def split_path(name: str) -> tuple[str, int, str]:
    """Split `model.layers.3.mlp.down_proj` into `("model.layers", 3, "mlp.down_proj")`.

    Raises:
        ValueError: the module lies in no numbered block.
    """
    match = _PATH.match(name)
    if match is None or match["suffix"] is None:
        raise ValueError(
            f"module {name!r} lies in no numbered block (such as `layers.3.mlp.down_proj`); QF teaches modules inside "
            "a transformer's blocks: choose other target_modules"
        )
    return match["list"], int(match["index"]), match["suffix"]


def block_of(name: str) -> int:
    """The index of the block that a module lies in; -1 for one that lies in none."""
    match = _PATH.match(name)
    return -1 if match is None or match["suffix"] is None else int(match["index"])


def base_layer(module: nn.Module) -> nn.Module:
    """The module itself, without PEFT's wrapper."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear module, plain, transposed (`Conv1D`) or quantised; None for any other module."""
    module = base_layer(module)
    if isinstance(module, (nn.Embedding, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)):
        return None
    if type(module).__name__ == "Conv1D":  # transformers' transposed linear layer
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "infeatures") and hasattr(module, "outfeatures"):  # some GPTQ kernels
        return module.infeatures, module.outfeatures
    return None


def text_config(model: nn.Module):
    """The configuration of the language model inside `model`."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the language model's blocks and its path, such as `model.layers`.

    Raises:
        ValueError: there is none.
    """
    depth = text_config(model).num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    lists = [(n, m) for n, m in lists if not re.search(r"vision|visual|audio|image|encoder", n)] or lists
    # Inside a block there may be lists of the same length (experts, say); the blocks are the outermost.
    lists = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of its {depth} blocks, so the default target_modules cannot be found; "
            "give QFConfig(target_modules=...)"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def is_attention(name: str) -> bool:
    """Whether a module belongs to attention, by its name."""
    return "attn" in name or "attention" in name


def block_ends(model: nn.Module, attention: bool) -> set[str]:
    """In each block the last linear module whose output is as wide as the stream: that of its MLP, or `attention`'s
    output projection.

    Experts are left out: each sees few tokens, most are fused into one tensor, and a shared one is scaled by a gate. In
    their blocks, attention's output projection is the last such module anyway; in blocks without attention the MLP's.

    Returns:
        Name endings as short as can be without matching another module of the block: `{"down_proj"}`, `{"o_proj"}`.
    """
    width = text_config(model).hidden_size
    path, blocks = find_blocks(model)
    ends: set[str] = set()
    for index, block in enumerate(blocks):
        names = {n: linear_shape(m) for n, m in block.named_modules() if ".base_layer" not in n and "lora_" not in n}
        linear = [n for n, shape in names.items() if shape is not None]
        writers = [n for n in linear if names[n][1] == width and "expert" not in n]
        if not writers:
            raise ValueError(
                f"block {path}.{index} has no linear module that writes {width} values; give "
                "QFConfig(target_modules=...)"
            )
        attending = [n for n in writers if is_attention(n)] if attention else []
        end = (attending or writers)[-1]
        parts = end.split(".")
        for k in range(1, len(parts) + 1):
            short = ".".join(parts[-k:])
            if not any(n.endswith(f".{short}") for n in linear if n != end):
                break
        ends.add(short)
    return ends
