"""What every lesson has: the model taught, the rows as token ids, and the one place where an adapter is changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..adapter.model import QFModel
from ..adapter.state import TaughtAdapter
from ..data.rows import Encoder, Example
from ..forward.blocks import find_blocks, split_path
from ..forward.capture import forward_pass
from ..forward.residual_stream import trace_writers
from ..forward.scratch import Scratch
from ..forward.unembedding import margins
from ..runtime.processes import from_main
from ..solve.least_squares import LowRankDelta
from .arguments import QFTrainingArguments

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Learner:
    """An adapter, and the model around it."""

    tuner: QFModel
    adapter: str
    network: nn.Module
    """The transformers model."""
    encoder: Encoder
    """The tokenizer's."""


class Lesson(ABC):
    """Teaches examples to an adapter: `run()` leaves its factors and statistics in the tuner.

    Args:
        learner: what is taught.
        examples: the rows as token ids.
        args: the settings.
        progress: called with the number of rows done, thrice in all: two passes and the solves.
    """

    def __init__(
        self,
        learner: Learner,
        examples: list[Example],
        args: QFTrainingArguments,
        progress: Callable[[float], None],
    ) -> None:
        self.learner, self.examples, self.args = learner, examples, args
        self.tuner, self.adapter, self.network = learner.tuner, learner.adapter, learner.network
        self.blocks = find_blocks(self.network)[1]
        self.layers = self.tuner.adapter_layers(self.adapter)
        self.names = list(self.layers)
        self.index = {name: split_path(name)[1] for name in self.layers}
        with self.tuner.without_adapters():
            trace_writers(self.network, self.blocks, self.names, examples[0].bare_ids[:8], self.tuner.writers)
        self.writers = self.tuner.writers
        self.positions = [example.taught for example in examples]
        self.bare = [example.bare_ids for example in examples]
        self.options: dict[str, Any] = {
            "batch_tokens": args.batch_tokens,
            "pad_id": learner.encoder.tokenizer.pad_token_id,
            "progress": progress,
            "scratch": Scratch(args.activation_bytes),
        }
        self.unseen = {**self.options, "progress": lambda n: None}  # of passes that are no row's
        self.gold = torch.tensor([token for example in examples for token in example.targets])
        self.weights = torch.tensor([s for example in examples for s in example.significance])
        # The assistant header is given at inference; only the paper's setting teaches the steps that predict it.
        answer = torch.tensor([k >= example.header for example in examples for k in range(example.taught)])
        self.answered = answer & (self.weights > 0)
        if args.significance == "kl":
            self.weights = self.weights * answer
        self.head = self.network.get_output_embeddings()

    @abstractmethod
    def run(self) -> tuple[dict[str, float], list[int], list[int]]:
        """Teach. Returns metrics, the examples whose completion the model does not read in context, and those that it
        does not say yet, now without the instruction."""

    def _install(self, deltas: Mapping[str, LowRankDelta]) -> dict[str, LowRankDelta]:
        """Put modules' changes into the adapter: the main process's, so that all hold the same bits. Returns these."""
        made = {}
        for name, delta in deltas.items():
            a, b = from_main(delta.A, delta.B.T)
            made[name] = LowRankDelta(a, b.T)
        self.tuner.install(self.adapter, made, even=False)
        return made

    def _finish(self, state: TaughtAdapter, **changed: Any) -> None:
        """The adapter's new state: what it holds, and what it must remember."""
        self.tuner.install(self.adapter, {})
        installed = {name: self.tuner.factors(self.adapter, name) for name in self.names}
        settings = self.args.to_dict()
        state = replace(state, **{"installed": installed, "settings": settings, **changed})
        self.tuner.taught[self.adapter] = state.on_host()

    def _any(self, wrong: Tensor) -> list[int]:
        """The examples with one of the positions (n) at a token of their answer that counts."""
        return [i for i, part in enumerate((wrong & self.answered).split(self.positions)) if bool(part.any())]

    def _state(self) -> TaughtAdapter:
        """What the adapter was taught, as copies to be changed; settled where its weights were changed by others."""
        state = self.tuner.taught.get(self.adapter)
        present = {name: self.tuner.factors(self.adapter, name) for name in self.names}
        changed = [name for name in self.names if state is not None and not state.holds(name, present[name])]
        if state is None or changed:
            if changed:
                logger.warning(
                    f"the weights of {changed[0]} were changed since they were taught; they are kept and taught on, "
                    f"and the {len(state.entries)} facts in them can no longer be undone"
                )
            deltas = {name: self.tuner.delta(self.adapter, name) for name in self.names}
            state = (state or TaughtAdapter()).settled(present, deltas)
        parts = ("tokens", "offset", "bound", "delta")
        return replace(state, **{part: dict(getattr(state, part)) for part in parts})


def together(results: list[dict[str, float]], rows: list[int]) -> dict[str, float]:
    """The metrics of several lessons, of so many rows each, as one's: tokens summed, divergences averaged over the
    tokens, and passes over the rows, which went through the model in one of the lessons only."""
    tokens = [metrics["taught_tokens"] for metrics in results]
    merged = dict(results[-1])
    for name in ("kl_before", "kl_after", "residual_left"):
        merged[name] = sum(n * metrics[name] for n, metrics in zip(tokens, results, strict=True)) / sum(tokens)
    for metrics in results:
        merged = {**metrics, **merged}
    merged["taught_tokens"] = sum(tokens)
    passes = sum(n * metrics["forward_passes"] for n, metrics in zip(rows, results, strict=True)) / sum(rows)
    merged["forward_passes"] = round(passes, 2)
    return merged


@torch.no_grad()
def unsaid(network: nn.Module, examples: list[Example], least: float, **options: Any) -> list[int]:
    """The examples whose completion the model, as it is, does not say safely: somewhere the token's lead is
    less than `least` nats."""
    gold = torch.tensor([token for e in examples for token in e.targets])
    answer = torch.tensor([k >= e.header for e in examples for k in range(e.taught)])
    positions = [e.taught for e in examples]

    def compare(order: Tensor, logits: Tensor, _: Tensor) -> dict[str, Tensor]:
        short = margins(logits, gold[order].to(logits.device))[0].cpu() < least
        return {"wrong": short & answer[order]}

    wrong = forward_pass(network, [e.bare_ids for e in examples], positions, {}, on_logits=compare, **options)["wrong"]
    return [i for i, part in enumerate(wrong.split(positions)) if bool(part.any())]
