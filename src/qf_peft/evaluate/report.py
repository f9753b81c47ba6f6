"""One self-contained HTML page about what an adapter was taught and how it does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..adapter.checks import check_teachable
from ..adapter.description import base_model_id, blocks_in_words, versions
from ..adapter.modes import evaluating
from ..data.ledger import question_key
from ..data.rows import Row, Text
from ..data.writing import saving_to, whole_file
from .attribution import Attribution, Influence
from .known import known_rows
from .metrics import RESULTS, Evaluator, Metric, measure, normalise, paraphrase_rows, unrelated_rows
from .retention import Retention, retention
from .shares import layer_shares
from .subject import Subject
from .sweeps import Sweep, strength_sweep
from .token_divergences import TokenRow, token_divergences

TEMPLATE = "report_template.html"


@dataclass(frozen=True)
class Answers:
    """A question and what was said to it."""

    row: Row
    before: str
    """By the base model."""
    in_context: str
    """By the base model with the instruction; empty where there is none."""
    now: str
    right: bool
    tokens: TokenRow | None
    taught: str
    """When, or "" if it was not."""
    acting: tuple[Influence, ...] = ()
    """The taught facts that acted on an answer that was not kept."""

    @property
    def instruction(self) -> str:
        return in_words(self.row.instruction)

    @property
    def prompt(self) -> str:
        return in_words(self.row.prompt)

    @property
    def expected(self) -> str | None:
        return self.row.completion


class _Remembering(Evaluator):
    """Asks each question once of each of the two models, the base (in `base()`) and the present one."""

    def __init__(self, trainer: Subject, **options: Any) -> None:
        args = trainer.args
        super().__init__(
            trainer.network, trainer.encoder, batch_tokens=args.batch_tokens,
            max_new_tokens=args.max_new_tokens, **options,
        )  # fmt: skip
        self._tuner, self._based = trainer.tuner, False
        self._known: dict[tuple[bool, bool, str, str], tuple[str, bool]] = {}

    @contextmanager
    def base(self) -> Iterator[None]:
        with self._tuner.without_adapters():
            self._based = True
            try:
                yield
            finally:
                self._based = False

    def answered(self, rows: Sequence[Row], instructed: bool = False) -> list[tuple[str, bool]]:
        keys = [
            (self._based, instructed, repr(row.instruction) if instructed else "", question_key(row)) for row in rows
        ]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        self._known.update(zip(new, super().answered(list(new.values()), instructed) if new else [], strict=True))
        return [self._known[key] for key in keys]

    def shown(self, rows: Sequence[Row], instructed: bool = False) -> list[str]:
        return [text if ended else f"{text} …" for text, ended in self.answered(rows, instructed)]


@torch.no_grad()
def write_report(
    trainer: Subject,
    path: str | os.PathLike,
    *,
    locality: Iterable[Any] | None = None,
    unknown: Iterable[Any] | None = None,
    text: str | Iterable[str] | None = None,
    strengths: Iterable[float] | None = None,
) -> Path:
    """What [`QFTrainer.report`] does."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder; give the file to write, such as 'report.html'")
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    lists = {name: list(asks) for name, asks in (("locality", locality), ("unknown", unknown)) if asks is not None}
    unrelated = unrelated_rows(**lists)
    texts = [text] if isinstance(text, str) else list(text) if text is not None else []
    with trainer.tuner.serving.changing():  # of one time, and no other thread meets the model without its adapter
        page = _measured(trainer, lists, unrelated, texts, strengths)
    with saving_to(path, "the report"), whole_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _measured(
    trainer: Subject,
    lists: dict[str, list[Any]],
    unrelated: dict[str, list[Row]],
    texts: list[str],
    strengths: Iterable[float] | None,
) -> str:
    """The page, of what is asked and measured now."""
    check_teachable(trainer.model, trainer.adapter_name)
    rows = known_rows(trainer)
    tokens = token_divergences(trainer, rows)
    complete = {question_key(row): row for row in rows}
    others = (
        paraphrase_rows([complete[question_key(row)] for row in trainer.rows], trainer.dataset) if trainer.rows else []
    )
    dates = {(question_key(e), e.completion): e.date for e in trainer.facts}
    with evaluating(trainer.network), trainer.progress("Asking") as progress:
        ask = _Remembering(trainer, progress=progress.update)
        metrics = measure(ask, rows, others, unrelated, texts, ask.base)
        facts = _answered(ask, rows, tokens, dates)
        questions = {name: _answered(ask, asks, None, {}) for name, asks in unrelated.items()}
        kept_over_time = retention(trainer, ask) if trainer.facts else None
    questions = {name: _explained(trainer, answers) for name, answers in questions.items()}
    sweep = strength_sweep(trainer, strengths, **lists) if strengths is not None else None
    return _render(trainer, metrics, facts, questions, kept_over_time, sweep)


def _answered(
    ask: _Remembering, rows: Sequence[Row], tokens: Sequence[TokenRow] | None, dates: dict[tuple[str, str], str]
) -> list[Answers]:
    """Taught rows with `tokens`, whose answer must be the completion; or questions that must be answered as before, and
    with the completion if there is one."""
    taught = tokens is not None
    with ask.base():
        before = ask.shown(rows)
        in_context = ask.shown(rows, instructed=True) if taught else [""] * len(rows)
        base = ask.answers(rows)
    now, answers = ask.shown(rows), ask.answers(rows)
    found = []
    for i, row in enumerate(rows):
        goal = base[i] if row.completion is None else normalise(row.completion)
        right = answers[i] is not None and answers[i] == goal and (taught or answers[i] == base[i])
        shown, date = (tokens[i] if taught else None), dates.get((question_key(row), row.completion), "")
        found.append(Answers(row, before[i], in_context[i], now[i], right, shown, date))
    return found


def _explained(trainer: Subject, questions: list[Answers]) -> list[Answers]:
    """Questions, those not answered as before with the facts that acted on the answer."""
    lost = [i for i, question in enumerate(questions) if not question.right]
    if not (lost and trainer.facts):
        return questions
    prompts = [questions[i].row.prompt for i in lost]
    found = Attribution(trainer).explain(prompts, trainer.args.max_new_tokens)
    acting = {i: explanation.acting for i, explanation in zip(lost, found, strict=True)}
    return [replace(question, acting=acting.get(i, ())) for i, question in enumerate(questions)]


def _render(
    trainer: Subject,
    metrics: dict[str, Metric | float],
    facts: list[Answers],
    questions: dict[str, list[Answers]],
    retained: Retention | None,
    sweep: Sweep | None,
) -> str:
    adapter, config = trainer.adapter_name, trainer.model.peft_config[trainer.adapter_name]
    layers = layer_shares(trainer, [fact.tokens.row for fact in facts])
    taught = trainer.tuner.taught.get(adapter)
    figures = [layers, *([retained] if retained else []), *([sweep] if sweep else [])]
    base = base_model_id(trainer.model, adapter)
    name = base or Path(getattr(trainer.network, "name_or_path", "") or type(trainer.network).__name__).name
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    # Every value is escaped; only our own figures and spans, whose texts are escaped already, are marked as safe.
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.get_template(TEMPLATE).render(
        base_model=name,
        adapter=adapter,
        where=blocks_in_words(list(trainer.tuner.adapter_layers(adapter))).replace("`", ""),
        rank=config.r,
        facts=facts,
        known=len(trainer.facts),
        questions=questions,
        metrics=[(RESULTS[name][0], value) for name, value in metrics.items()],
        lesson=trainer.metrics,
        settings=taught.settings if taught is not None and taught.settings else trainer.args.to_dict(),
        figures=[Markup(figure.svg()) for figure in figures],
        tokens=[Markup(fact.tokens.html()) for fact in facts],
        layers=layers,
        sweep=sweep,
        versions=list(versions()),
        number=_number,
        in_words=in_words,
    )


def in_words(text: Text) -> str:
    """A text, or messages as lines with their roles."""
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _number(value: Metric | float) -> str:
    if isinstance(value, Metric):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
