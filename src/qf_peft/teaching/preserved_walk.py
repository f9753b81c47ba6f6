"""The preserved chats of one lesson: which are kept, and their keys as the edits before have left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..forward.capture import Point
from ..forward.walk import Walk
from ..runtime.processes import exchange
from .arguments import QFTrainingArguments
from .constants import FEW, OWN_CHATS
from .lesson import Learner
from .preserved_chats import Chat, answer_starts
from .preserved_keys import Preserved, nearest, preserved_keys


class PreservedWalk:
    """The preserved chats' keys at one module after the other.

    Some chats' are measured again behind every edited block; the others' are those of the base weights.

    Args:
        preserved: the chats, with their keys.
        again: which of them are walked.
        walk: these, and others besides, before the first module's block; None if there are none.
        layers, index: by name the modules, and their blocks.
    """

    def __init__(
        self,
        preserved: Preserved,
        again: list[int],
        walk: Walk | None,
        layers: Mapping[str, nn.Module],
        index: Mapping[str, int],
    ) -> None:
        self.preserved, self.walk, self.layers, self.index = preserved, walk, layers, index
        mask = torch.zeros(len(preserved.positions), dtype=torch.bool)
        mask[again] = True
        self.still, self.first = ~mask[preserved.owners], next(iter(layers))
        if walk is not None:
            self.found = walk.begin({"keys": Point(layers[self.first], "input")}, index[self.first])["keys"]

    def keys(self, name: str, device: torch.device) -> Tensor:
        """(m, d_in), in the model's dtype, on a device."""
        cached = self.preserved.keys[name]
        if self.walk is None:
            return cached.to(device)
        cached = cached[self.still]
        if name != self.first:
            self.walk.advance(self.index[name])
            self.found = self.walk.look(self.walk.at, {"keys": Point(self.layers[name], "input")})["keys"]
        return torch.cat([part.to(device, cached.dtype) for part in (self.found, cached)])


def nearest_chats(preserved: Preserved, name: str, taught: Tensor, count: int) -> list[int]:
    """The `count` preserved chats nearest to taught keys (n, d_in) at a module, the same in all processes."""
    return exchange(sorted(nearest(preserved.keys[name][answer_starts(preserved.positions)], taught, count)))[0]


def contrasting_chats(
    contrast: Preserved, name: str, taught: Tensor, count: int, prompts: set[tuple[int, ...]]
) -> tuple[list[list[int]], list[int]]:
    """The `count` chats, of those with keys at answers' first steps only, nearest to taught keys (n, d_in) at a module,
    but for those that ask what is taught: token ids, and how many last steps are the answer's."""
    sequences, positions = [], []
    for i in exchange(nearest(contrast.keys[name], taught, count))[0]:
        ids, answer = contrast.sequences[i], contrast.positions[i]
        if tuple(ids[: len(ids) - answer]) not in prompts:
            sequences.append(ids)
            positions.append(answer)
    return sequences, positions


def middle_module(names: list[str]) -> str:
    """The module at whose keys chats are compared: early enough to tell subjects, late enough to have read them."""
    return names[len(names) // 2]


def contrast_count(rows: int, earlier: int, pool: int) -> int:
    """How many contrasting chats so many taught rows need beside those taught earlier: none for the first ten rows,
    where they cost paraphrases, then 12 a row, and at most a third of the pool."""
    return min(pool // 3, 12 * max(0, min(rows, earlier + rows - FEW)))


def preserved_and_contrasting(
    learner: Learner,
    chats: list[Chat] | None,
    args: QFTrainingArguments,
    rows: int,
    earlier: int,
    progress: Callable[[int], None],
) -> tuple[Preserved | None, Preserved | None]:
    """The chats whose answers must stay with their keys (`chats`, or the model's own), and those of which a lesson of
    `rows` rows after `earlier` ones takes the nearest besides."""
    if args.preserve_strength == 0:
        return None, None
    contrast, layers = None, learner.tuner.adapter_layers(learner.adapter)
    options = {
        "batch_tokens": args.batch_tokens, "seed": args.seed, "cache": args.cache, "memory": args.activation_bytes,
        "progress": progress,
    }  # fmt: skip
    own = 0 if chats is not None else args.preserve_chats or OWN_CHATS
    network, encoder = learner.network, learner.encoder
    with learner.tuner.without_adapters():
        preserved = preserved_keys(network, encoder, layers, chats or [], own, **options).split()
        if contrast_count(rows, earlier, args.contrast_chats):
            name = middle_module(list(layers))
            options["seed"] += 1  # other chats than those preserved
            contrast = preserved_keys(
                network, encoder, {name: layers[name]}, [], args.contrast_chats, starts_only=True, **options
            )
    return preserved, contrast
