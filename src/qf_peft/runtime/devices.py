"""Where solves run, and in what precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def solves_on(device: torch.device) -> torch.device:
    """Where what lies on a device is solved for: there, or on the host where there is no float64."""
    return device if _has_float64(device) else torch.device("cpu")


def _has_float64(device: torch.device) -> bool:
    """Apple's MPS has none."""
    return device.type != "mps"


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64, where it is solved for."""
    return tensor.to(solves_on(tensor.device), torch.float64)


@contextmanager
def whole_products() -> Iterator[None]:
    """While open, or as a decorator: products of float32 matrices are float32's own, whatever the user has switched on.

    TF32 and bfloat16 keep 10 and 7 bits, which is enough for a model's pass; in a Gram matrix, whose inverse enlarges
    what is lost, they leave nothing of what tells two facts apart.
    """
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
