"""Walking sequences through a model block by block, so that a change in one block costs only the blocks behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Batch, Point, capture, forward_pass, put
from .processes import join
from .scratch import Scratch


class Walk:
    """Sequences halted before a block.

    The first pass is the model's own and notes what each block is called with besides the hidden state (masks, position
    embeddings); from then on blocks are called one by one.

    Args:
        network: the transformers model.
        blocks: its blocks.
        first: the block to halt before.
        sequences, kept, options: as in [`forward_pass`].
    """

    hidden: list[Tensor]
    """A batch: (b, t, d), what goes into block `at`."""
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
        kept: Sequence[int],
        **options: Any,
    ) -> None:
        self.network, self.blocks, self.at = network, blocks, first
        self.sequences, self.kept, self.options = sequences, kept, options
        self.scratch: Scratch = options.get("scratch") or Scratch()
        self.hidden = []
        self.steps = 0.0
        self._device: list[torch.device] = []
        self._batches: list[Batch] = []
        self._calls: list[list[tuple[tuple, dict]]] = []  # a batch, a block

    @torch.no_grad()
    def begin(self, points: Mapping[str, Point], last: int, **options: Any) -> dict[str, Tensor]:
        """The first pass, through the blocks up to `last`: keeps the points' activations as [`forward_pass`] does, and
        halts before the first block."""

        def note(index: int):
            def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                self._calls[-1].append((args[1:], rest))
                if index == self.at:
                    self._device.append(hidden.device)
                    self.hidden.append(self.scratch.keep(hidden))

            return see

        def new_batch(batch: Batch) -> None:
            self._batches.append(batch)
            self._calls.append([])

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                handle = block.register_forward_pre_hook(note(index), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(passed_through(self.blocks, range(last + 1, len(self.blocks))))
            found = forward_pass(
                self.network,
                self.sequences,
                self.kept,
                points,
                on_batch=new_batch,
                whole=True,
                **self.options,
                **options,
            )
        self.steps += (last + 1) / len(self.blocks)
        return found

    @torch.no_grad()
    def look(self, last: int, points: Mapping[str, Point]) -> dict[str, Tensor]:
        """Run the blocks from `at` up to `last` and keep the points' activations: (n, d) each. Halts where it was."""
        result: dict[str, Tensor] = {}
        for number, batch in enumerate(self._batches):
            found: dict[str, Tensor] = {}
            with capture(points, batch, found, stop=True):
                hidden = self.hidden[number].to(self._device[number])
                for index in range(self.at, last + 1):
                    hidden = self._call(index, number, hidden)
            for name, values in found.items():
                put(result, name, values, batch, sum(self.kept), self.scratch)
        join(result, [batch.order for batch in self._batches])
        self.steps += (last + 1 - self.at) / len(self.blocks)
        return result

    @torch.no_grad()
    def advance(self, to: int) -> None:
        """Go on to before block `to`."""
        for number in range(len(self._batches)):
            hidden = self.hidden[number].to(self._device[number])
            for index in range(self.at, to):
                hidden = self._call(index, number, hidden)
            self.hidden[number].copy_(hidden)
        self.steps += (to - self.at) / len(self.blocks)
        self.at = to

    def _call(self, index: int, number: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[number][index]
        output = self.blocks[index](hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


@contextmanager
def passed_through(blocks: nn.ModuleList, skipped: Collection[int]) -> Iterator[None]:
    """While open, the blocks `skipped` give back the hidden state they are called with, and cost nothing.

    Block 0 is never among them: what it returns beside the hidden state, if anything, the skipped ones return too.
    """
    beside: list[tuple] = []

    def see(_: nn.Module, __: tuple, output: Any) -> None:
        beside[:] = [] if isinstance(output, Tensor) else [tuple(None for _ in output[1:])]

    def give_back(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *beside[0]) if beside else hidden

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
