"""Forward passes that keep what is needed at the taught positions, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from ..runtime.processes import dealt, join
from .prefix import Group, empty_cache, prefill, repeated, shared
from .scratch import Scratch


@dataclass(frozen=True)
class Point:
    """A place in a model where activations pass: a module's first input or its output."""

    module: nn.Module
    side: Literal["input", "output"]


class _Stop(Exception):
    """Ends a forward pass after the last module that matters."""


@dataclass(frozen=True)
class Batch:
    """Token sequences padded on the right, where padding cannot reach a causal model's other positions."""

    input_ids: Tensor
    """(b, t)"""
    attention_mask: Tensor
    """(b, p + t), where p tokens before these are cached."""
    rows: Tensor
    """(n): for each position kept, its sequence in the batch."""
    columns: Tensor
    """(n): and its place in the sequence."""
    order: Tensor
    """(n): and its place in the whole pass's result."""


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most so many tokens with its padding, or of one sequence."""
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chosen and (len(chosen) + 1) * lengths[i] > batch_tokens:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def batches(
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    batch_tokens: int,
    pad_id: int,
    device: torch.device,
    group: Group,
    turn: Iterator[int],
) -> Iterator[Batch]:
    """A group's sequences, without what they all begin with, in batches of similar length.

    Of each sequence the last token is only predicted, never read, and the `positions[i]` positions before it are kept;
    results are to be put back in the sequences' order by `Batch.order`. Of several processes each gets its share, by
    `turn`.
    """
    starts = torch.tensor([0, *positions]).cumsum(0).tolist()
    begin, members = len(group.prefix), group.members
    lengths = [len(sequences[i]) - 1 - begin + begin // 4 for i in members]
    for numbers in dealt(by_length(lengths, batch_tokens), turn):
        chosen = [members[number] for number in numbers]
        inputs = [list(sequences[i][begin:-1]) for i in chosen]
        width = max(map(len, inputs))
        yield Batch(
            torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in inputs], device=device),
            torch.tensor([[1] * (begin + len(ids)) + [0] * (width - len(ids)) for ids in inputs], device=device),
            torch.tensor(
                [b for b, i in enumerate(chosen) for _ in range(positions[i])], dtype=torch.long, device=device
            ),
            torch.tensor(
                [c for ids, i in zip(inputs, chosen, strict=True) for c in range(len(ids) - positions[i], len(ids))],
                dtype=torch.long,
                device=device,
            ),
            torch.tensor([p for i in chosen for p in range(starts[i], starts[i + 1])], dtype=torch.long),
        )


def gather(tensor: Tensor, batch: Batch) -> Tensor:
    """Activations (b, t, d), or (b·t, d) as in mixtures of experts, at the positions kept: (n, d) float32."""
    if tensor.ndim == 2:
        tensor = tensor.view(*batch.input_ids.shape, -1)
    return tensor[batch.rows.to(tensor.device), batch.columns.to(tensor.device)].detach().float()


@contextmanager
def capture(
    points: Mapping[str, Point],
    batch: Batch,
    into: dict[str, Tensor],
    stop: bool,
    take: Callable[[Tensor], Tensor] = lambda values: values,
) -> Iterator[None]:
    """While open, a forward pass on `batch` leaves each point's activations, gathered and taken by `take`, in `into`.

    With `stop` the pass ends as soon as the last point has been met. Hooks are always removed.
    """
    handles = []

    def keep(name: str, tensor: Tensor) -> None:
        into[name] = take(gather(tensor, batch))
        if stop and len(into) == len(points):
            raise _Stop

    def hook(name: str, point: Point):
        if point.side == "input":
            return point.module.register_forward_pre_hook(
                lambda _, args, kwargs: keep(name, args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
            )
        return point.module.register_forward_hook(
            lambda _, __, output: keep(name, output if isinstance(output, Tensor) else output[0])
        )

    try:
        for name, point in points.items():
            handles.append(hook(name, point))
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward_pass(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[int],
    points: Mapping[str, Point],
    *,
    batch_tokens: int,
    pad_id: int,
    head_inputs: Tensor | None = None,
    on_logits: Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]] | None = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    on_prefix: Callable[[], None] = lambda: None,
    whole: bool = False,
    scratch: Scratch | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Tensor]:
    """One pass of all sequences through a causal language model.

    Args:
        model: the model; the caller sees to `eval()` and to which adapters are on.
        sequences: token ids; the last of each is not read.
        positions: how many of each sequence's last positions to keep.
        points: what to keep there, by name.
        batch_tokens: how many tokens go through the model at once, padding included.
        head_inputs: (n, d), another pass's inputs of the unembedding; they are unembedded together with this pass's.
        on_logits: called a batch with the positions' places in the result (n_b), this pass's logits and those of
            `head_inputs` (n_b × vocabulary each); gives by name what to keep of them, (n_b) each. Without it the pass
            ends at the last point.
        on_batch: called with each batch before it is run.
        on_prefix: called before what several sequences begin with is run, once for the batches that come then.
        whole: run every block, even without `on_logits`; the unembedding is left out.
        scratch: where the result is put.
        progress: called with the number of sequences done.

    Returns:
        For each point its activations at the positions kept, in the sequences' order: (n, d) float32; and what
        `on_logits` gave. Several processes share the batches, and each returns all.

    Raises:
        FloatingPointError: an activation is not finite; the message names the point and the sequence.
    """
    device = model.get_input_embeddings().weight.device
    scratch = scratch if scratch is not None else Scratch()
    result: dict[str, Tensor] = {}
    owner = torch.repeat_interleave(torch.arange(len(positions)), torch.tensor(positions, dtype=torch.long))
    run = model.get_decoder() if whole and not on_logits else model
    stop = not whole and on_logits is None
    limits = [len(ids) - 1 - count for ids, count in zip(sequences, positions, strict=True)]
    groups = shared(sequences, limits)
    turn, own = count(), []
    for group in [*groups, None]:
        cache, mine = None, [] if own else [_nothing([pad_id], device)]  # meets the same modules as other processes'
        if group is not None:
            if group.prefix and empty_cache(model) is None:
                group = Group(group.members, ())
            mine = list(batches(sequences, positions, batch_tokens, pad_id, device, group, turn))
            if mine and group.prefix:
                on_prefix()
                cache = _prefill(model, group.prefix, points if stop else {}, device)
        for batch in mine:
            found: dict[str, Tensor] = {}
            noted: Mapping[str, Tensor] = {}
            own.append(batch.order)
            other = head_inputs[batch.order.to(head_inputs.device)] if head_inputs is not None else None
            on_batch(batch)
            past = {} if cache is None else {"past_key_values": repeated(cache, len(batch.input_ids))}
            with (
                capture(points, batch, found, stop, scratch.take),
                _unembedding_only(model, batch, other) if on_logits else nullcontext(),
            ):
                output = run(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=cache is not None, **past
                )
                if on_logits:
                    logits = output.logits[0].float()
                    n = len(batch.order)
                    noted = on_logits(batch.order, logits[:n], logits[n:])
            for name, values in found.items():
                if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                    bad = int(owner[batch.order[int((~torch.isfinite(values).all(1)).nonzero()[0])]])
                    raise FloatingPointError(
                        f"row {bad}: the activations at {name} are not finite; the model overflows on this text (try "
                        "bfloat16 or float32 weights) or its weights are damaged"
                    )
                put(result, name, values, batch, len(owner), scratch)
            for name, values in noted.items():
                result.setdefault(name, values.new_empty(len(owner)))[batch.order.to(values.device)] = values
            progress(len(batch.input_ids))
    join(result, own)
    return result


def put(result: dict[str, Tensor], name: str, values: Tensor, batch: Batch, total: int, scratch: Scratch) -> None:
    """Put a batch's activations (n_b, d) where they belong among all: (total, d)."""
    if name not in result:
        result[name] = scratch.empty(total, values.shape[1], values.dtype, values.device)
    place = result[name].device
    result[name][batch.order.to(place)] = values.to(result[name])


def _prefill(model: nn.Module, prefix: Sequence[int], points: Mapping[str, Point], device: torch.device):
    """The cache after a prefix, up to the last of the points (without points, all blocks); None if there is none."""
    cache = empty_cache(model)
    if cache is None:
        return None
    with capture(points, _nothing(prefix, device), {}, stop=bool(points)):
        prefill(model, prefix, cache)
    return cache


def _nothing(ids: Sequence[int], device: torch.device) -> Batch:
    """A batch of one sequence of which nothing is kept."""
    nowhere = torch.tensor([], dtype=torch.long, device=device)
    input_ids = torch.tensor([list(ids)], device=device)
    return Batch(input_ids, torch.ones_like(input_ids), nowhere, nowhere, nowhere.cpu())


@contextmanager
def _unembedding_only(model: nn.Module, batch: Batch, other: Tensor | None) -> Iterator[None]:
    """Run the unembedding at the n kept positions alone, and on `other` (n, d) behind them: logits (1, 2n, vocabulary).

    A hook on the module, so that what a model does to its logits afterwards (scaling, capping) is done as always.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        chosen = args[0][batch.rows.to(args[0].device), batch.columns.to(args[0].device)]
        if other is not None:
            chosen = torch.cat([chosen, other.to(chosen)])
        return (chosen[None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
