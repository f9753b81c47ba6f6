"""Honest evaluation: free greedy generation to the model's own stop, never gold tokens, never gold length."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Encoder, Row
from ..forward.generation import generate
from ..forward.unembedding import diverged, head_inputs, log_likelihoods

# By name in `QFTrainer.evaluate`'s result: what it says, and for a result of the adapter itself (not of the base model)
# the set it was measured on, the set's name, and the metric's kind.
RESULTS = {
    "in_context": ("Answered right by the base model with the instruction in context (the ceiling)", None),
    "recall": ("Taught questions answered right", ("taught", "The taught questions", "exact_match")),
    "paraphrase": (
        "The same in other words",
        ("paraphrases", "The taught questions in other words", "exact_match"),
    ),
    "locality": (
        "Other questions still answered right",
        ("locality", "Questions that the base model could answer", "exact_match"),
    ),
    "unknown": (
        "Questions about what nobody taught, answered as before",
        ("unknown", "Questions about what nobody taught", "exact_match"),
    ),
    "kl": (
        "KL divergence from the base model on those others' answers, nats",
        ("others", "Questions about other things", "kl_divergence"),
    ),
    "perplexity_before": ("Perplexity of other text, base model", None),
    "perplexity": ("Perplexity of other text", ("text", "Other text", "perplexity")),
}


@dataclass(frozen=True)
class Metric:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float
    count: int
    """How many answers (or tokens, whose interval is by the answers they are in) it is the mean of."""

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.high) else ""  # none, of a single answer
        return f"{self.value:.3f}{interval} of {self.count}"


def normalise(answer: str) -> str:
    """An answer without the differences that do not count: runs of whitespace, and punctuation at its end."""
    return re.sub(r"[\s.!?。！？]+$", "", " ".join(answer.split()))


def proportion(hits: Sequence[bool]) -> Metric:
    """The share of hits with Wilson's score interval (1927), which holds for few answers and shares near 0 or 1."""
    n, z = len(hits), 1.959964
    p = sum(hits) / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Metric(p, max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n)), n)


def mean(values: Tensor, answers: Sequence[int]) -> Metric:
    """The mean of tokens' values (n) that come in answers of so many tokens each, with an interval that is wide enough
    where the tokens of one answer are alike.

    By the cluster-robust (sandwich) variance of a ratio, Σ_a (Σ_{i in a} (v_i − mean))² / n² with m/(m−1) for m answers
    (Liang and Zeger, 1986), and Student's t with m − 1 degrees of freedom. Of one answer nothing is known: ±∞.
    """
    v, parts = values.cpu().double(), [count for count in answers if count]
    centre, many = float(v.mean()), len(parts)
    if many < 2:
        return Metric(centre, -math.inf, math.inf, len(v))
    sums = torch.stack([part.sum() for part in (v - centre).split(parts)])
    half = _student(many - 1) * float((sums.square().sum() * many / (many - 1)).sqrt()) / len(v)
    return Metric(centre, centre - half, centre + half, len(v))


def _student(freedom: int) -> float:
    """The .975 quantile of Student's t: exact for one and two degrees of freedom, else by its expansion around the
    normal one (Abramowitz and Stegun 26.7.5), within .2%."""
    if freedom <= 2:
        return (12.706205, 4.302653)[freedom - 1]
    z, f = 1.959964, freedom
    terms = (
        (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )  # fmt: skip
    return z + sum(term / f**power for power, term in enumerate(terms, 1))


class Evaluator:
    """Asks a model and compares its answers.

    Args:
        network: a causal language model, with or without adapters.
        encoder: its tokenizer's.
        batch_tokens: tokens at once, padding included.
        max_new_tokens: an answer that has not ended by then counts as wrong.
        progress: called with the number of prompts done.
    """

    def __init__(
        self,
        network: nn.Module,
        encoder: Encoder,
        *,
        batch_tokens: int = 4096,
        max_new_tokens: int = 64,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.network, self.encoder = network, encoder
        self.batch_tokens, self.max_new_tokens, self.progress = batch_tokens, max_new_tokens, progress

    def answered(self, rows: Sequence[Row], instructed: bool = False) -> list[tuple[str, bool]]:
        """The answers to the rows' prompts, with or without instruction, and whether each ended."""
        return generate(
            self.network,
            self.encoder.tokenizer,
            [self.encoder.prompt_ids(row, instructed) for row in rows],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            progress=self.progress,
        )

    def answers(self, rows: Sequence[Row], instructed: bool = False) -> list[str | None]:
        """The same, normalised; None where one did not end."""
        return [normalise(text) if ended else None for text, ended in self.answered(rows, instructed)]

    def right(self, rows: Sequence[Row], instructed: bool = False) -> Metric:
        """How often the answer is the row's completion."""
        answers = self.answers(rows, instructed)
        return proportion([a == normalise(r.completion or "") for a, r in zip(answers, rows, strict=True)])

    def head_inputs(self, rows: Sequence[Row]) -> Tensor:
        """What the unembedding reads at the steps that predict the rows' completions: (n, d)."""
        return head_inputs(self.network, *self._answered(rows), **self._options)

    def divergence(self, rows: Sequence[Row], base: Tensor) -> Metric:
        """Mean KL in nats from the predictions that `base` gives (another model's head inputs, n × d) to this one's."""
        sequences, positions = self._answered(rows)
        return mean(diverged(self.network, sequences, positions, base, **self._options), positions)

    def _answered(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[int]]:
        """The rows' token ids, and how many of each are of the completion."""
        pairs = [self.encoder.answer_ids(row, True) for row in rows]
        return [ids for ids, _ in pairs], [n for _, n in pairs]

    @property
    def _options(self) -> dict[str, int]:
        return {"batch_tokens": self.batch_tokens, "pad_id": self.encoder.tokenizer.pad_token_id}

    @torch.no_grad()
    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean negative log likelihood of the texts' tokens."""
        pairs = [self.encoder.text_ids(text) for text in texts]
        likelihoods = log_likelihoods(self.network, [ids for ids, _ in pairs], [n for _, n in pairs], **self._options)
        return float((-likelihoods.mean()).exp())


def measure(
    ask: Evaluator,
    rows: Sequence[Row],
    others: Sequence[Row],
    unrelated: Mapping[str, Sequence[Row]],
    texts: Sequence[str],
    base: Callable[[], AbstractContextManager],
) -> dict[str, Metric | float]:
    """What `QFTrainer.evaluate` returns: the taught `rows`, their paraphrases `others`, `unrelated` questions by name
    and the texts, asked of the model as it is and as it is in the context `base()`, without adapters."""
    result: dict[str, Metric | float] = {}
    with base():
        if rows:
            result["in_context"] = ask.right(rows, instructed=True)
        before = {name: ask.answers(questions) for name, questions in unrelated.items()}
        quiet = [
            replace(row, completion=answer)
            for name, questions in unrelated.items()
            for row, answer in zip(questions, before[name], strict=True)
            if answer
        ]
        bare = ask.head_inputs(quiet) if quiet else None
        if texts:
            result["perplexity_before"] = ask.perplexity(texts)
    if rows:
        result["recall"] = ask.right(rows)
    if others:
        result["paraphrase"] = ask.right(others)
    for name, questions in unrelated.items():
        now = ask.answers(questions)
        right = [
            a is not None and a == b and (r.completion is None or a == normalise(r.completion))
            for a, b, r in zip(now, before[name], questions, strict=True)
        ]
        result[name] = proportion(right)
    if bare is not None:
        result["kl"] = ask.divergence(quiet, bare)
    if texts:
        result["perplexity"] = ask.perplexity(texts)
    return result


def paraphrase_rows(rows: Sequence[Row], dataset: Iterable[Any]) -> list[Row]:
    """A row for each of the `paraphrases` (other prompts with the same completion) in the dataset's rows."""
    paraphrased = []
    for row, raw in zip(rows, dataset, strict=True):
        for prompt in raw.get("paraphrases") or []:
            paraphrased.append(Row(row.index, row.instruction, prompt, row.completion))
    return paraphrased


def unrelated_rows(**prompts: Iterable[Any] | None) -> dict[str, list[Row]]:
    """By name the rows of questions whose answers shall stay, as [`prompt_rows`] makes them, where any are given."""
    return {name: prompt_rows(given, name) for name, given in prompts.items() if given is not None}


def prompt_rows(prompts: Iterable[Any], name: str) -> list[Row]:
    """Rows from prompts: strings, or dicts with `prompt` and perhaps the right answer as `completion`.

    Raises:
        ValueError: there are none, or one is of another form; the message names it.
    """
    rows = []
    for index, raw in enumerate(prompts):
        if isinstance(raw, str):
            raw = {"prompt": raw}
        if not hasattr(raw, "get") or not raw.get("prompt"):
            raise ValueError(
                f"{name}, row {index}: expected a prompt, or a dict with 'prompt' and perhaps 'completion'"
            )
        rows.append(Row(index, "", raw["prompt"], raw.get("completion")))
    if not rows:
        raise ValueError(f"{name} is empty; give some prompts or leave it out")
    return rows
