"""Factors of an adapter as tensors: filled up to a rank, and begun so that they can be trained."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def begun(a: Tensor, b: Tensor, name: str) -> Tensor:
    """A (r, d_in) with values in the rows that are zero, as their columns of B (d_out, r) are. They are drawn as LoRA
    draws them, uniformly up to 1/√d_in, but by the module's name: the same in all processes, and after every lesson."""
    unused = ~(a.any(dim=1) | b.any(dim=0))
    if a.device.type == "meta" or not bool(unused.any()):
        return a
    drawn = torch.rand(a.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    drawn = ((2 * drawn - 1) / a.shape[1] ** 0.5).to(a)
    return torch.where(unused[:, None].to(a.device), drawn, a)


def padded(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (r, d_in) and B (d_out, r) with zeros behind them up to `rank`."""
    a, b = factors
    more = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
