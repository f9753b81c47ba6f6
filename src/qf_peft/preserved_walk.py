"""The preserved chats of one lesson: which are kept, and their keys as the edits before have left them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .capture import Point
from .model import QFModel
from .preserved_chats import Chat, answer_starts
from .preserved_keys import Preserved, nearest, preserved_keys
from .processes import exchange
from .rows import Encoder
from .training_args import QFTrainingArguments
from .walk import Walk

if TYPE_CHECKING:
    from .lesson import Lesson

OWN_CHATS = 400  # written by the model where none are given
FEW = 10  # rows, up to which what an adapter is taught disturbs only what lies nearest to it


class PreservedWalk:
    """The preserved chats' keys at one module after the other.

    The nearest chats' are measured again behind every edited block; the others' are those of the base weights.
    """

    def __init__(self, lesson: Lesson, taught: Tensor) -> None:
        """`taught`: (examples, d_in), the examples' keys at the middle module where their answers begin."""
        preserved, self.lesson = lesson.preserved, lesson
        self.first, name = lesson.names[0], middle(lesson.names)
        taught = taught.cpu()
        starts = preserved.keys[name][answer_starts(preserved.kept)]
        count = 0 if lesson.few or lesson.again else lesson.args.remeasure * len(lesson.examples)
        again = exchange(sorted(nearest(starts, taught, count)))[0]
        mask = torch.zeros(len(preserved.kept), dtype=torch.bool)
        mask[again] = True
        self.still = ~mask[preserved.owners]
        sequences, kept = [preserved.sequences[i] for i in again], [preserved.kept[i] for i in again]
        if lesson.contrast is not None:
            count = contrast_count(len(lesson.examples), lesson.earlier, len(lesson.contrast.kept))
            prompts = {tuple(e.bare_ids[: len(e.bare_ids) - e.taught + e.header]) for e in lesson.examples}
            for i in exchange(nearest(lesson.contrast.keys[name], taught, count))[0]:
                ids, answer = lesson.contrast.sequences[i], lesson.contrast.kept[i]
                if tuple(ids[: len(ids) - answer]) not in prompts:
                    sequences.append(ids)
                    kept.append(answer)
        self.walk = None
        if sequences:
            options = {**lesson.options, "progress": lambda n: None}
            index = lesson.index[self.first]
            self.walk = Walk(lesson.network, lesson.blocks, index, sequences, kept, **options)
            self.found = self.walk.begin({"keys": Point(lesson.layers[self.first], "input")}, index)["keys"]

    def keys(self, name: str, device: torch.device) -> Tensor:
        """(m, d_in), in the model's dtype, on a device."""
        lesson = self.lesson
        cached = lesson.preserved.keys[name]
        if self.walk is None:
            return cached.to(device)
        cached = cached[self.still]
        if name != self.first:
            self.walk.advance(lesson.index[name])
            self.found = self.walk.look(self.walk.at, {"keys": Point(lesson.layers[name], "input")})["keys"]
        return torch.cat([part.to(device, cached.dtype) for part in (self.found, cached)])


def middle(names: list[str]) -> str:
    """The module at whose keys chats are compared: early enough to tell subjects, late enough to have read them."""
    return names[len(names) // 2]


def contrast_count(rows: int, earlier: int, pool: int) -> int:
    """How many contrasting chats so many taught rows need beside those taught earlier: none for the first ten rows,
    where they cost paraphrases, then 12 a row, and at most a third of the pool."""
    return min(pool // 3, 12 * max(0, min(rows, earlier + rows - FEW)))


def preserved_and_contrasting(
    tuner: QFModel,
    adapter: str,
    network: nn.Module,
    encoder: Encoder,
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
    contrast, layers = None, tuner.layers(adapter)
    options = {
        "batch_tokens": args.batch_tokens, "seed": args.seed, "cache_dir": args.cache_dir,
        "progress": progress,
    }  # fmt: skip
    own = 0 if chats is not None else args.preserve_chats or OWN_CHATS
    with tuner.without_adapters():
        preserved = preserved_keys(network, encoder, layers, chats or [], own, **options)
        if contrast_count(rows, earlier, args.contrast_chats):
            name = middle(list(layers))
            options["seed"] += 1  # other chats than those preserved
            contrast = preserved_keys(
                network, encoder, {name: layers[name]}, [], args.contrast_chats, starts_only=True, **options
            )
    return preserved, contrast
