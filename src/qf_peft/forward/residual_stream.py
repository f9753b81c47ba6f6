"""How a module's output reaches the residual stream, measured on the model itself.

Blocks differ: parallel attention (GPT-NeoX, Falcon), a multiplier (Granite), a norm behind the module (Gemma 2 and 3,
OLMo 2), attention's output projection, whose sum with the stream is met before the MLP and not at the block's end. One
probe tells them apart without a table of architectures: the same few tokens run twice in one batch, the second time
with noise added to the module's output; wherever the difference of the two is that noise again, up to a factor, there
the module writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..runtime.devices import wide
from .blocks import find_blocks, linear_shape, split_path, text_config
from .capture import Point, forward_pass
from .walk import passed_through

logger = logging.get_logger(__name__)

# Of the stream's norm, first block to last (SmolLM2 14; models with random weights, and tiny ones, 1 to 3).
_GROWN = 4.0


@dataclass(frozen=True)
class Writer:
    """Where a module's contribution to the residual stream is seen, and how it gets there. Names are within a block."""

    place: str | None
    """The submodule at which the stream is met right after the module's contribution ("" is the block itself); None if
    the module does not write into the stream."""
    side: Literal["input", "output"] = "output"
    """Whether the stream is what goes into that submodule or what comes out of it."""
    multiplier: float = 1.0
    """What the contribution is multiplied by on the way (1 nearly everywhere)."""
    norm: str | None = None
    """The RMS norm between the module's output and the stream, if there is one."""


@torch.no_grad()
def grows_with_depth(network: nn.Module) -> bool:
    """Whether the residual stream is several times as large behind the last block as behind the first, as in pretrained
    models. Measured in one short pass on a few tokens spread over the vocabulary, whatever is taught; False for one
    without weights (on the meta device)."""
    if getattr(network, "hf_device_map", None) is None and any(p.is_meta for p in network.parameters()):
        return False
    blocks = find_blocks(network)[1]
    vocabulary = network.get_input_embeddings().weight.shape[0]
    ids = [k * vocabulary // 8 for k in range(8)]
    points = {"first": Point(blocks[0], "output"), "last": Point(blocks[-1], "output")}
    try:
        found = forward_pass(network, [ids], [len(ids) - 1], points, batch_tokens=len(ids), pad_id=ids[0])
    except FloatingPointError:  # a lesson's own passes say so of a row
        return False
    first, last = (torch.linalg.vector_norm(found[name].float(), dim=1).median() for name in ("first", "last"))
    return bool(last >= _GROWN * first.to(last))


def trace_writers(
    network: nn.Module, blocks: nn.ModuleList, names: Iterable[str], ids: list[int], known: dict[str, Writer]
) -> None:
    """Find how the outputs of modules reach the stream, and note it in `known`; what is there already is not traced.

    Blocks of one kind share the answer, and only the block in question and the first are run.

    Args:
        network: the transformers model, its adapters off.
        blocks: its blocks.
        names: the modules' paths in it.
        ids: a few tokens of real input.
    """
    kinds: dict[tuple, Writer] = {}

    def run(tokens: Tensor) -> None:
        network.get_decoder()(input_ids=tokens, use_cache=False)

    for name in names:
        if name in known:
            continue
        path, index, suffix = split_path(name)
        block = network.get_submodule(f"{path}.{index}")
        kind = (type(block), suffix, tuple(n for n, _ in block.named_modules() if "lora_" not in n))
        if kind not in kinds:
            with passed_through(blocks, [i for i in range(1, len(blocks)) if i != index]):
                kinds[kind] = trace_writer(run, network, name, ids)
            if kinds[kind].norm is not None:
                logger.warning(
                    f"{suffix} writes into the residual stream through {kinds[kind].norm}; what is taught there is "
                    "approached as near as that norm allows (see `residual_left` in the metrics)"
                )
        known[name] = kinds[kind]


@torch.no_grad()
def trace_writer(run: Callable[[Tensor], object], model: nn.Module, name: str, ids: list[int]) -> Writer:
    """Find how the output of the module `name` reaches the stream; blocks of the same kind share the answer.

    Args:
        run: runs the model on input ids (2, t), the second row being a copy of the first.
        model: the model that `name` is a path in.
        name: the module's path.
        ids: a few tokens of real input.

    Raises:
        ValueError: a norm other than an RMS norm stands between the module and the stream.
    """
    path, index, _ = split_path(name)
    block = model.get_submodule(f"{path}.{index}")
    module = model.get_submodule(name)
    if linear_shape(module)[1] != text_config(model).hidden_size:
        return Writer(None)
    norms = {n: m for n, m in block.named_modules() if "norm" in type(m).__name__.lower()}
    tokens = torch.tensor([ids, ids], device=model.get_input_embeddings().weight.device)
    direct = _probe(run, block, norms, module, tokens)
    if direct.writer is not None:
        return direct.writer
    for behind in direct.fed:  # norms whose input is the module's output itself
        through = _probe(run, block, norms, norms[behind], tokens).writer
        if through is not None:
            if not is_rms(norms[behind], direct.output):
                raise ValueError(
                    f"{name} writes into the residual stream through {behind}, a {type(norms[behind]).__name__}, which "
                    "is not an RMS norm; QF cannot aim through it: choose other target_modules"
                )
            return replace(through, norm=behind)
    return Writer(None)


@dataclass(frozen=True)
class _Probe:
    writer: Writer | None
    output: Tensor
    fed: list[str]


def _probe(run, block: nn.Module, norms: dict[str, nn.Module], module: nn.Module, tokens: Tensor) -> _Probe:
    """Add noise to the module's output in the second row; see where it shows."""
    seen: dict[str, Tensor] = {}
    noise: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        flat = output if output.ndim == 3 else output.view(*tokens.shape, -1)
        seen["output"] = flat[0].float()
        # As large as the stream itself, so that it stands above 16-bit rounding.
        size = max(float(seen["entry"].square().mean().sqrt()), float(seen["output"].square().mean().sqrt()), 1e-6)
        noise.append(torch.randn(flat[0].shape, generator=generator).to(flat) * size)
        return torch.stack([flat[0], flat[0] + noise[0]]).view_as(output)

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["entry"] = (args[0] if args else kwargs["hidden_states"]).float()

    def watch(name: str):
        def see(_: nn.Module, args: tuple) -> None:
            if noise and name not in seen and args[0].shape[-1] == noise[0].shape[-1] and args[0].ndim == 3:
                seen[name] = args[0].float()

        return see

    def leave(_: nn.Module, __: tuple, output) -> None:
        seen[""] = (output if isinstance(output, Tensor) else output[0]).float()

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    handles += [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    handles.append(module.register_forward_hook(disturb))
    try:
        run(tokens)
    finally:
        for handle in handles:
            handle.remove()
    fed, output = [], seen["output"]
    sent = noise[0].float()
    for place in (*norms, ""):
        if place not in seen or seen[place].shape[1:] != sent.shape:
            continue
        if torch.equal(seen[place][0], output):
            fed.append(place)
            continue
        arrived = seen[place][1] - seen[place][0]
        factors = (arrived * sent).sum(1) / sent.square().sum(1)  # a token
        multiplier = float(factors.mean())
        if multiplier and float((arrived - multiplier * sent).norm() / (multiplier * sent).norm()) < 0.05:
            multiplier = 1.0 if abs(multiplier - 1) < 1e-2 else multiplier
            return _Probe(Writer(place, "input" if place else "output", multiplier), output, fed)
    return _Probe(None, output, fed)


def norm_gain(norm: nn.Module, like: Tensor) -> Tensor:
    """The gain g of an RMS norm, g ⊙ x / rms(x), read off its answer to a vector of ones: (d)."""
    weight = next(iter(norm.parameters()), like)
    return norm(torch.ones(1, 1, like.shape[-1], device=weight.device, dtype=weight.dtype))[0, 0].float()


def is_rms(norm: nn.Module, vectors: Tensor) -> bool:
    gain = norm_gain(norm, vectors)
    expected = gain * vectors.to(gain) / vectors.to(gain).square().mean(-1, keepdim=True).sqrt()
    given = norm(vectors[None].to(next(iter(norm.parameters()), vectors)))[0].float()
    return float((given - expected).norm()) <= 0.02 * float(expected.norm())


def aim_through_norm(gain: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
    """The outputs o* nearest to a goal behind an RMS norm: arg min ‖g ⊙ o/rms(o) − t‖ for each row t of `wanted`.

    With u = o/rms(o) this is least squares on a sphere, min ‖G u − t‖² with ‖u‖² = d, solved by u = (G² + μ I)⁻¹ G t
    where μ is the root of ‖u‖² = d, found by bisection. The norm forgets its input's size, so that of `output` is kept.

    Args:
        gain: g, (d).
        output: the module's present outputs, (n, d).
        wanted: t, what should come out of the norm, (n, d).

    Returns:
        o*, (n, d), with the rows' sizes those of `output`.
    """
    g, t, o = wide(gain), wide(wanted), wide(output)
    d = o.shape[1]
    squares, pull = g.square(), g * t
    low = (-squares.min()).expand(len(t)).clone()
    high = pull.norm(dim=1) / d**0.5 - squares.min()
    for _ in range(200):
        middle = (low + high) / 2
        size = (pull / (squares + middle[:, None])).nan_to_num(posinf=1e150, neginf=-1e150).square().sum(1)
        low, high = torch.where(size > d, middle, low), torch.where(size > d, high, middle)
    u = pull / (squares + high[:, None]).clamp(min=torch.finfo(torch.float64).tiny)
    u = torch.where(torch.isfinite(u), u, 0.0)
    # Where the goal has no part along the smallest gain the sphere is not reached; that part is free, so keep its sign.
    missing = (d - u.square().sum(1)).clamp(min=0)
    free = (squares == squares.min()).double() * o
    u = u + free * (missing.sqrt() / free.norm(dim=1).clamp(min=1e-30))[:, None] * (missing > 1e-9 * d)[:, None]
    u = u * (d**0.5 / u.norm(dim=1, keepdim=True).clamp(min=1e-30))
    return (u * o.square().mean(1, keepdim=True).sqrt()).float().to(output.device)
