"""Where the stream should go at a taught position: the context pass's state, or the nearest that says the same.

The last block's output h is read by a norm and the unembedding. With RMSNorm gain g, rms ρ and unembedding rows e, a
step along g ⊙ (e_gold − e_other) raises the gold token's lead over another fastest, by ‖g ⊙ (e_gold − e_other)‖/ρ a
unit; for LayerNorm the same with the direction centred and ρ the standard deviation. So the smallest step that gives
the gold token a lead is known in closed form, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..forward.residual_stream import is_rms, norm_gain
from ..runtime.processes import dealt, join
from .constants import FARTHEST, REACH

_CHUNK = 2**23  # logits held at once
_CANDIDATES = 32  # tokens, the first of either end, that are followed on the way


@dataclass(frozen=True)
class Unembedding:
    """The final norm and the unembedding, as functions of the last block's output."""

    norm: nn.Module
    head: nn.Module
    gain: Tensor
    """(d): the norm's gain."""
    centred: bool
    """Whether the norm subtracts the mean (LayerNorm)."""
    scale: float
    """What the model multiplies its logits by afterwards."""
    cap: float | None
    """The bound that its logits are squashed to afterwards (Gemma 2), if any."""

    @classmethod
    @torch.no_grad()
    def find(cls, network: nn.Module, blocks: nn.ModuleList, stream: Tensor, read: Tensor) -> Unembedding | None:
        """The unembedding of a network whose head reads `read` (n, d) where the last block gives `stream` (n, d).

        Returns None where it is not a norm followed by a linear map with rows to read (a projection between
        them, say, or a quantised head).
        """
        head = network.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.shape[-1] != stream.shape[-1]:
            return None
        if is_traceable_wrapper_subclass(weight):  # quantised (torchao)
            return None
        stream, read = stream[:64].to(weight.device), read[:64].to(weight.device)
        inside = {id(m) for m in blocks.modules()}
        for norm in network.modules():
            if "norm" not in type(norm).__name__.lower() or id(norm) in inside:
                continue
            given = norm(stream.to(weight.dtype)).float()
            if (given - read.to(given)).norm() > 0.02 * read.norm():
                continue
            config = network.config.get_text_config() if hasattr(network.config, "get_text_config") else network.config
            scale = getattr(config, "logit_scale", None) or 1.0
            scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
            cap = getattr(config, "final_logit_softcapping", None)
            if is_rms(norm, stream[:8]):
                return cls(norm, head, norm_gain(norm, stream), False, scale, cap)
            if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
                return cls(norm, head, norm.weight.detach().float(), True, scale, cap)
        return None

    def logits(self, stream: Tensor) -> Tensor:
        """(n, vocabulary) float32, before any capping."""
        return self.unembed(self.norm(stream.to(self.head.weight.dtype)))

    def unembed(self, read: Tensor) -> Tensor:
        """The logits of what the head reads (n, d): (n, vocabulary) float32, before any capping."""
        return self.head(read.to(self.head.weight.dtype)).float() * self.scale

    def read(self, stream: Tensor) -> Tensor:
        """What the head reads of a stream: (n, d) float32."""
        return self.norm(stream.to(self.head.weight.dtype)).float()

    def near(self, first: Tensor, second: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """A part of two streams, which may lie elsewhere, beside the unembedding."""
        return first[part].to(self.head.weight.device), second[part].to(self.head.weight.device)

    def predictions(self, logits: Tensor) -> Tensor:
        """The log-probabilities that the model would give with these `logits`."""
        return (logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)).log_softmax(-1)

    def rows(self, tokens: Tensor) -> Tensor:
        """The unembedding's rows of tokens (…): (…, d) float32."""
        return self.head.weight[tokens].detach().float() * self.scale

    def spread(self, stream: Tensor) -> Tensor:
        """ρ of each row: (n)."""
        if self.centred:
            return (stream.var(1, unbiased=False) + getattr(self.norm, "eps", 1e-5)).sqrt()
        return (stream.square().mean(1) + 1e-6).sqrt()


def chunks(count: int, head: nn.Module) -> Iterator[slice]:
    """Slices of rows whose logits, and candidates' rows of the unembedding, are few."""
    vocabulary, width = head.weight.shape
    size = max(1, _CHUNK // max(vocabulary, 2 * _CANDIDATES * width))
    return (slice(first, first + size) for first in range(0, count, size))


def lead(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the gold token's logit exceeds the best other one, and that other token: (n), (n)."""
    own = logits.gather(1, gold[:, None])[:, 0]
    best = logits.topk(min(2, logits.shape[1]), dim=1)
    second = best.indices[:, 0] == gold
    rival = torch.where(second, best.values[:, -1], best.values[:, 0])
    return own - rival, torch.where(second, best.indices[:, -1], best.indices[:, 0])


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities (n, vocabulary), in nats: (n)."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class Reading:
    """What is read off predictions at n positions."""

    divergence: Tensor
    """(n): KL(context ‖ bare), in nats."""
    read: Tensor
    """(n): the token that is likeliest in context."""
    lead: Tensor
    """(n): by how many nats the gold token leads all others in the bare pass; negative where it does not."""

    @classmethod
    def empty(cls, count: int) -> Reading:
        return cls(torch.empty(count), torch.empty(count, dtype=torch.long), torch.empty(count))

    @classmethod
    def of(cls, context: Tensor, bare: Tensor, gold: Tensor) -> Reading:
        """Read log-probabilities in context and bare, (n, vocabulary) each."""
        values = divergence(context, bare), context.argmax(-1), lead(bare, gold.to(bare.device))[0]
        return cls(*(value.cpu() for value in values))

    def note(self, part: slice, context: Tensor, bare: Tensor, gold: Tensor) -> None:
        """Read some of the positions."""
        for name, values in vars(Reading.of(context, bare, gold)).items():
            getattr(self, name)[part] = values


def read_off(unembedding: Unembedding, context: Tensor, bare: Tensor, gold: Tensor) -> Reading:
    """The reading of streams (n, d) in context and bare, with gold tokens (n)."""
    reading, parts = Reading.empty(len(bare)), list(dealt(chunks(len(bare), unembedding.head)))
    for part in parts:
        p, q = (unembedding.predictions(unembedding.logits(states)) for states in unembedding.near(context, bare, part))
        reading.note(part, p, q, gold[part])
    join(vars(reading), [torch.arange(len(bare))[part] for part in parts])
    return reading


def aim(
    unembedding: Unembedding, bare: Tensor, context: Tensor, gold: Tensor, nearest: bool, margin: float | None
) -> tuple[Tensor, Tensor, Reading]:
    """Where the stream should go, and how far the predictions there are from the bare ones.

    Args:
        bare, context: the stream's states without and with the instruction, (n, d) each.
        gold: the completion's tokens, (n).
        nearest: go from the bare state only until the gold token leads by the margin, and not all the way.
        margin: by how many nats the gold token should lead; None forces nothing.

    Returns:
        The states aimed at (n, d), KL(p_aim ‖ p_bare) in nats (n), and the reading before.
    """
    reading, counts, aimed = Reading.empty(len(bare)), bare.new_empty(len(bare)), context.clone()
    parts = list(dealt(chunks(len(bare), unembedding.head)))
    for part in parts:
        start, end = unembedding.near(bare, context, part)
        first, last, own = unembedding.logits(start), unembedding.logits(end), gold[part].to(start.device)
        q = unembedding.predictions(first)
        reading.note(part, unembedding.predictions(last), q, own)
        logits = last
        if margin is not None:
            if nearest:
                end = on_the_way(unembedding, start, end, own, margin, first, last)
                logits = unembedding.logits(end)
            end, logits = forced(unembedding, end, own, margin, logits)
            aimed[part] = end.to(aimed.device)
        counts[part] = divergence(unembedding.predictions(logits), q).to(counts.device)
    places = [torch.arange(len(bare))[part] for part in parts]
    join({**vars(reading), "counts": counts, "aimed": aimed}, places)
    return aimed, counts, reading


def pushed(unembedding: Unembedding, stream: Tensor, gold: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest states to `stream` (n, d) at which each gold token leads by its own `margin` (n) what is among the
    first now; and by how much it leads at `stream` (n)."""
    moved, ahead = stream.clone(), stream.new_empty(len(stream))
    parts = list(dealt(chunks(len(stream), unembedding.head)))
    for part in parts:
        start = stream[part].to(unembedding.head.weight.device)
        own, logits = gold[part].to(start.device), unembedding.logits(start)
        ahead[part] = lead(logits, own)[0].to(ahead.device)
        aimed = ahead_of_rivals(unembedding, start, own, margin[part].to(start.device), logits)
        moved[part] = aimed.to(moved.device)
    join({"moved": moved, "ahead": ahead}, [torch.arange(len(stream))[part] for part in parts])
    return moved, ahead


def leads(unembedding: Unembedding, stream: Tensor, gold: Tensor) -> Tensor:
    """By how many nats each gold token leads at `stream` (n, d): (n)."""
    ahead, parts = stream.new_empty(len(stream)), list(dealt(chunks(len(stream), unembedding.head)))
    for part in parts:
        start, own = unembedding.near(stream, gold, part)
        ahead[part] = lead(unembedding.logits(start), own)[0].to(ahead.device)
    join({"ahead": ahead}, [torch.arange(len(stream))[part] for part in parts])
    return ahead


def forced(
    unembedding: Unembedding, stream: Tensor, gold: Tensor, margin: float, logits: Tensor, steps: int = 8
) -> tuple[Tensor, Tensor]:
    """The nearest states to `stream` (n, d), whose logits are given, at which each gold token leads by `margin` nats;
    and their logits.

    The smallest step against the runner-up, repeated because another may come up behind it. States at which the token
    leads already are left as they are.
    """
    moved, logits = stream.clone(), logits.clone()
    for _ in range(steps):
        ahead, other = lead(logits, gold)
        rows = (margin - ahead > 1e-3).nonzero()[:, 0]
        if not len(rows):
            break
        own, rivals = unembedding.rows(gold[rows]), unembedding.rows(other[rows])
        short = reachable(unembedding, own, rivals, torch.full_like(ahead[rows], margin)) - ahead[rows]
        there = moved[rows] + smallest_step(unembedding, moved[rows], own, rivals, short.clamp(min=0))
        moved[rows] = not_far(stream[rows], there)
        logits[rows] = unembedding.logits(moved[rows])
    return moved, logits


def ahead_of_rivals(
    unembedding: Unembedding, stream: Tensor, gold: Tensor, margin: Tensor, logits: Tensor, steps: int = 8
) -> Tensor:
    """As [`forced`], to margins of each one's own (n), but among the tokens that are the first at `stream` only: no
    logits of the whole vocabulary are computed."""
    rivals = logits.scatter(1, gold[:, None], -torch.inf).topk(min(_CANDIDATES, logits.shape[1] - 1), 1)
    tokens = torch.cat([gold[:, None], rivals.indices], 1)
    moved, follow, values = stream.clone(), unembedding.rows(tokens), logits.gather(1, tokens)
    wanted = reachable(unembedding, follow[:, :1], follow[:, 1:], margin[:, None])
    for _ in range(steps):
        short, worst = (wanted - (values[:, :1] - values[:, 1:])).max(1)
        rows = (short > 1e-3).nonzero()[:, 0]
        if not len(rows):
            break
        here, near = moved[rows], follow[rows]
        first = near[torch.arange(len(rows), device=near.device), 1 + worst[rows]]
        there = not_far(stream[rows], here + smallest_step(unembedding, here, near[:, 0], first, short[rows]))
        values[rows] += torch.einsum("nkd,nd->nk", near, unembedding.read(there) - unembedding.read(here))
        moved[rows] = there
    return moved


def smallest_step(unembedding: Unembedding, stream: Tensor, gold: Tensor, other: Tensor, nats: Tensor) -> Tensor:
    """What raises a token's lead over another by so many `nats` (n), with the norm's size held: (n, d); `gold` and
    `other` are their rows of the unembedding (n, d)."""
    direction = unembedding.gain * (gold - other)
    if unembedding.centred:
        direction = direction - direction.mean(1, keepdim=True)
    size = nats * unembedding.spread(stream) / direction.square().sum(1).clamp(min=1e-12)
    return size[:, None] * direction


def reachable(unembedding: Unembedding, gold: Tensor, other: Tensor, margin: Tensor) -> Tensor:
    """By how many nats tokens shall lead others, of which `gold` and `other` are the rows of the unembedding (…, d).

    The margin; but behind a norm no state lets a token lead by more than √d times the length of what tells the two
    rows apart. Where the margin is more than most of that, as for tokens that are all but the same to the model, little
    is asked for, which costs little."""
    direction = unembedding.gain * (gold - other)
    if unembedding.centred:
        direction = direction - direction.mean(-1, keepdim=True)
    most = REACH * direction.shape[-1] ** 0.5 * torch.linalg.vector_norm(direction, dim=-1)
    return torch.where(most < margin, most * most / margin, margin)


def not_far(stream: Tensor, moved: Tensor) -> Tensor:
    """States `moved` (n, d), those that are far from `stream` (n, d) drawn nearer: the norm behind them bounds what a
    lead can be, so that where two tokens' rows are much alike no step reaches it, however large."""
    step = moved - stream
    most = FARTHEST * torch.linalg.vector_norm(stream, dim=1)
    return stream + step * (most / torch.linalg.vector_norm(step, dim=1).clamp(min=1e-12)).clamp(max=1)[:, None]


def on_the_way(
    unembedding: Unembedding, bare: Tensor, context: Tensor, gold: Tensor, margin: float, first: Tensor, last: Tensor
) -> Tensor:
    """How far to go from `bare` to `context` (n, d each), whose logits are `first` and `last`, until each gold token
    leads by `margin`: the states there.

    0 where it leads already, all the way where it never does. By bisection on the logits of the tokens that are among
    the first at either end.
    """
    there = lead(first, gold)[0] >= margin
    k = min(_CANDIDATES, first.shape[1])
    candidates = torch.cat([first.topk(k, 1).indices, last.topk(k, 1).indices], 1)
    candidates = torch.where(candidates == gold[:, None], candidates[:, :1], candidates)
    rivals, own = unembedding.rows(candidates), unembedding.rows(gold)
    same = candidates == gold[:, None]
    low, high = torch.zeros(len(bare), device=bare.device), torch.ones(len(bare), device=bare.device)
    for _ in range(12):
        middle = (low + high) / 2
        state = unembedding.read(bare + middle[:, None] * (context - bare))
        rival = torch.einsum("nkd,nd->nk", rivals, state).masked_fill(same, -torch.inf).max(1).values
        enough = (own * state).sum(1) - rival >= margin
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return bare + torch.where(there, 0.0, high)[:, None] * (context - bare)
