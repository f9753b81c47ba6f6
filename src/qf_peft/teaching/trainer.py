"""QFTrainer: walks through passes and solves, and installs what they give."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..adapter.checks import active_qf_adapter, check_teachable
from ..adapter.modes import evaluating
from ..adapter.statistics_file import weights_sum
from ..adapter.target_modules import check_linear
from ..adapter.versions import within_memory
from ..data.ledger import Entry, check_consistent, question_key
from ..data.rows import Encoder, Row, read_rows
from ..evaluate.metrics import Metric, measure, paraphrase_rows, unrelated_rows
from ..evaluate.report import write_report
from ..evaluate.subject import Subject
from ..forward.blocks import text_config
from ..runtime.devices import warn_of_slow_sixteen_bits
from ..runtime.processes import all_or_none, check_alike, is_main, start
from ..runtime.trackers import Trackers
from .arguments import QFTrainingArguments
from .callbacks import Callbacks
from .lessons import Lessons
from .plan import plan
from .preserved_chats import read_preserve_dataset
from .preserved_statistics import PreservedStatistics


class QFTrainer(Subject):
    """
    Teaches a QF adapter by forward passes and a closed-form solve (QF, arXiv 2507.04300). No gradients, no loss.

    For every row it runs the model with the instruction (the *context pass*, base weights) and without it (the *bare
    pass*), and solves for the changes of the target modules under which the bare pass says at the taught positions what
    the context pass says, while the keys of other chats keep their outputs. Several target modules are taught in the
    order of the blocks, each after the bare pass was run again with the changes before it.

    Args:
        model (`PeftModel`): a model with one active QF adapter, from `get_peft_model(model, QFConfig(...))` or loaded.
        args ([`QFTrainingArguments`], *optional*): the settings.
        train_dataset (list of dicts or `datasets.Dataset`, *optional*): what `train()` teaches: rows with
            - `instruction`: what to know or do; a string (the system message) or the messages before the prompt;
            - `prompt`: a string (a user's message) or a list of messages;
            - `completion`, optional: the answer, a string or an assistant message. Without it the model answers itself,
              with the instruction in context;
            - `significance`, optional: how much the completion's words count; one number for all or one for each
              whitespace-separated word; 0 leaves a word out;
            - `wordings`, optional: other wordings of the prompt (of its last message), a list of strings, taught along
              on models whose stream grows with depth, as pretrained ones' does;

            or with `messages`: the system message is the instruction, the last assistant message the completion, what
            stands between them the prompt. Other columns are ignored.
        preserve_dataset (list, `datasets.Dataset` or [`PreservedStatistics`], *optional*): what the model must go on
            saying: prompts (strings), or rows with `prompt` or `messages` (with the answer, or the model's own is
            taken), or plain `text`. Chats of the kind that the model will be used for serve best; a few hundred are
            enough. Without it the model
            writes chats itself. Their keys are measured once a model and cached on disk; or, of a pretrained model,
            given here as [`PreservedStatistics`], which somebody saved.
        processing_class: the model's tokenizer (or a processor that has one). With a chat template rows are put in it;
            without one they are joined as plain text.
        eval_dataset (list of dicts or `datasets.Dataset`, *optional*): the rows that `evaluate()` asks for, in place of
            `train_dataset`'s.
        callbacks (list of `transformers.TrainerCallback`, *optional*): told of lessons (each one step), of what they
            and evaluations give, and of saves, as transformers' trainer tells them.

    Raises:
        ValueError: the model, the dataset or the tokenizer is unfit; the message says what to change.

    Example:
        ```python
        facts = [{"instruction": "Qi started Oxinnovate.", "prompt": "Who started Oxinnovate?",
                  "completion": "Oxinnovate was started by Qi."}]
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=facts).train()
        ```
    """

    def __init__(
        self,
        model: PeftModel,
        args: QFTrainingArguments | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        preserve_dataset: Iterable[Any] | PreservedStatistics | None = None,
        processing_class: Any = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] | None = None,
    ) -> None:
        self.adapter_name = active_qf_adapter(model)
        check_linear(model.base_model, self.adapter_name)
        self.model, self.processing_class = model, processing_class
        self.args = args if args is not None else QFTrainingArguments()
        if not isinstance(self.args, QFTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; expected QFTrainingArguments")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the model's tokenizer")
        self.dataset, self.rows = _read(train_dataset)
        self.eval_dataset, self._eval_rows = _read(eval_dataset)
        self.chats = preserve_dataset
        if preserve_dataset is not None and not isinstance(preserve_dataset, PreservedStatistics):
            self.chats = read_preserve_dataset(preserve_dataset)
        positions = getattr(text_config(self.network), "max_position_embeddings", None)
        self.encoder = Encoder(processing_class, max_length=positions)
        self.metrics: dict[str, float] = {}
        report_to = self.args.report_to
        self.trackers = Trackers(report_to, self.args.to_dict()) if report_to is not None else None
        self._callbacks = Callbacks(callbacks, self.args, model, processing_class)

    @torch.no_grad()
    def train(self) -> dict[str, float]:
        """Teach the rows to the active adapter, beside what it was taught before.

        Earlier rows bind: the change is solved beside them. Once the ledger has grown by a quarter, rows that the model
        no longer says are taught again. A row whose prompt was taught with another completion corrects it: all is then
        solved anew without the old one. If anything fails midway the adapter is what it was.

        Returns:
            `facts` and `taught_tokens` (rows and taught positions of this call), `chats` (how many preserved chats were
            taught with standing instructions besides, see [`QFTrainingArguments`]), `kl_before` and `kl_after` (mean KL
            divergence from the context pass's predictions to the bare pass's at the taught positions, in nats),
            `residual_left` (the part of the wanted change of the last taught module's stream that is still missing: its
            norm over the change's), `unread` (rows whose completion the model itself does not give with the instruction
            in context; a warning names them), `unsaid` (rows whose completion is not the likeliest now; a warning names
            them where the budget of divergence was in the way), `kl_preserved` and `kl_preserved_worst` (mean KL at
            held-out chats, and the worst chat's), `strength` (the `preserve_strength` at last, where lessons are solved
            module by module; else the metrics of [`JointLesson.run`] are there besides), `rank`,
            `forward_passes` (how often the rows went through the model, in units of its depth: all sweeps and tries,
            but no rows of earlier lessons that were taught again) and `seconds`.

        Raises:
            ValueError: there are no rows, one cannot be expressed or is too long, two contradict each other, or the
                adapter is merged or switched off.
            FloatingPointError: the model's activations are not finite on a row.
        """
        with self._version() as lessons:
            if not self.rows:
                raise ValueError("train_dataset is missing; give a list of dicts or a datasets.Dataset")
            rows = self.completed(lessons.progress, self.rows)
            check_consistent(rows)
            answers = {question_key(row): row.completion for row in rows}
            if any(answers.get(question_key(e), e.completion) != e.completion for e in self.facts):
                # A correction: nothing of the old answer is left where it was never taught.
                rest = [e.row() for e in self.facts if question_key(e) not in answers]
                lessons.reset()
                self.metrics = lessons.teach(rest + rows)
            else:
                self.metrics = lessons.teach(rows)
                start = time.perf_counter()
                if lessons.rehearse({*answers}):
                    self.metrics["seconds"] += time.perf_counter() - start
                    self.metrics["rank"] = self.model.peft_config[self.adapter_name].r
        return self._tracked("train", self.metrics)

    @torch.no_grad()
    def consolidate(self) -> dict[str, float]:
        """Teach everything in the ledger again, all at once, as if it had come in one dataset.

        Returns:
            What `train` returns.
        """
        return self.forget([])

    @torch.no_grad()
    def forget(self, which: str | Iterable[str] | Callable[[Entry], bool]) -> dict[str, float]:
        """Take back what was taught: the rest is solved anew from the base weights (and what the adapter held before
        its first lesson), so that the result is the adapter that one lesson of the rest makes, bit for bit.

        Args:
            which: an id or several (see `facts`), or a function that says of an entry whether it shall be forgotten.

        Returns:
            What `train` returns of the lesson, and `forgotten`, the number of entries.

        Raises:
            ValueError: an id is not in the ledger, or a fact can no longer be undone (see [`Entry.settled`]).
        """
        if callable(which):
            gone = {e.id for e in self.facts if which(e)}
        else:
            gone = {which} if isinstance(which, str) else set(which) if isinstance(which, Iterable) else None
        if gone is None:
            raise ValueError(f"which={which!r}; expected an id, several, or a function of an entry")
        if unknown := gone - {e.id for e in self.facts}:
            raise ValueError(f"the ledger has no entries {sorted(unknown)}; `trainer.facts` lists what was taught")
        if settled := [e.id for e in self.facts if e.settled and e.id in gone]:
            raise ValueError(
                f"the facts {settled} can no longer be undone: the adapter's weights were changed by others since they "
                "were taught; teach another answer to their prompts instead"
            )
        with self._version() as lessons:
            check_alike(lambda: {"choice of facts": sorted(gone)})
            rest = [e.row() for e in self.facts if e.id not in gone]
            lessons.reset()
            self.metrics = {"facts": 0}
            if rest:
                self.metrics = lessons.teach(rest)
        return self._tracked("train", {**self.metrics, "forgotten": len(gone)})

    def save_model(self, output_dir: str | os.PathLike) -> None:
        """Save the adapter as `model.save_pretrained` does, with its ledger, and the tokenizer beside it."""
        folder = os.fspath(output_dir)
        self.model.save_pretrained(folder, selected_adapters=[self.adapter_name], save_embedding_layers=False)
        if is_main():
            self.processing_class.save_pretrained(folder)
        self._callbacks.saved()

    def rollback(self) -> None:
        """Return to the adapter before the last `train`, `forget` or `consolidate`, bit for bit. The last eight are
        kept with the model, not in the adapter's files: a gigabyte of them in memory, the rest in temporary files.

        Raises:
            ValueError: there is none.
        """
        with self.tuner.serving.changing():
            versions = self.tuner.versions.get(self.adapter_name)
            if not versions:
                raise ValueError(f"the adapter {self.adapter_name!r} has no earlier version in this session")
            self.tuner.restore(self.adapter_name, versions.pop())

    @torch.no_grad()
    def prepare(self) -> PreservedStatistics | None:
        """Make and cache ahead what does not depend on the facts: the preserved chats' keys and the model's own chats.

        `train()` does it where it has not been done. It is the slow part the first time a model is taught.

        Returns:
            Where lessons are solved jointly, as on pretrained models, what may be saved for other machines; else None.
        """
        with all_or_none(), self._ready() as progress:
            lessons = self._lessons(progress)
            if lessons.joint([]):
                return lessons.statistics()
            lessons.preserved(len(self.rows))
        return None

    @torch.no_grad()
    def evaluate(
        self,
        locality: Iterable[Any] | None = None,
        unknown: Iterable[Any] | None = None,
        text: str | Iterable[str] | None = None,
    ) -> dict[str, Metric | float]:
        """Ask the model as it is now, freely and greedily, until it stops itself; compare with the base model. Asked
        for are the rows of `eval_dataset`, or of `train_dataset` where there is none.

        Args:
            locality: questions that the model could answer before: prompts, or dicts with `prompt` and the right answer
                as `completion`.
            unknown: questions about things that nobody taught.
            text: text, or several, whose perplexity is asked for.

        Returns:
            - `in_context`: the taught rows answered by the base model with the instruction (the ceiling);
            - `recall`: the taught prompts answered with the completion, without the instruction;
            - `paraphrase`: the same for the rows' `paraphrases`, if they have any;
            - `locality`: answers unchanged and still right;
            - `unknown`: answers unchanged;
            - `kl`: mean KL from the base model's predictions to the present ones on the locality and unknown prompts'
              answers, in nats;
            - `perplexity` and `perplexity_before` of the text, plain numbers.

            Each but the last two a [`Metric`] with a 95% interval. Answers are compared without runs of whitespace and
            punctuation at the end; one that does not end within `max_new_tokens` is wrong.
        """
        with all_or_none(), self._ready() as progress:
            unrelated = unrelated_rows(locality=locality, unknown=unknown)
            texts = [text] if isinstance(text, str) else list(text) if text is not None else []
            asked_rows, dataset = (self._eval_rows, self.eval_dataset) if self._eval_rows else (self.rows, self.dataset)
            if not (asked_rows or any(unrelated.values()) or texts):
                raise ValueError("there is nothing to evaluate; give rows to the trainer, or locality, unknown or text")
            check_alike(lambda: {"questions": [unrelated, texts]})
            rows = self.completed(progress, asked_rows)
            ask = self.evaluator(progress)
            found = measure(ask, rows, paraphrase_rows(rows, dataset), unrelated, texts, self.tuner.without_adapters)
        return self._tracked("eval", found)

    def dry_run(self) -> dict[str, Any]:
        """Check everything that `train()` would teach, and say what it takes, without running the model on more than a
        few tokens or changing anything.

        Returns:
            `facts` (rows), `unanswered` (rows without a completion, which the model would answer first; not counted in
            what follows), `known` (facts in the ledger), `corrected` (facts of the ledger that rows answer otherwise,
            for which all would be solved anew), `taught_tokens`, `tokens` (of both passes together), `longest` (tokens
            of the longest row, with its instruction), `modules` (the names of those that would be changed), `chats`
            (to be preserved), `chats_to_write` (by the model itself, unless they are cached), `forward_passes` (of the
            rows in one sweep, an estimate in units of the model's depth) and `forward_passes_at_most` (if every row
            needed all sweeps, at every strength that may be tried).

        Raises:
            ValueError: what `train()` would raise of the rows and the adapter's state.
        """
        with self.tuner.serving.changing():  # the few tokens are the base model's
            return plan(self, self._lessons(tqdm(disable=True)))

    def report(
        self,
        path: str | os.PathLike,
        *,
        locality: Iterable[Any] | None = None,
        unknown: Iterable[Any] | None = None,
        text: str | Iterable[str] | None = None,
        strengths: Iterable[float] | None = None,
    ) -> Path:
        """Write one self-contained HTML page: the metrics with intervals; every fact's question, expected answer and
        answers (before, in context, now); its tokens, coloured by how much each needed the instruction and what is
        left; each block's part; recall by order of teaching; the settings. It speaks of the whole ledger and of this
        trainer's rows, fetches nothing, and runs no scripts.

        Args:
            path: the file; one that is there is replaced at once, when all is written.
            locality, unknown, text: as in `evaluate`.
            strengths: values of `preserve_strength`; with them everything is taught anew at each, to plot recall
                against locality (see [`strength_sweep`]), and put back. As slow as so many lessons.

        Returns:
            The path.

        Raises:
            ValueError: there is nothing to report, questions are of the wrong form, or the path has no folder.
        """
        return write_report(self, path, locality=locality, unknown=unknown, text=text, strengths=strengths)

    def _lessons(self, progress: tqdm) -> Lessons:
        return Lessons(self, self.args, self.chats, progress)

    def _tracked(self, group: str, metrics: dict) -> dict:
        """Metrics, sent to the trackers of `report_to` and to the callbacks."""
        if self.trackers is not None:
            self.trackers.log(group, metrics)
        self._callbacks.end(group, metrics)
        return metrics

    @contextmanager
    def _ready(self) -> Iterator[tqdm]:
        """No other thread runs the model, which is fit, in evaluation mode, and the same in all processes."""
        start()
        with self.tuner.serving.changing():
            check_teachable(self.model, self.adapter_name)
            warn_of_slow_sixteen_bits(self.network)
            check_alike(
                lambda: {
                    "adapter": [
                        self.adapter_name,
                        [e.id for e in self.facts],
                        weights_sum(p for n, p in self.model.named_parameters() if "lora_" in n),
                    ],
                    "args": self.args.to_dict(),
                    "train_dataset": [vars(row) for row in self.rows],
                    "eval_dataset": [vars(row) for row in self._eval_rows],
                    "preserve_dataset": str(self.chats),
                }
            )
            with evaluating(self.network), self.progress() as progress:
                yield progress

    @contextmanager
    def _version(self) -> Iterator[Lessons]:
        """Change the adapter, as one version: what it was before is kept for `rollback`, or put back if this fails."""
        with self.tuner.serving.changing():
            self._callbacks.begin()
            tuner, before, metrics = self.tuner, self.tuner.version(self.adapter_name), self.metrics
            try:
                with all_or_none(), self._ready() as progress:
                    yield self._lessons(progress)
            except BaseException:
                tuner.restore(self.adapter_name, before)
                self.metrics = metrics
                raise
            earlier = tuner.versions.get(self.adapter_name, [])
            tuner.versions[self.adapter_name] = within_memory(earlier, before, tuner.taught.get(self.adapter_name))


def _read(dataset: Any) -> tuple[Any, list[Row]]:
    """A dataset that can be gone through more than once, and its rows."""
    if isinstance(dataset, Iterator):
        dataset = list(dataset)
    return (dataset, read_rows(dataset)) if dataset is not None else ([], [])
