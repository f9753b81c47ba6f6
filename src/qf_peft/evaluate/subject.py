"""What is taught, asked and measured: a model with one active QF adapter, its tokenizer, and the rows to teach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from huggingface_hub.utils import are_progress_bars_disabled
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..adapter.checks import check_teachable
from ..adapter.model import QFModel
from ..adapter.modes import evaluating
from ..data.ledger import Entry
from ..data.rows import Encoder, Row
from ..forward.generation import generate
from ..runtime.processes import is_main, world_size
from .metrics import Evaluator, Metric


class Settings(Protocol):
    """As far as asking goes; see [`QFTrainingArguments`]."""

    batch_tokens: int
    max_new_tokens: int
    disable_tqdm: bool

    def to_dict(self) -> dict[str, Any]: ...


class RowsBar(tqdm):
    """One that parts of a row move, too: what they add up to is rounded, as beyond its end it would warn."""

    def update(self, n: float = 1) -> bool | None:
        return super().update(round(self.n + n, 6) - self.n)


class Subject(ABC):
    """A model and what is to be said of its adapter. [`QFTrainer`] is one."""

    model: PeftModel
    adapter_name: str
    args: Settings
    encoder: Encoder
    rows: list[Row]
    """What is taught, or to be."""
    dataset: Sequence[Mapping[str, Any]]
    """The rows as they were given, with columns such as `paraphrases`."""
    metrics: dict[str, float]
    """Of the last lesson."""
    trackers: Any
    """Where metrics go besides, if anywhere."""

    @abstractmethod
    def train(self) -> dict[str, float]:
        """Teach the rows."""

    @abstractmethod
    def forget(self, which: str | Iterable[str] | Callable[[Entry], bool]) -> dict[str, float]:
        """Take back what was taught."""

    @abstractmethod
    def evaluate(
        self,
        locality: Iterable[Any] | None = None,
        unknown: Iterable[Any] | None = None,
        text: str | Iterable[str] | None = None,
    ) -> dict[str, Metric | float]:
        """Ask the model as it is now, and compare with the base model."""

    @property
    def tuner(self) -> QFModel:
        return self.model.base_model

    @property
    def network(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it."""
        return self.model.get_base_model()

    @property
    def pass_options(self) -> dict[str, Any]:
        """What every forward pass takes."""
        return {"batch_tokens": self.args.batch_tokens, "pad_id": self.encoder.tokenizer.pad_token_id}

    @property
    def facts(self) -> tuple[Entry, ...]:
        """The ledger: what the adapter was taught, in order, with ids and dates."""
        taught = self.tuner.taught.get(self.adapter_name)
        return taught.entries if taught is not None else ()

    def evaluator(self, progress: tqdm, most_tokens: int | None = None) -> Evaluator:
        """Asks the model with these settings; in fewer tokens than they allow, where `most_tokens` says so."""
        tokens = min(self.args.max_new_tokens, most_tokens or self.args.max_new_tokens)
        return Evaluator(
            self.network, self.encoder, batch_tokens=self.args.batch_tokens, max_new_tokens=tokens,
            progress=progress.update,
        )  # fmt: skip

    def answers(self, rows: list[Row], instructed: bool, progress: tqdm) -> list[tuple[str, bool]]:
        """The base model's own answers, and whether each ended."""
        progress.total = (progress.total or 0) + len(rows) // world_size()
        with self.tuner.without_adapters():
            return generate(
                self.network,
                self.encoder.tokenizer,
                [self.encoder.prompt_ids(row, instructed=instructed) for row in rows],
                max_new_tokens=self.args.max_new_tokens,
                batch_tokens=self.args.batch_tokens,
                progress=progress.update,
            )

    def completed(self, progress: tqdm, rows: list[Row]) -> list[Row]:
        """The rows, those without a completion answered by the base model in context."""
        open_rows = [row for row in rows if row.completion is None]
        if not open_rows:
            return rows
        answers = self.answers(open_rows, True, progress)
        completions = {}
        for row, (text, ended) in zip(open_rows, answers, strict=True):
            if not text:
                raise ValueError(f"row {row.index}: the model answers nothing in context; give the row a completion")
            if not ended:
                raise ValueError(
                    f"row {row.index}: the model's own answer does not end within {self.args.max_new_tokens} tokens; "
                    "give the row a completion or raise max_new_tokens"
                )
            completions[row.index] = text
        return [replace(row, completion=completions.get(row.index, row.completion)) for row in rows]

    @contextmanager
    def progress(self, doing: str = "Teaching") -> Iterator[tqdm]:
        """A progress bar; parts of a row count too."""
        off = self.args.disable_tqdm or are_progress_bars_disabled() or not is_main()
        with RowsBar(desc=doing, unit="row", unit_scale=True, delay=2, leave=False, disable=off) as bar:
            yield bar

    @contextmanager
    def asking(self) -> Iterator[tqdm]:
        """The model, if it is fit, in evaluation mode, run by no other thread meanwhile (which would meet it without
        its adapter), and a progress bar."""
        with self.tuner.serving.changing():
            check_teachable(self.model, self.adapter_name)
            with evaluating(self.network), self.progress("Asking") as progress:
                yield progress
