"""What lessons did, measured: token by token, block by block, and fact by fact over time.

Every function takes a [`QFTrainer`] and speaks of all that its adapter was taught (the ledger) and of the trainer's own
rows; it leaves the adapter as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.checks import check_teachable
from ..adapter.model import adapters_off
from ..data.ledger import asked
from ..data.rows import Row
from ..forward.blocks import find_blocks, split_path
from ..forward.capture import Batch, Point, forward_pass, gather
from ..teaching.targets import divergence
from ..teaching.trainer import QFTrainer, _evaluating
from .coloured import Token, ansi, html
from .metrics import Evaluator, Metric, normalise, proportion
from .plots import bars, lines

_GROUPS = 10  # of facts in the order in which they were taught


@dataclass(frozen=True)
class TokenRow:
    """A row's predicted tokens, with how far the model is at each from the prediction it makes with the instruction."""

    row: Row
    tokens: tuple[Token, ...]

    @property
    def before(self) -> float:
        """Mean KL in nats over the answer's tokens, base model."""
        return _mean([token.before for token in self.tokens if token.answer])

    @property
    def after(self) -> float:
        """The same, now."""
        return _mean([token.after for token in self.tokens if token.answer])

    def __str__(self) -> str:
        """The tokens with their KL before and now as numbers."""
        return " ".join(f"{token.shown}({token.before:.2f}→{token.after:.2f})" for token in self.tokens)

    def ansi(self) -> str:
        """Two lines for a terminal of 256 colours: the more a token's background glows, the more it needed the
        instruction before, and needs it now."""
        return f"before {ansi(self.tokens, 'before')}\nnow    {ansi(self.tokens, 'after')}"

    def html(self) -> str:
        """The same as two lines of HTML, escaped; a token's numbers are its tooltip."""
        return (
            '<div style="font-family: monospace; white-space: pre-wrap; margin: .6em 0">'
            f"before {html(self.tokens, 'before')}<br>now    {html(self.tokens, 'after')}</div>"
        )

    _repr_html_ = html


@dataclass(frozen=True)
class BlockShare:
    """What the adapter's modules in one block wrote into the residual stream at the answers' positions."""

    block: int
    modules: tuple[str, ...]
    size: float
    """Its norm over the stream's there (root mean squares over the positions)."""
    share: float
    """Its part in the change of the last block's output: Σ ⟨written, change⟩ / Σ ‖change‖²."""


@dataclass(frozen=True)
class LayerShares:
    blocks: tuple[BlockShare, ...]
    response: float
    """What is left of the final change: how the base model's own blocks answered to what was written before them."""

    def svg(self) -> str:
        """A bar for each block's share and one for the response."""
        labels = [*(str(b.block) for b in self.blocks), "response"]
        values = [*(b.share for b in self.blocks), self.response]
        return bars("Part of each block in the final change", labels, values, "block")

    _repr_svg_ = svg


@dataclass(frozen=True)
class Group:
    """Facts taught one after another."""

    first: str
    """When the first was taught, in UTC (ISO 8601)."""
    last: str
    start: int
    """The first one's place in the ledger, from 0."""
    recall: Metric


@dataclass(frozen=True)
class Retention:
    """Recall by when facts were taught, the oldest first."""

    groups: tuple[Group, ...]

    def svg(self) -> str:
        labels = [
            f"{g.start + 1}" + (f"–{g.start + g.recall.count}" if g.recall.count > 1 else "") for g in self.groups
        ]
        recall = [g.recall for g in self.groups]
        return lines("Recall by order of teaching", labels, {"recall": recall}, "facts, the oldest first")

    _repr_svg_ = svg


def known_rows(trainer: QFTrainer) -> list[Row]:
    """All that the adapter was taught, in the ledger's order, and the trainer's own rows: in the place of what the
    ledger has for the same prompt, else behind it. Those without a completion the base model answers in context.

    Raises:
        ValueError: there is nothing of either.
    """
    rows = {asked(e): e.row() for e in trainer.facts}
    with _asking(trainer) as progress:
        rows.update({asked(row): row for row in (trainer._completed(progress) if trainer.rows else [])})
    if not rows:
        raise ValueError("there is nothing to show: the adapter's ledger is empty and train_dataset is missing")
    return list(rows.values())


@torch.no_grad()
def token_divergences(trainer: QFTrainer, rows: Sequence[Row] | None = None) -> list[TokenRow]:
    """For every predicted token of the taught rows the KL divergence, in nats, from the base model's prediction with
    the instruction in context to the prediction without it: by the base model (`before`) and by the model as it is now
    (`after`). A large first number is a token that needed the instruction; the second is what is left to be learnt.

    Three passes of the rows.

    Args:
        trainer: whose rows and adapter.
        rows: by default [`known_rows`].

    Raises:
        ValueError: nothing was taught and there is nothing to teach.
    """
    rows = known_rows(trainer) if rows is None else rows
    with _asking(trainer):
        examples = [trainer.encoder.encode(row) for row in rows]
        kept, bare = [e.taught for e in examples], [e.bare_ids for e in examples]
        network, options = trainer._network, _options(trainer)

        def compare(order: Tensor, now: Tensor, told: Tensor) -> dict[str, Tensor]:
            return {"kl": divergence(told.log_softmax(-1), now.log_softmax(-1)).cpu()}

        with trainer._tuner.without_adapters():
            head = {"head": Point(network.get_output_embeddings(), "input")}
            told = forward_pass(network, [e.context_ids for e in examples], kept, head, **options)["head"]
            before = forward_pass(network, bare, kept, {}, head_inputs=told, on_logits=compare, **options)["kl"]
        after = forward_pass(network, bare, kept, {}, head_inputs=told, on_logits=compare, **options)["kl"]
    found = []
    for row, example, old, new in zip(rows, examples, before.split(kept), after.split(kept), strict=True):
        texts = _pieces(trainer.encoder.tokenizer, example.targets)
        answer = [k >= example.header for k in range(example.taught)]
        parts = zip(texts, old.tolist(), new.tolist(), answer, strict=True)
        found.append(TokenRow(row, tuple(Token(*part) for part in parts)))
    return found


@torch.no_grad()
def layer_shares(trainer: QFTrainer, rows: Sequence[Row] | None = None) -> LayerShares:
    """What each block's adapter contributes at the answers of the taught rows.

    In one bare pass each edited block is run a second time on the same input with its adapter off: the difference is
    what the adapter writes there, whatever modules it changes and whatever norms and multipliers stand behind them. Its
    share is its component along the change that the whole adapter makes to the last block's output (another bare pass,
    adapter off). Shares and response sum to 1; a share may be negative.

    Raises:
        ValueError: nothing was taught and there is nothing to teach.
    """
    rows = known_rows(trainer) if rows is None else rows
    tuner, network, (_, blocks) = trainer._tuner, trainer._network, find_blocks(trainer._network)
    edited: dict[int, list[str]] = {}
    for name in tuner.layers(trainer.adapter_name):
        edited.setdefault(split_path(name)[1], []).append(split_path(name)[2])
    with _asking(trainer):
        examples = [trainer.encoder.encode(row) for row in rows]
        kept, bare, options = [e.taught for e in examples], [e.bare_ids for e in examples], _options(trainer)
        counts = torch.tensor([k >= e.header for e in examples for k in range(e.taught)])
        last = {"last": Point(blocks[-1], "output")}
        with tuner.without_adapters():
            base = forward_pass(network, bare, kept, last, **options)["last"]
        sums = _Sums(blocks, edited, base, counts)
        with sums.watching():
            forward_pass(network, bare, kept, {}, on_batch=sums.begin, whole=True, **options)
    found = []
    for index, modules in edited.items():
        share = sums.along[index] / sums.change if sums.change else 0.0
        size = math.sqrt(sums.written[index] / sums.stream[index]) if sums.stream[index] else 0.0
        found.append(BlockShare(index, tuple(modules), size, share))
    response = 1 - sum(b.share for b in found) if sums.change else 0.0
    return LayerShares(tuple(found), response)


class _Sums:
    """Sums over the answers' positions, gathered a batch by hooks on the blocks."""

    def __init__(self, blocks: nn.ModuleList, edited: Iterable[int], base: Tensor, counts: Tensor) -> None:
        self.blocks, self.edited, self.base, self.counts = blocks, set(edited), base, counts
        self.along, self.written, self.stream = (dict.fromkeys(edited, 0.0) for _ in range(3))
        self.change = 0.0
        self._batch: Batch | None = None
        self._here: dict[int, Tensor] = {}
        self._again = False

    def begin(self, batch: Batch) -> None:
        self._batch, self._here = batch, {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        watched = sorted({*self.edited, len(self.blocks) - 1})
        handles = [self.blocks[i].register_forward_hook(self._see(i), with_kwargs=True) for i in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _kept(self, output: Tensor | tuple) -> Tensor:
        values = gather(output if isinstance(output, Tensor) else output[0], self._batch)
        return values[self.counts[self._batch.order].to(values.device)].double().cpu()

    def _see(self, index: int):
        def hook(block: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            if self._again:
                return
            now = self._kept(output)
            if index in self.edited:
                self._again = True
                try:
                    with adapters_off(block):
                        plain = self._kept(block(*args, **kwargs))
                finally:
                    self._again = False
                self._here[index] = now - plain
                self.written[index] += float((now - plain).square().sum())
                self.stream[index] += float(plain.square().sum())
            if index == len(self.blocks) - 1:
                order = self._batch.order
                change = now - self.base[order.to(self.base.device)].cpu()[self.counts[order]].double()
                self.change += float(change.square().sum())
                for which, written in self._here.items():
                    self.along[which] += float((written * change).sum())

        return hook


@torch.no_grad()
def retention(trainer: QFTrainer, ask: Evaluator | None = None) -> Retention:
    """Ask everything in the ledger, freely, and say what is recalled of the oldest facts up to the newest, in at most
    ten groups of (nearly) equal size.

    Args:
        trainer: whose adapter.
        ask: by default one with the trainer's settings.

    Raises:
        ValueError: the ledger is empty.
    """
    entries = trainer.facts
    if not entries:
        raise ValueError("the ledger is empty: nothing was taught, or what an adapter's file was taught is not known")
    rows = [e.row() for e in entries]
    with _asking(trainer) as progress:
        ask = ask or Evaluator(
            trainer._network, trainer.encoder, batch_tokens=trainer.args.batch_tokens,
            max_new_tokens=trainer.args.max_new_tokens, progress=progress.update,
        )  # fmt: skip
        answers = ask.answers(rows)
    right = [answer == normalise(str(row.completion)) for answer, row in zip(answers, rows, strict=True)]
    count = min(_GROUPS, len(rows))
    ends = [round(len(rows) * k / count) for k in range(count + 1)]
    return Retention(
        tuple(Group(entries[a].date, entries[b - 1].date, a, proportion(right[a:b])) for a, b in pairwise(ends))
    )


@contextmanager
def _asking(trainer: QFTrainer) -> Iterator[Any]:
    """The model in evaluation mode, and a progress bar."""
    check_teachable(trainer.model, trainer.adapter_name)
    with _evaluating(trainer._network), trainer._progress() as progress:
        yield progress


def _options(trainer: QFTrainer) -> dict[str, Any]:
    pad = trainer.encoder.tokenizer.pad_token_id
    return {"batch_tokens": trainer.args.batch_tokens, "pad_id": pad}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character spread over several tokens belongs to its last one."""
    pieces, text = [], ""
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if longer.endswith("\ufffd"):
            pieces.append("\ufffd")
        else:
            pieces.append(longer[len(text) :] if longer.startswith(text) else tokenizer.decode([ids[end - 1]]))
            text = longer
    return pieces
