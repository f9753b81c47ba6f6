"""Where the stream should go at a taught position: the context pass's state, or the nearest that says the same.

The last block's output h is read by a norm and the unembedding. With RMSNorm gain g, rms ρ and unembedding rows e, a
step along g ⊙ (e_gold − e_other) raises the gold token's lead over another fastest, by ‖g ⊙ (e_gold − e_other)‖/ρ a
unit; for LayerNorm the same with the direction centred and ρ the standard deviation. So the smallest step that gives
the gold token a lead is known in closed form, without a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward.unembedding import CANDIDATES, Unembedding, chunks, divergence, margins
from ..runtime.processes import dealt, join
from .constants import FARTHEST, REACH


@dataclass(frozen=True)
class Readout:
    """What is read off predictions at n positions."""

    divergence: Tensor
    """(n): KL(context ‖ bare), in nats."""
    read: Tensor
    """(n): the token that is likeliest in context."""
    margins: Tensor
    """(n): by how many nats the gold token leads all others in the bare pass; negative where it does not."""

    @classmethod
    def empty(cls, count: int) -> Readout:
        return cls(torch.empty(count), torch.empty(count, dtype=torch.long), torch.empty(count))

    @classmethod
    def of(cls, context: Tensor, bare: Tensor, gold: Tensor) -> Readout:
        """Read log-probabilities in context and bare, (n, vocabulary) each."""
        values = divergence(context, bare), context.argmax(-1), margins(bare, gold.to(bare.device))[0]
        return cls(*(value.cpu() for value in values))

    def note(self, part: slice, context: Tensor, bare: Tensor, gold: Tensor) -> None:
        """Read some of the positions."""
        for name, values in vars(Readout.of(context, bare, gold)).items():
            getattr(self, name)[part] = values


def read_off(unembedding: Unembedding, context: Tensor, bare: Tensor, gold: Tensor) -> Readout:
    """The reading of streams (n, d) in context and bare, with gold tokens (n)."""
    reading, parts = Readout.empty(len(bare)), list(dealt(chunks(len(bare), unembedding.head)))
    for part in parts:
        p, q = (unembedding.predictions(unembedding.logits(states)) for states in unembedding.near(context, bare, part))
        reading.note(part, p, q, gold[part])
    join(vars(reading), [torch.arange(len(bare))[part] for part in parts])
    return reading


def aim(
    unembedding: Unembedding, bare: Tensor, context: Tensor, gold: Tensor, nearest: bool, margin: float | None
) -> tuple[Tensor, Tensor, Readout]:
    """Where the stream should go, and how far the predictions there are from the bare ones.

    Args:
        bare, context: the stream's states without and with the instruction, (n, d) each.
        gold: the completion's tokens, (n).
        nearest: go from the bare state only until the gold token leads by the margin, and not all the way.
        margin: by how many nats the gold token should lead; None forces nothing.

    Returns:
        The states aimed at (n, d), KL(p_aim ‖ p_bare) in nats (n), and the reading before.
    """
    reading, counts, aimed = Readout.empty(len(bare)), bare.new_empty(len(bare)), context.clone()
    parts = list(dealt(chunks(len(bare), unembedding.head)))
    for part in parts:
        start, end = unembedding.near(bare, context, part)
        first, last, own = unembedding.logits(start), unembedding.logits(end), gold[part].to(start.device)
        q = unembedding.predictions(first)
        reading.note(part, unembedding.predictions(last), q, own)
        logits = last
        if margin is not None:
            if nearest:
                end = interpolated_to_margin(unembedding, start, end, own, margin, first, last)
                logits = unembedding.logits(end)
            end, logits = projected_to_margin(unembedding, end, own, margin, logits)
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
        aimed, led = ahead_of_rivals(unembedding, start, own, margin[part].to(start.device), logits)
        moved[part], ahead[part] = aimed.to(moved.device), led.to(ahead.device)
    join({"moved": moved, "ahead": ahead}, [torch.arange(len(stream))[part] for part in parts])
    return moved, ahead


def leads(unembedding: Unembedding, stream: Tensor, gold: Tensor) -> Tensor:
    """By how many nats each gold token leads at `stream` (n, d): (n)."""
    ahead, parts = stream.new_empty(len(stream)), list(dealt(chunks(len(stream), unembedding.head)))
    for part in parts:
        start, own = unembedding.near(stream, gold, part)
        ahead[part] = margins(unembedding.logits(start), own)[0].to(ahead.device)
    join({"ahead": ahead}, [torch.arange(len(stream))[part] for part in parts])
    return ahead


def projected_to_margin(
    unembedding: Unembedding, stream: Tensor, gold: Tensor, margin: float, logits: Tensor, steps: int = 8
) -> tuple[Tensor, Tensor]:
    """The nearest states to `stream` (n, d), whose logits are given, at which each gold token leads by `margin` nats;
    and their logits.

    The smallest step against the runner-up, repeated because another may come up behind it. States at which the token
    leads already are left as they are.
    """
    moved, logits = stream.clone(), logits.clone()
    for _ in range(steps):
        ahead, other = margins(logits, gold)
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
) -> tuple[Tensor, Tensor]:
    """As [`projected_to_margin`], to margins of each one's own (n), but among the tokens that are the first at `stream`
    only: no logits of the whole vocabulary are computed. Returns the states, and the leads at `stream` (n)."""
    rivals = logits.scatter(1, gold[:, None], -torch.inf).topk(min(CANDIDATES, logits.shape[1] - 1), 1)
    tokens = torch.cat([gold[:, None], rivals.indices], 1)
    moved, follow, values = stream.clone(), unembedding.rows(tokens), logits.gather(1, tokens)
    led = values[:, 0] - values[:, 1]
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
    return moved, led


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


def interpolated_to_margin(
    unembedding: Unembedding, bare: Tensor, context: Tensor, gold: Tensor, margin: float, first: Tensor, last: Tensor
) -> Tensor:
    """How far to go from `bare` to `context` (n, d each), whose logits are `first` and `last`, until each gold token
    leads by `margin`: the states there.

    0 where it leads already, all the way where it never does. By bisection on the logits of the tokens that are among
    the first at either end.
    """
    there = margins(first, gold)[0] >= margin
    k = min(CANDIDATES, first.shape[1])
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
