"""Several processes that teach one adapter, started by `torchrun` or `accelerate launch`: each has the whole model.

Batches are formed as one process forms them and dealt out; what they give is joined, so that all processes decide and
solve on the same data, which is also one process's. Every process solves the same least squares: one module follows on
the other, so there is nothing to share, and what binds later lessons is then everywhere without being sent. The main
process's factors are taken, so that all hold the same bits.

Before tensors are exchanged the processes tell each other that they are well: an error in one is an error in all. The
exchange goes over gloo, which notices a process that died at once; NCCL moves the tensors of GPUs. A process that hangs
is waited for as long as the process group's timeout says (half an hour unless set, for instance by accelerate's
`InitProcessGroupKwargs`). With one process nothing here does anything.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process failed, or could not be reached."""


def start() -> None:
    """When work begins that all share: join the other processes if this one was launched with others. Those but the
    main one are quiet from then on."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group()
    if not is_main():
        logging.getLogger("qf_peft").setLevel(logging.ERROR)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether it is the one that reports and writes."""
    return rank() == 0


def writes_cache() -> bool:
    """Whether it is the first process of its machine, which writes that machine's cache."""
    return world_size() == 1 or int(os.environ.get("LOCAL_RANK", rank())) == 0


def dealt(items: Iterable[T], turn: Iterator[int] | None = None) -> Iterator[T]:
    """This process's share of batches: every so manieth, whole, so that their shapes are those they have in one
    process. (A product's rounding depends on its shape, and a solve may enlarge it a thousandfold.) A `turn`
    shared by several calls goes on where the last one ended."""
    return (item for item, number in zip(items, turn or count(), strict=False) if number % world_size() == rank())


def join(tensors: Mapping[str, Tensor], own: Sequence[Tensor]) -> None:
    """Complete tensors (n, …) of which each process has filled its own rows, in place.

    Args:
        tensors: the same names in all processes, the tensors of one length.
        own: the rows that this process has filled, in parts.

    Raises:
        ProcessFailed: another process failed.
    """
    if world_size() == 1:
        return
    rows = torch.cat([torch.empty(0, dtype=torch.long), *(part.cpu() for part in own)])
    names = sorted(tensors)
    shapes = exchange((len(rows), [tensors[name].is_cuda for name in names]))
    for source, (size, _) in enumerate(shapes):
        theirs = _sent(rows, source, size)
        for number, name in enumerate(names):
            tensor = tensors[name]
            place = theirs.to(tensor.device)
            on_gpus = all(cuda[number] for _, cuda in shapes)
            part = _sent(tensor[place] if source == rank() else tensor[:0], source, size, on_gpus)
            if source != rank():
                tensor[place] = part


def each_ones(tensor: Tensor) -> Iterator[Tensor]:
    """Every process's tensor (n, …), in order; they may differ in n."""
    for source, size in enumerate(exchange(len(tensor))):
        yield _sent(tensor, source, size) if world_size() > 1 else tensor


def from_main(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The main process's tensors; those given by the others may differ in length."""
    if world_size() == 1:
        return tensors
    shapes = exchange([(len(tensor), tensor.is_cuda) for tensor in tensors])
    return tuple(
        _sent(tensor, 0, shapes[0][number][0], all(theirs[number][1] for theirs in shapes))
        for number, tensor in enumerate(tensors)
    )


def exchange(value: Any) -> list[Any]:
    """Each process's value, in order; small Python objects.

    Raises:
        ProcessFailed: another process failed.
    """
    return [value] if world_size() == 1 else _exchange(value, None)


def check_alike(things: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse to work together on different things; `things` gives them by name, as what JSON can hold.

    Raises:
        ValueError: a process was given something else than the main one; the message names it.
    """
    if world_size() == 1:
        return
    sums = {
        name: hashlib.sha256(json.dumps(thing, default=str).encode()).hexdigest() for name, thing in things().items()
    }
    for place, other in enumerate(found := exchange(sums)):
        different = [name for name in sums if other[name] != found[0][name]]
        if different:
            raise ValueError(
                f"process {place} has another {different[0]} than process 0; all must be given the same: the rows are "
                "shared out by QFTrainer itself. To teach different adapters at once start separate runs"
            )


@contextmanager
def all_or_none() -> Iterator[None]:
    """What happens within happens in all processes or in none: an error in one is raised in all.

    Raises:
        ProcessFailed: another process failed; the message is its error's.
    """
    start()
    if world_size() == 1:
        yield
        return
    try:
        yield
    except ProcessFailed:
        raise
    except BaseException as error:
        with suppress(ProcessFailed):  # others may have failed as well
            _exchange(None, f"{type(error).__name__}: {error}")
        raise
    exchange(None)


_calls, _writing = count(), []


def by_main(write: Callable[..., T]) -> Callable[..., T]:
    """Let a function (of a model, a destination, …) that writes be run by the main process only. The others wait for it
    and return what it returned. It may be called by the main process alone, too, so nothing is exchanged here."""

    @functools.wraps(write)
    def run(*args: Any, **options: Any) -> Any:
        if world_size() == 1 or _writing:
            return write(*args, **options)
        from torch.distributed.distributed_c10d import _get_default_store

        destination = str(list(inspect.signature(write).bind(*args, **options).arguments.values())[1])
        store, found = _get_default_store(), None
        while not is_main() and (found is None or found[0] != destination):
            try:
                found = pickle.loads(store.get(f"qf_peft/written/{next(_calls)}"))
            except RuntimeError as error:
                raise ProcessFailed(
                    f"process {rank()} waited in vain for process 0 to write {destination}; call {write.__name__} in "
                    "all processes with the same destination, or in process 0 alone"
                ) from error
        if found is not None:
            if found[1] is not None:
                raise ProcessFailed(f"process 0 could not write {destination}: {found[1]}")
            return found[2]
        returned, failed = None, None
        _writing.append(destination)
        try:
            result = returned = write(*args, **options)
            return result
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
            raise
        finally:
            _writing.pop()
            store.set(f"qf_peft/written/{next(_calls)}", pickle.dumps((destination, failed, returned)))

    return run


def _exchange(value: Any, failed: str | None) -> list[Any]:
    """Tell the others a value, or that this process failed."""
    found: list[Any] = [None] * world_size()
    with _reached():
        dist.all_gather_object(found, (failed, value), group=_host_group(dist.group.WORLD))
    for place, (error, _) in enumerate(found):
        if error is not None and place != rank():
            raise ProcessFailed(f"process {place} of {world_size()} failed: {error}")
    return [theirs for _, theirs in found]


def _sent(tensor: Tensor, source: int, size: int, on_gpus: bool = False) -> Tensor:
    """The `source` process's tensor of `size` rows, shaped and placed like this process's own; `on_gpus` as all are."""
    own = source == rank()
    there = tensor.detach().contiguous() if own else tensor.new_empty(size, *tensor.shape[1:])
    direct = on_gpus and "nccl" in dist.get_backend_config(dist.group.WORLD).lower()
    sent = there if direct else there.cpu()
    if sent.numel():
        with _reached():
            group = dist.group.WORLD if direct else _host_group(dist.group.WORLD)
            dist.broadcast(sent.view(-1).view(torch.uint8), source, group=group)  # bytes: gloo knows few dtypes
    return there if own or direct else sent.to(tensor.device)


@functools.cache
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group that talks over gloo; where the processes' own does, that one."""
    own = dist.get_backend_config(world).lower()
    return world if "gloo" in own else dist.new_group(backend="gloo")


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessFailed(
            f"process {rank()} of {world_size()} lost another one, which died or did not answer in time ({error})"
        ) from error
