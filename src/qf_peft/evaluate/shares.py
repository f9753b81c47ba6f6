"""What each block's adapter contributes at the answers of the taught rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.modes import adapters_off
from ..data.rows import Row
from ..forward.blocks import find_blocks, split_path
from ..forward.capture import Batch, Point, forward_pass, gather
from .known import known_rows
from .plots import bars
from .subject import Subject


@dataclass(frozen=True)
class BlockShare:
    """What the adapter's modules in one block wrote into the residual stream at the answers' positions."""

    block: int
    modules: tuple[str, ...]
    size: float
    """Its norm over the stream's there (root mean squares over the positions)."""
    share: float
    """Its part in the change of the last block's output: Σ ⟨written, change⟩ / Σ ‖change‖²."""


@dataclass(frozen=True)
class LayerShares:
    blocks: tuple[BlockShare, ...]
    response: float
    """What is left of the final change: how the base model's own blocks answered to what was written before them."""

    def svg(self) -> str:
        """A bar for each block's share and one for the response."""
        labels = [*(str(b.block) for b in self.blocks), "response"]
        values = [*(b.share for b in self.blocks), self.response]
        return bars("Part of each block in the final change", labels, values, "block")

    _repr_svg_ = svg


@torch.no_grad()
def layer_shares(subject: Subject, rows: Sequence[Row] | None = None) -> LayerShares:
    """What each block's adapter contributes at the answers of the taught rows.

    In one bare pass each edited block is run a second time on the same input with its adapter off: the difference is
    what the adapter writes there, whatever modules it changes and whatever norms and multipliers stand behind them. Its
    share is its component along the change that the whole adapter makes to the last block's output (another bare pass,
    adapter off). Shares and response sum to 1; a share may be negative.

    Raises:
        ValueError: nothing was taught and there is nothing to teach.
    """
    rows = known_rows(subject) if rows is None else rows
    tuner, network, (_, blocks) = subject.tuner, subject.network, find_blocks(subject.network)
    edited: dict[int, list[str]] = {}
    for name in tuner.adapter_layers(subject.adapter_name):
        edited.setdefault(split_path(name)[1], []).append(split_path(name)[2])
    with subject.asking():
        examples = [subject.encoder.encode(row) for row in rows]
        positions, bare, options = [e.taught for e in examples], [e.bare_ids for e in examples], subject.pass_options
        counts = torch.tensor([k >= e.header for e in examples for k in range(e.taught)])
        last = {"last": Point(blocks[-1], "output")}
        with tuner.without_adapters():
            base = forward_pass(network, bare, positions, last, **options)["last"]
        sums = _Sums(blocks, edited, base, counts)
        with sums.watching():
            forward_pass(network, bare, positions, {}, on_batch=sums.begin, whole=True, **options)
    found = []
    for index, modules in edited.items():
        share = sums.along[index] / sums.change if sums.change else 0.0
        size = math.sqrt(sums.written[index] / sums.stream[index]) if sums.stream[index] else 0.0
        found.append(BlockShare(index, tuple(modules), size, share))
    response = 1 - sum(b.share for b in found) if sums.change else 0.0
    return LayerShares(tuple(found), response)


class _Sums:
    """Sums over the answers' positions, gathered a batch by hooks on the blocks."""

    def __init__(self, blocks: nn.ModuleList, edited: Iterable[int], base: Tensor, counts: Tensor) -> None:
        self.blocks, self.edited, self.base, self.counts = blocks, set(edited), base, counts
        self.along, self.written, self.stream = (dict.fromkeys(edited, 0.0) for _ in range(3))
        self.change = 0.0
        self._batch: Batch | None = None
        self._here: dict[int, Tensor] = {}
        self._again = False

    def begin(self, batch: Batch) -> None:
        self._batch, self._here = batch, {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        watched = sorted({*self.edited, len(self.blocks) - 1})
        handles = [self.blocks[i].register_forward_hook(self._see(i), with_kwargs=True) for i in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _kept(self, output: Tensor | tuple) -> Tensor:
        values = gather(output if isinstance(output, Tensor) else output[0], self._batch)
        return values[self.counts[self._batch.order].to(values.device)].cpu().double()

    def _see(self, index: int):
        def hook(block: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            if self._again:
                return
            now = self._kept(output)
            if index in self.edited:
                self._again = True
                try:
                    with adapters_off(block):
                        plain = self._kept(block(*args, **kwargs))
                finally:
                    self._again = False
                self._here[index] = now - plain
                self.written[index] += float((now - plain).square().sum())
                self.stream[index] += float(plain.square().sum())
            if index == len(self.blocks) - 1:
                order = self._batch.order
                change = now - self.base[order.to(self.base.device)].cpu()[self.counts[order]].double()
                self.change += float(change.square().sum())
                for which, written in self._here.items():
                    self.along[which] += float((written * change).sum())

        return hook
