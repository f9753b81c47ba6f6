"""What must stay, as second moments of the keys at every position of the preserved chats; cached on disk.

Every position: the first token (whose keys are outliers: attention sinks), the system prompt, the question, the header
and the answer. A tenth of the chats is held out: no solve sees them, and after a lesson the divergence of the model's
predictions there says what it did to chats like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Encoder
from ..forward.capture import Point, forward_pass
from ..forward.recording import Recorded, Recorder
from ..forward.scratch import Scratch
from ..forward.unembedding import head_inputs
from ..runtime.processes import each_ones, exchange, world_size
from ..solve.second_moment import SecondMoment
from .arguments import QFTrainingArguments
from .constants import (
    BRIEF_TOKENS,
    FEWEST_WRITTEN,
    HELD_OUT,
    KEPT_TOKENS,
    MOST_WRITTEN,
    SINK,
    SINK_WEIGHT,
    WRITTEN,
)
from .generic_prompts import BRIEF, FACTUAL, OPEN, PLAIN
from .preserved_cache import cached
from .preserved_chats import Chat, answered_chats, write_chats

_PASS_KEYS = 4096  # tokens whose keys are held at once


@dataclass(frozen=True)
class PreservedMoments:
    """Chats to be preserved."""

    moments: Mapping[str, SecondMoment]
    """By module name: E[k kᵀ] over all positions of the chats that are not held out, each chat weighing the same and
    half of it on its answer."""
    held_out: list[list[int]]
    """Token ids of the chats held out."""
    answers: list[int]
    """How many of each of these chats' last positions are answer positions."""
    head: Tensor
    """(Σ answers, d): what the unembedding reads there, with the base weights."""


def preserved_moments(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: list[Chat] | None,
    args: QFTrainingArguments,
    progress: Callable[[int], None] = lambda n: None,
) -> PreservedMoments:
    """The moments of chats given, or of general prompts, plain text and chats that the model writes itself; from the
    cache where they are in it.

    Args:
        network: the model, its adapters off.
        encoder: its tokenizer's.
        modules: the modules that may be taught, by name.
        chats: what to preserve; None for the default.
        args: its `preserve_chats` is how many chats the model shall write then; by default as many as `own_chats` says.
        progress: called with the number of sequences done.
    """
    own, batch_tokens, seed = args.preserve_chats or own_chats(network), args.batch_tokens, args.seed
    content = [(c.prompt, c.completion, c.text) for c in chats] if chats is not None else own
    names = sorted(modules)

    def make() -> PreservedMoments:
        full, brief = chats, []
        if full is None:
            full = _dealt(general_chats(), write_chats(network, encoder, own, seed, progress))
            brief = [Chat(prompt) for prompt in BRIEF]
        return _measure(network, encoder, modules, (full, brief), batch_tokens, progress)

    def unpack(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> PreservedMoments:
        moments = _MomentsInFile(tensors, {name: header["counts"][name] for name in names})
        return PreservedMoments(moments, header["held_out"], header["answers"], tensors["head"])

    what = [names, content, seed, KEPT_TOKENS, BRIEF_TOKENS]
    return cached("moments", what, network, encoder, args.cache, make, _pack, unpack)


def general_chats() -> list[Chat]:
    """The prompts and texts that are preserved by default, whatever the model."""
    return [Chat(prompt) for prompt in (*FACTUAL, *OPEN)] + [Chat(None, text=text) for text in PLAIN]


def own_chats(network: nn.Module) -> int:
    """How many chats a model writes itself by default: 16, and more where it is small and they cost little."""
    size = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)
    return int(min(MOST_WRITTEN, max(FEWEST_WRITTEN, WRITTEN / size)))


def _dealt(first: list[Chat], second: list[Chat]) -> list[Chat]:
    """Two lists mixed evenly, so that those held out are of both."""
    seen = {chat.prompt for chat in first if chat.prompt is not None}
    second = [chat for chat in second if chat.prompt not in seen]
    order = sorted([(i / len(part), k, i) for k, part in enumerate((first, second)) for i in range(len(part))])
    return [(first, second)[k][i] for _, k, i in order]


def _measure(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: tuple[list[Chat], list[Chat]],
    batch_tokens: int,
    progress: Callable[[int], None],
) -> PreservedMoments:
    """The moments of chats, a part of which is held out, and of chats answered briefly, none of which is: how far their
    first tokens diverge says little of others.

    Those that the model answers are measured while it does."""
    aside = set(range(HELD_OUT - 1, len(chats[0]), HELD_OUT)) or {len(chats[0]) - 1} - {0}
    near, options = network.get_input_embeddings().weight.device, {"pad_id": encoder.tokenizer.pad_token_id}
    sums, everyone, held_out, rest = _Sums(near), [], [], []
    for part, tokens, unseen in ((chats[0], KEPT_TOKENS, aside), (chats[1], BRIEF_TOKENS, set())):
        if not part:
            continue
        recorder = Recorder(modules, partial(sums.take, unseen=unseen))
        held_at_once = min(batch_tokens, _PASS_KEYS)
        answered = answered_chats(network, encoder, part, held_at_once, progress, tokens, recorder)
        everyone += answered
        held_out += [chat for chat in answered if chat.chat in unseen]
        rest += [chat for chat in answered if chat.chat not in unseen and not chat.recorded]
    sums.join()
    points = {name: Point(module, "input") for name, module in modules.items()}
    for chosen in _parts([len(chat.ids) - 1 for chat in rest]):
        part = [rest[i] for i in chosen]
        lengths = [len(chat.ids) - 1 for chat in part]
        # On the host, and a module's at a time on the device: together they are many times what a pass holds.
        scratch = Scratch(device=torch.device("cpu"))
        ids = [chat.ids for chat in part]
        keys = forward_pass(network, ids, lengths, points, batch_tokens=batch_tokens, scratch=scratch, **options)
        weights = [_weights(length, chat.positions) for length, chat in zip(lengths, part, strict=True)]
        sums.add(keys, torch.cat(weights), len(part))
        progress(len(part))
    held_out = held_out or everyone[:1]
    ids, counts = [chat.ids for chat in held_out], [chat.positions for chat in held_out]
    head = head_inputs(network, ids, counts, batch_tokens=batch_tokens, **options)
    return PreservedMoments(sums.moments(), ids, counts, head.to("cpu", network.get_input_embeddings().weight.dtype))


class _Sums:
    """Sums the keys of chats.

    Args:
        near: where they are summed, one module's at a time; what comes of it lies on the host.
    """

    def __init__(self, near: torch.device) -> None:
        self._near, self._chats = near, 0
        self._moments: dict[str, SecondMoment] = {}

    def take(self, part: Recorded, unseen: set[int]) -> None:
        """Add what was recorded, but for the chats held out."""
        begin = len(next(iter(part.before.values()))) if part.before else 0
        before, rest = torch.zeros(begin), []
        for place, answer, length in zip(part.prompts, part.answers, part.lengths, strict=True):
            weights = _weights(begin + length, len(answer)) * (place not in unseen)
            before += weights[:begin]
            rest.append(weights[begin:])
        keys = {name: torch.cat([part.before[name], values]) if begin else values for name, values in part.keys.items()}
        self.add(keys, torch.cat([before, *rest]), sum(place not in unseen for place in part.prompts))

    def add(self, keys: Mapping[str, Tensor], weights: Tensor, chats: int) -> None:
        """Add so many chats' keys (n, d_in) by module name, with weights (n)."""
        self._chats += chats
        for name, values in keys.items():
            values = values.to(self._near).float()
            moment = self._moments.setdefault(name, SecondMoment(values.shape[1], home=torch.device("cpu")))
            norm = torch.linalg.vector_norm(values, dim=1)
            weighed = weights.to(values) * torch.where(norm > SINK * norm.median(), SINK_WEIGHT, 1.0)
            moment.update(values[weighed > 0], weighed[weighed > 0])

    def join(self) -> None:
        """Add to what this process has summed what the others have."""
        if world_size() == 1:
            return
        self._chats = sum(exchange(self._chats))
        widths = {name: m.width for name, m in self._moments.items()}
        for name, width in sorted({n: w for part in exchange(widths) for n, w in part.items()}.items()):
            own, host = self._moments.get(name, SecondMoment(width)), torch.device("cpu")
            total = self._moments[name] = SecondMoment(width, home=host)
            rows = own.root if own.root is not None else torch.zeros(0, width)
            whole = own.matrix if own.matrix is not None else torch.zeros(0, width, dtype=torch.float64)
            for theirs in each_ones(rows):
                total.update(theirs)
            for theirs in each_ones(whole):
                if len(theirs):
                    total.add(SecondMoment.of(theirs))

    def moments(self) -> dict[str, SecondMoment]:
        """By module the mean over the chats."""
        return {name: moment.scale(1 / max(self._chats, 1)) for name, moment in self._moments.items()}


def _weights(length: int, answer: int) -> Tensor:
    """The weights of a chat's positions, which sum to 1: half on its answer's, however short."""
    weights = torch.full((length,), 0.5 / max(length - answer, 1))
    weights[length - answer :] = (0.5 if answer < length else 1.0) / max(answer, 1)
    return weights


def _parts(lengths: list[int]) -> list[list[int]]:
    """Indices in groups of about so many tokens."""
    parts, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not parts or room < lengths[i]:
            parts.append([])
            room = _PASS_KEYS
        parts[-1].append(i)
        room -= lengths[i]
    return parts


def _pack(made: PreservedMoments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"head": made.head}
    for name, moment in made.moments.items():
        kind = "root" if moment.root is not None else "matrix"
        tensors[f"{kind} {name}"] = (moment.root if moment.root is not None else moment.matrix).float().cpu()
    return tensors, {
        "held_out": made.held_out, "answers": made.answers,
        "counts": {name: moment.count for name, moment in made.moments.items()},
    }  # fmt: skip


class _MomentsInFile(Mapping):
    """Moments by module name, each read from the file when it is asked for: of wide modules each is gigabytes."""

    def __init__(self, tensors: Mapping[str, Tensor], counts: dict[str, int]) -> None:
        if missing := [n for n in counts if f"root {n}" not in tensors and f"matrix {n}" not in tensors]:
            raise KeyError(missing[0])
        self._tensors, self._counts = tensors, counts

    def __getitem__(self, name: str) -> SecondMoment:
        count, kind = self._counts[name], "root" if f"root {name}" in self._tensors else "matrix"
        tensor = self._tensors[f"{kind} {name}"]
        return SecondMoment.of(tensor, rows=kind == "root", count=count)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)
