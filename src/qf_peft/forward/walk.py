"""Walking sequences through a model block by block, so that a change in one block costs only the blocks behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..runtime.processes import join
from .capture import Batch, Point, capture, forward_pass, put
from .prefix import empty_cache, repeated
from .scratch import Scratch

_CACHE = object()  # stands for a cache among what a block was called with


@dataclass
class _Run:
    """A batch's way through the blocks, or that of a prefix which batches share."""

    batch: Batch | None
    """None: it is a prefix."""
    cached: bool
    """Whether it goes on behind the prefix that was run before it."""
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    """By block, what it is called with besides the hidden state."""
    hidden: Tensor | None = None
    """(b, t, d): what goes into the block to come."""
    device: torch.device | None = None


class Walk:
    """Sequences halted before a block.

    The first pass is the model's own and notes what each block is called with besides the hidden state (masks, position
    embeddings); from then on blocks are called one by one. What several sequences begin with is walked once.

    Args:
        network: the transformers model.
        blocks: its blocks.
        first: the block to halt before.
        sequences, positions, options: as in [`forward_pass`].
    """

    at: int
    """The block that comes next."""
    steps: float
    """How many blocks were run, in units of the model's depth."""

    def __init__(
        self,
        network: nn.Module,
        blocks: nn.ModuleList,
        first: int,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[int],
        **options: Any,
    ) -> None:
        self.network, self.blocks, self.at = network, blocks, first
        self.sequences, self.positions, self.options = sequences, positions, options
        self.scratch: Scratch = options.get("scratch") or Scratch()
        self.steps = 0.0
        self._runs: list[_Run] = []

    @torch.no_grad()
    def begin(self, points: Mapping[str, Point], last: int, **options: Any) -> dict[str, Tensor]:
        """The first pass, through the blocks up to `last`: keeps the points' activations as [`forward_pass`] does, and
        halts before the first block."""

        def note(index: int):
            def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
                run, hidden = self._runs[-1], args[0] if args else kwargs["hidden_states"]
                # A cache is made anew whenever the blocks are run: none is kept.
                rest = {k: _without_cache(v) for k, v in kwargs.items() if k != "hidden_states"}
                run.calls.append((tuple(map(_without_cache, args[1:])), rest))
                if index == self.at:
                    run.device, run.hidden = hidden.device, self.scratch.keep(hidden)

            return see

        def start(batch: Batch | None) -> None:
            behind = batch is not None and batch.input_ids.shape[1] < batch.attention_mask.shape[1]
            self._runs.append(_Run(batch, behind))

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                handle = block.register_forward_pre_hook(note(index), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(passed_through(self.blocks, range(last + 1, len(self.blocks))))
            chosen = {**self.options, **options, "on_batch": start, "on_prefix": lambda: start(None), "whole": True}
            found = forward_pass(self.network, self.sequences, self.positions, points, **chosen)
        self.steps += (last + 1) / len(self.blocks)
        return found

    @torch.no_grad()
    def look(self, last: int, points: Mapping[str, Point]) -> dict[str, Tensor]:
        """Run the blocks from `at` up to `last` and keep the points' activations: (n, d) each. Halts where it was."""
        result: dict[str, Tensor] = {}
        for run, cache in self._with_caches():
            found: dict[str, Tensor] = {}
            with capture(points, run.batch, found, stop=True) if run.batch is not None else nullcontext():
                self._through(run, last + 1, cache)
            for name, values in found.items():
                put(result, name, values, run.batch, sum(self.positions), self.scratch)
        join(result, [run.batch.order for run in self._runs if run.batch is not None])
        self.steps += (last + 1 - self.at) / len(self.blocks)
        return result

    @torch.no_grad()
    def advance(self, to: int) -> None:
        """Go on to before block `to`."""
        for run, cache in self._with_caches():
            run.hidden.copy_(self._through(run, to, cache))
        self.steps += (to - self.at) / len(self.blocks)
        self.at = to

    def _with_caches(self) -> Iterator[tuple[_Run, Cache | None]]:
        """The runs, a prefix before the batches that go on behind it: each with the cache that it fills or reads."""
        cache: Cache | None = None
        for run in self._runs:
            if run.batch is None:
                cache = empty_cache(self.network)
                yield run, cache
            else:
                yield run, repeated(cache, len(run.batch.input_ids)) if run.cached else None

    def _through(self, run: _Run, end: int, cache: Cache | None) -> Tensor:
        """What comes out of the blocks from `at` up to before `end`."""
        hidden = run.hidden.to(run.device)
        for index in range(self.at, end):
            args, kwargs = run.calls[index]
            args = [cache if value is _CACHE else value for value in args]
            kwargs = {name: cache if value is _CACHE else value for name, value in kwargs.items()}
            output = self.blocks[index](hidden, *args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden


def _without_cache(value: Any) -> Any:
    return _CACHE if isinstance(value, Cache) else value


@contextmanager
def passed_through(blocks: nn.ModuleList, skipped: Collection[int]) -> Iterator[None]:
    """While open, the blocks `skipped` give back the hidden state they are called with, and cost nothing.

    Block 0 is never among them: what it returns beside the hidden state, if anything, the skipped ones return too.
    """
    recursive_update: list[tuple] = []

    def see(_: nn.Module, __: tuple, output: Any) -> None:
        recursive_update[:] = [] if isinstance(output, Tensor) else [tuple(None for _ in output[1:])]

    def give_back(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *recursive_update[0]) if recursive_update else hidden

    own = {index: vars(blocks[index]).get("forward") for index in skipped}
    handle = blocks[0].register_forward_hook(see)
    try:
        for index in skipped:
            blocks[index].forward = give_back
        yield
    finally:
        handle.remove()
        for index, forward in own.items():
            if forward is None:
                vars(blocks[index]).pop("forward", None)
            else:
                blocks[index].forward = forward
