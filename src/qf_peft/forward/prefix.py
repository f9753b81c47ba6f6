"""Tokens that several sequences begin with, such as a document that is asked many questions: computed once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache

_WORTHWHILE = 16  # tokens, from which on a shared prefix is taken out


@dataclass(frozen=True)
class Group:
    """Sequences with a common beginning."""

    members: list[int]
    """Indices of the sequences."""
    prefix: Sequence[int]
    """What they all begin with, or nothing."""


def shared(sequences: Sequence[Sequence[int]], limits: Sequence[int]) -> list[Group]:
    """Group sequences by what they begin with. Those that share nothing worthwhile are one group without a prefix.

    Args:
        sequences: token ids.
        limits: how many of each sequence's tokens may be taken out at most.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    runs: list[tuple[list[int], int]] = []  # neighbours in order, and how much they share
    for i in order:
        if runs:
            members, length = runs[-1]
            both = min(length, limits[i], common(sequences[members[-1]], sequences[i]))
            if both >= _WORTHWHILE and (len(members) == 1 or 2 * both >= length):
                members.append(i)
                runs[-1] = members, both
                continue
        runs.append(([i], limits[i]))
    alone = Group(sorted(i for members, _ in runs if len(members) == 1 for i in members), ())
    together = [Group(sorted(m), list(sequences[m[0]][:length])) for m, length in runs if len(m) > 1]
    return ([alone] if alone.members else []) + together


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def empty_cache(model: nn.Module) -> Cache | None:
    """A cache for the prefix's keys and values of attention, or None if the model is no plain decoder with one."""
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return None
    return DynamicCache(config=model.config)


def prefill(model: nn.Module, prefix: Sequence[int], cache: Cache) -> None:
    """Run a prefix, whose keys and values of attention are left in the cache."""
    ids = torch.tensor([list(prefix)], device=model.get_input_embeddings().weight.device)
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of one sequence's cache for a batch of continuations."""
    copy = deepcopy(cache)
    copy.batch_repeat_interleave(times)
    return copy
