"""Merging into weights of 16 bits without losing the change in their rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.devices import wide
from ..solve.least_squares import LowRankDelta

_ROWS = 1024  # of the weight at once, in float32


def rounded_change(weight: Tensor, delta: LowRankDelta, steps: int = 8) -> Tensor:
    """What to add to a 16-bit weight so that it changes by ΔW = B A where that matters: on the span of A's rows.

    Where an entry of ΔW is less than half a unit in the last place of W's entry, W + ΔW rounds to W again; a change
    spread over many entries or blocks can be lost that way altogether. Here the rounding error E is fed back: what it
    does to the directions that ΔW reads, E Q Qᵀ with the columns of Q an orthonormal basis of A's rows, is taken off
    the sum before it is rounded anew, as long as that makes E Q smaller. Entries move to their upper or lower
    neighbour, so that the errors cancel along Q; elsewhere they are plain rounding noise.

    Args:
        weight: W, (d_out, d_in), bfloat16 or float16.
        delta: ΔW's factors.
        steps: how often to round at most.

    Returns:
        (d_out, d_in), in W's dtype.
    """
    basis = torch.linalg.qr(wide(delta.A).T).Q.float().to(delta.A.device)
    result = torch.empty_like(weight)
    for first in range(0, weight.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        start = weight[part].float()
        wanted = start + delta.B[part].float() @ delta.A.float()
        aim, least = wanted, torch.inf
        for _ in range(steps):
            rounded = aim.to(weight.dtype).float()
            error = (rounded - wanted) @ basis
            size = float(error.norm())
            if not size < least:  # no smaller, or not finite
                break
            least, aim = size, aim - error @ basis.T
            result[part] = (rounded - start).to(weight.dtype)
        if least == torch.inf:
            result[part] = (wanted - start).to(weight.dtype)
    return result
