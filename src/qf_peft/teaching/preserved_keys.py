"""The keys of preserved chats at their answers' positions, and which of them lie near to what is taught."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Encoder, Text
from ..forward.capture import Point, forward_pass
from ..forward.scratch import Scratch
from .constants import HELD_OUT, MOST_KEYS
from .preserved_cache import Cache, cached
from .preserved_chats import Chat, answered_chats, write_chats


@dataclass(frozen=True)
class Preserved:
    """Chats to be preserved and the keys at their answer positions, with the base weights."""

    sequences: list[list[int]]
    """Token ids of prompt and answer."""
    positions: list[int]
    """How many of each sequence's last positions are answer positions."""
    keys: Mapping[str, Tensor]
    """By module name, in the model's dtype: (Σ positions, d_in), or where only the answers' first steps were asked for
    (chats, d_in)."""
    prompts: list[Text | None]
    """Each chat's prompt, None where it is plain text."""
    held_out: Sequence[list[int]] = ()
    """Token ids of the chats that no solve shall see, by which a lesson is measured."""
    answers: Sequence[int] = ()
    """How many of each of these chats' last positions are answer positions."""

    @property
    def owners(self) -> Tensor:
        """For each key the chat it belongs to: (Σ positions)."""
        return torch.repeat_interleave(
            torch.arange(len(self.positions)), torch.tensor(self.positions, dtype=torch.long)
        )

    def split(self) -> Preserved:
        """The same with a tenth of the chats held out; of fewer than ten none."""
        held_out = range(HELD_OUT - 1, len(self.positions), HELD_OUT)
        rest = [i for i in range(len(self.positions)) if i not in held_out]
        chosen = torch.isin(self.owners, torch.tensor(rest))
        return Preserved(
            [self.sequences[i] for i in rest],
            [self.positions[i] for i in rest],
            _Chosen(self.keys, chosen),
            [self.prompts[i] for i in rest],
            [self.sequences[i] for i in held_out],
            [self.positions[i] for i in held_out],
        )


@dataclass(frozen=True)
class _Chosen(Mapping):
    """Some of the rows of tensors that are read one at a time."""

    tensors: Mapping[str, Tensor]
    chosen: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name][self.chosen]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def preserved_keys(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: list[Chat],
    own: int = 0,
    *,
    starts_only: bool = False,
    batch_tokens: int,
    seed: int,
    cache: Cache,
    memory: float | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Preserved:
    """The keys of chats at their answer positions, in one forward sweep; from the cache where they are in it.

    Args:
        network: the model, its adapters off.
        encoder: its tokenizer's.
        modules: the target modules, by name.
        chats: what to preserve. Those without an answer are answered by the model.
        own: how many chats the model shall write itself besides.
        starts_only: keep only the keys at the steps where answers begin, by which the nearest chats are found.
        batch_tokens: tokens at once, padding included.
        seed: of the chats it writes itself.
        cache: where they are kept.
        memory: how many bytes of keys may be held while they are measured; what is beyond lies in temporary files.
        progress: called with the number of chats done.

    Returns:
        The chats and keys; from where they are cached one module's keys are read at a time.
    """
    content = [own, starts_only, seed, *((c.prompt, c.completion, c.text) for c in chats)]

    def make() -> Preserved:
        written = write_chats(network, encoder, own, seed, progress) if own else []
        return _measure(network, encoder, modules, [*chats, *written], starts_only, batch_tokens, memory, progress)

    def pack(made: Preserved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(made.keys), {"sequences": made.sequences, "kept": made.positions, "prompts": made.prompts}

    def unpack(header: dict[str, Any], keys: Mapping[str, Tensor]) -> Preserved:
        if missing := [name for name in modules if name not in keys]:
            raise KeyError(missing[0])
        return Preserved(header["sequences"], header["kept"], keys, header["prompts"])

    return cached("preserved", [sorted(modules), content], network, encoder, cache, make, pack, unpack)


def _measure(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: list[Chat],
    starts_only: bool,
    batch_tokens: int,
    memory: float | None,
    progress: Callable[[int], None],
) -> Preserved:
    """The keys, on the host and in the model's dtype as soon as they are met: those of all modules together are many
    times what the model's own pass holds."""
    answered = answered_chats(network, encoder, chats, batch_tokens, progress)
    thinned = max(1, -(-sum(chat.positions for chat in answered) // MOST_KEYS))
    if thinned > 1 and not starts_only:
        answered = answered[::thinned]
    sequences, positions, prompts = ([getattr(c, n) for c in answered] for n in ("ids", "positions", "prompt"))
    points = {name: Point(module, "input") for name, module in modules.items()}
    read, counts = sequences, positions
    if starts_only:  # what comes after an answer's first step does not matter to it
        read = [ids[: len(ids) - count + 1] for ids, count in zip(sequences, positions, strict=True)]
        counts = [1] * len(positions)
    keys = forward_pass(
        network,
        read,
        counts,
        points,
        batch_tokens=batch_tokens,
        pad_id=encoder.tokenizer.pad_token_id,
        scratch=Scratch(memory, device=torch.device("cpu"), dtype=network.get_input_embeddings().weight.dtype),
        progress=progress,
    )
    return Preserved(sequences, positions, keys, prompts)


def nearest(starts: Tensor, taught: Tensor, count: int) -> list[int]:
    """The chats nearest to what is taught, in turn for each taught row.

    Args:
        starts: (m, d), the chats' keys where their answers begin, at one module.
        taught: (n, d), the taught rows'.
        count: how many.

    Returns:
        Indices into the chats, by the cosine of the keys less the chats' mean.
    """
    unit, centre = torch.nn.functional.normalize, starts.float().mean(0)
    alike = unit(starts.float() - centre, dim=1) @ unit(taught.float() - centre, dim=1).T
    ranked = alike.argsort(dim=0, descending=True, stable=True).flatten().tolist()
    return list(dict.fromkeys(ranked))[:count]


def _norms(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32).clamp(min=1e-12)


def nearness(keys: Tensor, taught: Tensor, significance: Tensor) -> Tensor:
    """Weights of preserved keys (m, d_in) by how alike they are to what is taught: (m), summing to 1.

    The squared cosine to each of the (at most 256) most significant taught keys, averaged by significance: what lies
    near a taught key is what teaching endangers.
    """
    chosen = significance.topk(min(256, len(significance))).indices
    unit = torch.nn.functional.normalize(taught[chosen].float(), dim=1)
    # In the keys' own dtype, which is what they were computed in: no copy of them, and fast.
    alike = (keys @ unit.to(keys.dtype).T).float() / _norms(keys)[:, None]
    weights = alike.clamp(min=0).square() @ significance[chosen] + 1e-12
    return weights / weights.sum()
