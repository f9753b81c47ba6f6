"""How the last block's output is read: the final norm and the unembedding, and what logits say of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .capture import Point, forward_pass
from .residual_stream import is_rms, norm_gain

CANDIDATES = 32  # tokens, the first of either end, that are followed on the way between two states
_CHUNK = 2**23  # logits held at once


@dataclass(frozen=True)
class Unembedding:
    """The final norm and the unembedding, as functions of the last block's output."""

    norm: nn.Module
    head: nn.Module
    gain: Tensor
    """(d): the norm's gain, beside the head."""
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
        stream, read = stream[:64], read[:64].to(weight.device)
        inside = {id(m) for m in blocks.modules()}
        for norm in _language_model(network, blocks).modules():
            fits = "norm" in type(norm).__name__.lower() and _width(norm) in (None, stream.shape[-1])
            if not fits or id(norm) in inside:
                continue
            given = _normed(norm, stream.to(weight.dtype)).to(read)
            if (given - read).norm() > 0.02 * read.norm():
                continue
            config = network.config.get_text_config() if hasattr(network.config, "get_text_config") else network.config
            scale = getattr(config, "logit_scale", None) or 1.0
            scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
            cap = getattr(config, "final_logit_softcapping", None)
            if is_rms(norm, stream[:8]):
                return cls(norm, head, norm_gain(norm, stream).to(weight.device), False, scale, cap)
            if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
                return cls(norm, head, norm.weight.detach().float().to(weight.device), True, scale, cap)
        return None

    def logits(self, stream: Tensor) -> Tensor:
        """(n, vocabulary) float32, before any capping."""
        return self.unembed(_normed(self.norm, stream.to(self.head.weight.dtype)))

    def unembed(self, read: Tensor) -> Tensor:
        """The logits of what the head reads (n, d): (n, vocabulary) float32, before any capping."""
        return self.head(read.to(self.head.weight)).float() * self.scale

    def read(self, stream: Tensor) -> Tensor:
        """What the head reads of a stream: (n, d) float32."""
        return _normed(self.norm, stream.to(self.head.weight.dtype)).float().to(self.head.weight.device)

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


def _language_model(network: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The module that holds the blocks: what else a multimodal network has reads other streams."""
    path = next(name for name, module in network.named_modules() if module is blocks)
    return network.get_submodule(path.rpartition(".")[0])


def _width(norm: nn.Module) -> int | None:
    """The width of the vectors that a norm takes; None if it has no gain to tell."""
    weight = getattr(norm, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.ndim == 1 else None


def _normed(norm: nn.Module, stream: Tensor) -> Tensor:
    """A norm's answer, where the norm is: the head may be elsewhere, tied to the embedding before the first block."""
    weight = next(iter(norm.parameters()), None)
    return norm(stream if weight is None else stream.to(weight.device))


def chunks(count: int, head: nn.Module) -> Iterator[slice]:
    """Slices of rows whose logits, and candidates' rows of the unembedding, are few."""
    vocabulary, width = head.weight.shape
    size = max(1, _CHUNK // max(vocabulary, 2 * CANDIDATES * width))
    return (slice(first, first + size) for first in range(0, count, size))


def margins(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the gold token's logit exceeds the best other one, and that other token: (n), (n)."""
    rival = logits.scatter(1, gold[:, None], -torch.inf).max(1)
    return logits.gather(1, gold[:, None])[:, 0] - rival.values, rival.indices


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities (n, vocabulary), in nats: (n)."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


@torch.no_grad()
def head_inputs(network: nn.Module, sequences: Sequence[list[int]], positions: Sequence[int], **options: Any) -> Tensor:
    """What the unembedding reads at so many of each sequence's last positions: (n, d)."""
    head = {"head": Point(network.get_output_embeddings(), "input")}
    return forward_pass(network, sequences, positions, head, **options)["head"]


@torch.no_grad()
def diverged(
    network: nn.Module, sequences: Sequence[list[int]], positions: Sequence[int], head: Tensor, **options: Any
) -> Tensor:
    """KL in nats from the predictions that `head` gave (see [`head_inputs`]) to the model's present ones: (n)."""

    def compare(_: Tensor, now: Tensor, then: Tensor) -> dict[str, Tensor]:
        return {"kl": divergence(then.log_softmax(-1), now.log_softmax(-1)).cpu()}

    return forward_pass(network, sequences, positions, {}, head_inputs=head, on_logits=compare, **options)["kl"]


@torch.no_grad()
def log_likelihoods(
    network: nn.Module, sequences: Sequence[list[int]], positions: Sequence[int], **options: Any
) -> Tensor:
    """The log likelihood in nats of each sequence's last tokens: (n) float64 on the CPU."""
    gold = torch.tensor([token for ids, n in zip(sequences, positions, strict=True) for token in ids[len(ids) - n :]])

    def score(order: Tensor, logits: Tensor, _: Tensor) -> dict[str, Tensor]:
        target = gold[order].to(logits.device)
        return {"log_likelihood": logits.log_softmax(-1).gather(1, target[:, None])[:, 0].cpu()}

    return forward_pass(network, sequences, positions, {}, on_logits=score, **options)["log_likelihood"].cpu().double()
