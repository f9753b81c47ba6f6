"""Where solves run, and in what precision; and whether a processor multiplies 16 bits in its own circuits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


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


def slow_sixteen_bits(network: nn.Module) -> bool:
    """Whether the model is in 16 bits on a processor that has no circuits for them, as most laptops' have not: oneDNN
    has no kernels for it, and PyTorch's own, which convert each number, take seven times as long as float32's.
    """
    weight = network.get_input_embeddings().weight
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if weight.device.type != "cpu" or weight.dtype not in checks or getattr(network, "hf_quantizer", None) is not None:
        return False
    supported = getattr(torch.ops.mkldnn, checks[weight.dtype], None)  # PyTorch has no public name for it
    return supported is not None and not supported()


def warn_of_slow_sixteen_bits(network: nn.Module) -> None:
    """Say so, once, where it is so."""
    if slow_sixteen_bits(network):
        logger.warning_once(
            "this processor multiplies 16 bits several times more slowly than float32: where memory holds it, load the "
            "model with dtype=torch.float32; merged and exported it can be in 16 bits again"
        )
