"""The ledger and the statistics of what an adapter was taught, in files beside its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..data.ledger import LEDGER_NAME, from_lines, to_lines
from ..solve.least_squares import LowRankDelta
from ..solve.second_moment import SecondMoment, from_triangle, triangle
from .state import TaughtAdapter, TaughtTokens

logger = logging.get_logger(__name__)

STATISTICS_NAME = "qf_statistics.safetensors"
_FORMAT, _READ = 2, (1, 2)  # written, and read: the first knew no triangles, and wrote every change


def weights_sum(tensors: Any) -> str:
    """A hash of an adapter's factors, whatever they are called."""
    parts = sorted(hashlib.sha256(_bytes(tensor)).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def write_statistics(folder: Path, taught: TaughtAdapter, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the ledger and the statistics of an adapter with these factors.

    Of a symmetric matrix only the upper triangle is written, and no change that the factors say to the last bit.
    """
    lines = to_lines(taught.entries)
    same = {
        module: delta.rank for module, delta in taught.delta.items() if _same(delta, _of(factors[module], delta.rank))
    }
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for part, module, field, tensor in _tensors(taught):
        if part == "delta" and module in same:
            continue
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[f"{part}/{module}/{field}"] = tensor.clone() if place in storages else tensor
        storages.add(place)
    header = {
        "format": _FORMAT,
        "weights": weights_sum(tensor for pair in factors.values() for tensor in pair),
        "ledger": hashlib.sha256(lines.encode()).hexdigest(),
        "floor": {module: bound.ridge for module, bound in taught.bound.items()},
        "delta": same,
        "rehearsed": taught.rehearsed,
        "styled": taught.holds_standing,
        "divergence": taught.divergence,
        "settings": taught.settings,
    }
    (folder / LEDGER_NAME).write_text(lines, encoding="utf-8")
    save_file(tensors, folder / STATISTICS_NAME, metadata={"qf_peft": json.dumps(header)})


def _of(factors: tuple[Tensor, Tensor], rank: int) -> LowRankDelta:
    """The change that an adapter's factors say, but for zeros behind them."""
    a, b = factors
    return LowRankDelta(a[:rank].float(), b[:, :rank].float())


def _same(one: LowRankDelta, other: LowRankDelta) -> bool:
    return torch.equal(one.A.to(other.A), other.A) and torch.equal(one.B.to(other.B), other.B)


def _tensors(taught: TaughtAdapter) -> Iterator[tuple[str, str, str, Tensor]]:
    for module, tokens in taught.tokens.items():
        for field in ("keys", "residual", "significance"):
            yield "tokens", module, field, getattr(tokens, field)
    for part in ("offset", "delta", "foundation"):
        for module, delta in getattr(taught, part).items():
            yield part, module, "A", delta.A
            yield part, module, "B", delta.B
    for module, bound in taught.bound.items():
        if bound.matrix is None:
            yield "bound", module, "root", bound.root
        elif torch.equal(bound.matrix, bound.matrix.T):
            yield "bound", module, "triangle", triangle(bound.matrix)
        else:
            yield "bound", module, "matrix", bound.matrix


def read_statistics(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]]) -> TaughtAdapter | None:
    """What `write_statistics` wrote, on the host, or None if there is nothing, or it is not of these factors (a warning
    says so)."""
    if not (folder / STATISTICS_NAME).is_file():
        return None
    try:
        lines = (folder / LEDGER_NAME).read_text(encoding="utf-8")
        with safe_open(folder / STATISTICS_NAME, framework="pt") as file:
            header = json.loads((file.metadata() or {})["qf_peft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check(header, lines, factors)
        found = _by_module(tensors, factors)
        deltas = {
            part: {m: _delta(m, factors[m], **fields) for m, fields in found.get(part, {}).items()}
            for part in ("offset", "delta", "foundation")
        }
        for module, rank in header.get("delta", {}).items():
            deltas["delta"][module] = _of(tuple(part.cpu() for part in factors[module]), int(rank))
        return TaughtAdapter(
            tokens={m: _tokens(m, factors[m], **fields) for m, fields in found.get("tokens", {}).items()},
            bound={
                m: _bound(m, factors[m][0].shape[1], float(header["floor"][m]), fields)
                for m, fields in found.get("bound", {}).items()
            },
            installed={module: tuple(part.cpu() for part in pair) for module, pair in factors.items()},
            entries=from_lines(lines, LEDGER_NAME), **_scalars(header), **deltas,
        )  # fmt: skip
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        logger.warning(
            f"{folder / STATISTICS_NAME} is left out: {error}. The adapter works and can be taught on, but what it was "
            "taught is not known"
        )
        return None


def _scalars(header: Mapping[str, Any]) -> dict[str, Any]:
    """What is no tensor and no text. Raises ValueError where it cannot be that."""
    divergence = header.get("divergence")  # earlier versions did not write it
    if divergence is not None and not 0 <= float(divergence) < math.inf:
        raise ValueError(f"a divergence of {divergence}")
    return {
        "rehearsed": int(header["rehearsed"]), "settings": dict(header["settings"]),
        "holds_standing": bool(header["styled"]),
        "divergence": None if divergence is None else float(divergence),
    }  # fmt: skip


def _check(header: dict[str, Any], lines: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError where the file is of another format, ledger or adapter."""
    if header["format"] not in _READ:
        raise ValueError(f"format {header['format']}; this version reads {_FORMAT}")
    if header["ledger"] != hashlib.sha256(lines.encode()).hexdigest():
        raise ValueError("the ledger was changed")
    if header["weights"] != weights_sum(tensor for pair in factors.values() for tensor in pair):
        raise ValueError("the weights are not those that were taught")


def _by_module(
    tensors: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Tensors by part, module and field. Raises ValueError where one is of no module, or not finite."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        part, module, field = name.split("/")
        if module not in factors or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is of no module of the adapter, or not finite")
        found.setdefault(part, {}).setdefault(module, {})[field] = tensor
    return found


def _bound(module: str, width: int, ridge: float, fields: Mapping[str, Tensor]) -> SecondMoment:
    """What binds a module with keys of such a width. Raises ValueError where it cannot be that."""
    ((field, tensor),) = fields.items()
    shapes = {"root": (len(tensor), width), "matrix": (width, width), "triangle": (width * (width + 1) // 2,)}
    if tensor.shape != shapes[field] or not 0 <= ridge < math.inf:
        raise ValueError(f"what binds {module} has shape {tuple(tensor.shape)}; expected {field} of {width}")
    moment = SecondMoment(width)
    moment.ridge, moment.root, moment.matrix = ridge, None, None
    if field == "root":
        moment.root = tensor
    else:
        moment.matrix = from_triangle(tensor, width) if field == "triangle" else tensor
    return moment


def _delta(module: str, factors: tuple[Tensor, Tensor], A: Tensor, B: Tensor) -> LowRankDelta:
    """A module's change. Raises ValueError where it has another shape than the weight."""
    a, b = factors
    if A.shape != (len(A), a.shape[1]) or B.shape != (b.shape[0], len(A)):
        raise ValueError(f"a change of {module} has another shape than its weight")
    return LowRankDelta(A, B)


def _tokens(
    module: str, factors: tuple[Tensor, Tensor], keys: Tensor, residual: Tensor, significance: Tensor
) -> TaughtTokens:
    """A module's taught tokens. Raises ValueError where they have another shape than its inputs and outputs."""
    a, b = factors
    n = len(keys)
    if keys.shape != (n, a.shape[1]) or residual.shape != (n, b.shape[0]) or significance.shape != (n,):
        raise ValueError(f"the tokens taught to {module} have other shapes than its weight")
    return TaughtTokens(keys, residual, significance)
