"""Keys taken on the way of a generation: what a pass of the whole chats would give again, without that pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recorded:
    """A batch of answers, and the inputs of modules while they were generated."""

    prompts: list[int]
    """Indices of the prompts."""
    answers: list[list[int]]
    """Token ids of each answer, with the one that ended it."""
    lengths: list[int]
    """How many of the keys are each prompt's and its answer's."""
    before: Mapping[str, Tensor]
    """By module name what it read where all of these prompts are the same, at their first p positions: (p, d_in)."""
    keys: Mapping[str, Tensor]
    """And behind that, prompt by prompt, up to the answer's last token, which was not read: (Σ lengths, d_in)."""


@dataclass(frozen=True)
class Recorder:
    """What to record."""

    modules: Mapping[str, nn.Module]
    """By name the modules whose inputs are kept, on the host and in the model's dtype, a batch at a time."""
    take: Callable[[Recorded], None]
    """Called after each batch. A model that reads a whole sequence again at every step is not recorded."""


@contextmanager
def recording(recorder: Recorder | None, batch: int) -> Iterator[dict[str, list[Tensor]]]:
    """While open, what the modules read is collected by name, a (batch, t, d_in) for each call."""
    met: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str, tensor: Tensor) -> None:  # of experts (b·t, d_in)
        met.setdefault(name, []).append(tensor.detach().view(batch, -1, tensor.shape[-1]).cpu())

    def hook(name: str, module: nn.Module):
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(name, args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
        )

    try:
        for name, module in (recorder.modules if recorder is not None else {}).items():
            handles.append(hook(name, module))
        yield met
    finally:
        for handle in handles:
            handle.remove()


def stretches(
    met: Mapping[str, list[Tensor]], starts: Sequence[int], lengths: Sequence[int], width: int
) -> dict[str, Tensor] | None:
    """Of each sequence of a batch so many positions from where it starts: (Σ lengths, d_in) by name.

    None where what was met is not `width` positions wide: each of them once.
    """
    found = {}
    for name, parts in met.items():
        if sum(part.shape[1] for part in parts) != width:
            return None
        whole = torch.cat(parts, dim=1)
        pairs = zip(whole, starts, lengths, strict=True)
        found[name] = torch.cat([sequence[start : start + length] for sequence, start, length in pairs])
    return found
