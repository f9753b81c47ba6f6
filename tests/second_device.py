"""A second device without its hardware, to find tensors left behind on the CPU.

Tensors on it lie in host memory, say that they are on `DEVICE`, and refuse to meet the CPU's, as those on a GPU do.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qf_peft.runtime import devices

DEVICE = torch.device("cpu", 1)  # plain tensors are on "cpu", which is another
_CROSSING = {"aten::copy_", "aten::_to_copy"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by the CPU's too


class Elsewhere(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _inner(value):
    return value.inner if isinstance(value, Elsewhere) else value


def _run(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    name, target = function._schema.name, kwargs.get("device")
    if there and name not in _CROSSING:
        here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
        if name in _INDEXING and isinstance(args[0], Elsewhere):
            here = [tensor for tensor in here if tensor.is_floating_point()]
        if here:
            raise RuntimeError(f"{name} was given tensors on two devices")
    inside = kwargs if target is None else {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, inside))
    moved = torch.device(target) == DEVICE if target is not None else bool(there)
    given = {id(_inner(tensor)): tensor for tensor in tensors} if function._schema.is_mutable else {}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Elsewhere):
            return value
        return given.get(id(value)) if id(value) in given else Elsewhere(value) if moved else value

    return tree_map(wrapped, result)


def _made(make):
    """A constructor that does not look at devices by itself."""

    def constructor(data, *, device=None, **options):
        return make(data, **options) if device is None else make(data, **options).to(device)

    return constructor


def move(model: nn.Module) -> None:
    """Move a model's parameters and buffers to the second device."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    there = Elsewhere(tensor.detach())
                    store[name] = nn.Parameter(there, requires_grad=False) if store is module._parameters else there


def spread(model: nn.Module, block: int) -> nn.Module:
    """What `device_map="auto"` makes of a model whose blocks from `block` on, and the norm behind them, lie on the
    second device, and the unembedding, tied to the embedding, on the first: accelerate's hooks on the parts."""
    first, second = torch.device("cpu"), DEVICE
    decoder = model.get_decoder()
    parts = {decoder.embed_tokens: first, decoder.rotary_emb: first, model.lm_head: first, decoder.norm: second}
    parts |= {each: first if index < block else second for index, each in enumerate(decoder.layers)}
    for part, device in parts.items():
        if device == second:
            move(part)
        for module in part.modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device=device, io_same_device=False))
    return model


@contextmanager
def without_float64():
    """While open, the second device has no float64, as Apple's."""

    def checked(run):
        def result(function, args, kwargs):
            found = run(function, args, kwargs)
            for leaf in tree_leaves(found):
                if isinstance(leaf, Elsewhere) and leaf.dtype == torch.float64:
                    raise TypeError(f"{function._schema.name}: the second device has no float64")
            return found

        return result

    with (
        mock.patch.object(devices, "_has_float64", lambda device: device != DEVICE),
        mock.patch.dict(globals(), {"_run": checked(_run)}),
    ):
        yield


@contextmanager
def second_device():
    """While open, the second device can be used."""
    with (
        mock.patch.object(torch, "tensor", _made(torch.tensor)),
        mock.patch.object(torch, "as_tensor", _made(torch.as_tensor)),
        # `Module.to` makes new parameters, as between a CPU and a GPU, instead of putting other data into the old.
        mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        _Mode(),
    ):
        yield
