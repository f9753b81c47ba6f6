"""What no solve has seen, and a lesson is measured by: held-out chats, and names that nobody taught.

Both are halted before the first taught block, so that a look costs only the blocks behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward.capture import Point
from ..forward.unembedding import Unembedding, chunks, divergence
from ..forward.walk import Walk
from ..runtime.processes import dealt, join


class HeldOutChats:
    """Chats held out of the preserved ones.

    Args:
        walk: their passes, to be halted before the first taught block; their answers' positions are kept.
        end: where the stream is read.
        unembedding: what reads it.
        head: (n, d), what the unembedding reads at these positions with the base weights; None: what it reads now,
            where the adapter holds a standing instruction, which changes every chat.
    """

    def __init__(self, walk: Walk, end: Point, unembedding: Unembedding, head: Tensor | None) -> None:
        self.walk, self.points, self.unembedding = walk, {"stream": end}, unembedding
        stream = walk.begin(self.points, walk.at if head is not None else len(walk.blocks) - 1)["stream"]
        self.head = head if head is not None else unembedding.read(stream.to(unembedding.head.weight.device))

    def divergence(self) -> Tensor:
        """KL from the predictions before to the present ones, in nats: (n)."""
        stream = self.walk.look(len(self.walk.blocks) - 1, self.points)["stream"]
        kl, parts = torch.empty(len(stream)), list(dealt(chunks(len(stream), self.unembedding.head)))
        for part in parts:
            now, then = self.unembedding.near(stream, self.head, part)
            then = self.unembedding.predictions(self.unembedding.unembed(then))
            kl[part] = divergence(then, self.unembedding.predictions(self.unembedding.logits(now))).cpu()
        join({"kl": kl}, [torch.arange(len(kl))[part] for part in parts])
        return kl


class Strays:
    """Contrasting rows held out of the solve.

    Args:
        walk: their passes, to be halted before the first taught block; their last steps are kept.
        end: where the stream is read.
        unembedding: what reads it.
        objects: the tokens by which the taught rows say what is new.
    """

    def __init__(self, walk: Walk, end: Point, unembedding: Unembedding, objects: set[int]) -> None:
        self.walk, self.points, self.unembedding = walk, {"stream": end}, unembedding
        self.last, self.objects = len(walk.blocks) - 1, torch.tensor(sorted(objects))
        self.before = self._predictions(walk.begin(self.points, self.last)["stream"]) if walk.sequences else None

    def share(self) -> float:
        """Of the rows, those that are now, and were not before, given a taught answer."""
        if self.before is None:
            return 0.0
        now = self._predictions(self.walk.look(self.last, self.points)["stream"])
        return float((torch.isin(now, self.objects) & (now != self.before)).float().mean())

    def _predictions(self, stream: Tensor) -> Tensor:
        """The likeliest token at each row's last step: (rows)."""
        return self.unembedding.logits(stream.to(self.unembedding.head.weight.device)).argmax(1).cpu()
