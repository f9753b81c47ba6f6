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

from .stream import is_rms, norm_gain

_CHUNK = 2**24  # logits held at once


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
        inside = {id(m) for m in blocks.modules()}
        for norm in network.modules():
            if "norm" not in type(norm).__name__.lower() or id(norm) in inside:
                continue
            given = norm(stream[:64].to(weight.dtype)).float()
            if (given - read[:64].to(given)).norm() > 0.02 * read[:64].norm():
                continue
            config = network.config.get_text_config() if hasattr(network.config, "get_text_config") else network.config
            scale = getattr(config, "logit_scale", None) or 1.0
            scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
            if is_rms(norm, stream[:8]):
                return cls(norm, head, norm_gain(norm, stream), False, scale)
            if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
                return cls(norm, head, norm.weight.detach().float(), True, scale)
        return None

    def logits(self, stream: Tensor) -> Tensor:
        """(n, vocabulary) float32, before any capping."""
        return self.head(self.norm(stream.to(self.head.weight.dtype))).float() * self.scale

    def rows(self, tokens: Tensor) -> Tensor:
        """The unembedding's rows of tokens (…): (…, d) float32."""
        return self.head.weight[tokens].detach().float() * self.scale

    def spread(self, stream: Tensor) -> Tensor:
        """ρ of each row: (n)."""
        if self.centred:
            return (stream.var(1, unbiased=False) + getattr(self.norm, "eps", 1e-5)).sqrt()
        return (stream.square().mean(1) + 1e-6).sqrt()


def chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose logits fit in memory."""
    size = max(1, _CHUNK // vocabulary)
    return (slice(first, first + size) for first in range(0, count, size))


def lead(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the gold token's logit exceeds the best other one, and that other token: (n), (n)."""
    own = logits.gather(1, gold[:, None])[:, 0]
    top, other = logits.scatter(1, gold[:, None], -torch.inf).max(1)
    return own - top, other


def force(unembedding: Unembedding, stream: Tensor, gold: Tensor, margin: float, steps: int = 8) -> Tensor:
    """The nearest states to `stream` (n, d) at which each gold token leads by `margin` nats: (n, d).

    The smallest step against the runner-up, repeated because another may come up behind it. States at which the token
    leads already are left as they are.
    """
    moved = stream.clone()
    for part in chunks(len(stream), unembedding.head.weight.shape[0]):
        rows = torch.arange(len(stream), device=stream.device)[part]
        for _ in range(steps):
            ahead, other = lead(unembedding.logits(moved[rows]), gold[rows])
            short = margin - ahead
            behind = short > 1e-3
            if not bool(behind.any()):
                break
            rows, short, other = rows[behind], short[behind], other[behind]
            direction = unembedding.gain * (unembedding.rows(gold[rows]) - unembedding.rows(other))
            if unembedding.centred:
                direction = direction - direction.mean(1, keepdim=True)
            size = short * unembedding.spread(moved[rows]) / direction.square().sum(1).clamp(min=1e-12)
            moved[rows] = moved[rows] + size[:, None] * direction
    return moved


def nearest_on_the_way(unembedding: Unembedding, bare: Tensor, context: Tensor, gold: Tensor, margin: float) -> Tensor:
    """How far to go from `bare` to `context` (n, d each) until each gold token leads by `margin`: the states there.

    0 where it leads already, all the way where it never does. By bisection on the logits of the tokens that are among
    the 32 first at either end.
    """
    result = context.clone()
    for part in chunks(len(bare), unembedding.head.weight.shape[0]):
        h, c, y = bare[part], context[part], gold[part]
        first, last = unembedding.logits(h), unembedding.logits(c)
        there = lead(first, y)[0] >= margin
        k = min(32, first.shape[1])
        candidates = torch.cat([first.topk(k, 1).indices, last.topk(k, 1).indices], 1)
        candidates = torch.where(candidates == y[:, None], candidates[:, :1], candidates)
        rivals, own = unembedding.rows(candidates), unembedding.rows(y)
        same = candidates == y[:, None]
        dtype = unembedding.head.weight.dtype
        low, high = torch.zeros(len(h), device=h.device), torch.ones(len(h), device=h.device)
        for _ in range(12):
            middle = (low + high) / 2
            state = unembedding.norm((h + middle[:, None] * (c - h)).to(dtype)).float()
            rival = torch.einsum("nkd,nd->nk", rivals, state).masked_fill(same, -torch.inf).max(1).values
            enough = (own * state).sum(1) - rival >= margin
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        high = torch.where(there, 0.0, high)
        result[part] = h + high[:, None] * (c - h)
    return result


def divergence(unembedding: Unembedding, target: Tensor, bare: Tensor) -> Tensor:
    """KL(p_target ‖ p_bare) of the predictions at each row, in nats: (n)."""
    result = bare.new_empty(len(bare))
    for part in chunks(len(bare), unembedding.head.weight.shape[0]):
        p = unembedding.logits(target[part]).log_softmax(-1)
        q = unembedding.logits(bare[part]).log_softmax(-1)
        result[part] = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    return result
