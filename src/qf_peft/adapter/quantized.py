"""Quantised bases: what their weights need that ordinary ones do not. QF itself never reads a base weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PACKED = "packing_format_for_cpu"  # bitsandbytes' flag of a 4-bit weight laid out anew for the CPU's kernel
_BLOCK = 32  # rows that such a layout permutes among themselves


def holds_floats(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is stored in a floating dtype, or says which one it computes in."""
    weight = getattr(layer, "weight", None)
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    return floating or isinstance(getattr(layer, "compute_dtype", None), torch.dtype)


def sample(parameter: Tensor, count: int = 64) -> Iterator[Tensor]:
    """Up to `count` of a parameter's values, as stored: no weight is dequantised.

    A wrapper subclass (torchao) is the plain tensors inside it. A 4-bit weight of bitsandbytes gives how often each of
    the sixteen codes occurs in its first rows, because on some CPUs its first forward pass lays it out anew.
    """
    if is_traceable_wrapper_subclass(parameter):
        for name in parameter.__tensor_flatten__()[0]:
            inner = getattr(parameter, name)
            if isinstance(inner, Tensor):
                yield from sample(inner, count)
        return
    values = parameter.detach().reshape(-1)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        first = values.view(torch.uint8)[: _BLOCK * state.shape[-1] // 2]
        yield torch.bincount(torch.cat([first & 15, first >> 4]).long(), minlength=16)
    else:
        yield values[:: max(1, values.numel() // count)][:count]


def unpack(layer: nn.Module) -> None:
    """Bring a 4-bit weight of bitsandbytes back into the layout that dequantising it expects.

    In evaluation mode on a CPU with AVX512-BF16 the first forward pass repacks it. PEFT's merge does not know of that
    (as of peft 0.21 and bitsandbytes 0.50) and would merge into noise; and bitsandbytes' own way back, taken whenever a
    state dict is made, leaves the blocks' scales transposed, so that saving an adapter would spoil the base model.
    """
    weight = layer._parameters.get("weight")  # its own: what stands for another's may have to be computed
    state = getattr(weight, "quant_state", None)
    if not getattr(state, _PACKED, False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False  # the scales stay as they are; quantising them once more would change them
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if weight.quant_state.absmax.ndim == 2:
        weight.quant_state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
