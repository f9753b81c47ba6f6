"""QFTrainer: walks through passes and solves, and installs what they give."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..adapter.checks import active_qf_adapter, check_teachable
from ..adapter.model import QFModel
from ..adapter.saving import weights_sum
from ..data.ledger import Entry, asked, check_consistent, entry, joined
from ..data.rows import Encoder, Example, Row, read_rows
from ..evaluate.metrics import Evaluator, Metric, measure, paraphrase_rows, prompt_rows
from ..forward.blocks import find_blocks, text_config
from ..forward.generation import generate
from ..forward.residual_stream import trace_writers
from ..runtime.processes import all_or_none, check_alike, is_main, start, world_size
from ..runtime.trackers import Trackers
from .arguments import QFTrainingArguments
from .constants import BUDGET_USED, LEAD, SAFE, STRENGTH_RAISED, STRENGTH_TRIES
from .held_out import diverged, head_inputs
from .joint_lesson import JointLesson, suits, writers_late
from .lesson import Learner, together, unsaid
from .module_lesson import ModuleLesson
from .preserved_chats import read_preserve_dataset
from .preserved_keys import Preserved
from .preserved_moments import PreservedMoments, preserved_moments
from .preserved_walk import preserved_and_contrasting
from .standing import split_lessons

logger = logging.get_logger(__name__)

_VERSIONS = 8  # kept for rollback


class QFTrainer:
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
        preserve_dataset (list or `datasets.Dataset`, *optional*): what the model must go on saying: prompts (strings),
            or rows with `prompt` or `messages` (with the answer, or the model's own is taken), or plain `text`. Chats
            of the kind that the model will be used for serve best; a few hundred are enough. Without it the model
            writes chats itself. Their keys are measured once a model and cached on disk.
        processing_class: the model's tokenizer (or a processor that has one). With a chat template rows are put in it;
            without one they are joined as plain text.

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
        preserve_dataset: Iterable[Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        start()
        self.adapter_name = active_qf_adapter(model)
        self.model = model
        self.args = args if args is not None else QFTrainingArguments()
        if not isinstance(self.args, QFTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; expected QFTrainingArguments")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the model's tokenizer")
        if isinstance(train_dataset, Iterator):  # which can be gone through only once
            train_dataset = list(train_dataset)
        self.dataset = train_dataset if train_dataset is not None else []
        self.rows = read_rows(train_dataset) if train_dataset is not None else []
        self.chats = read_preserve_dataset(preserve_dataset) if preserve_dataset is not None else None
        positions = getattr(text_config(self._network), "max_position_embeddings", None)
        self.encoder = Encoder(processing_class, max_length=positions)
        self.metrics: dict[str, float] = {}
        report_to = self.args.report_to
        self._trackers = Trackers(report_to, self.args.to_dict()) if report_to is not None else None

    @property
    def _tuner(self) -> QFModel:
        return self.model.base_model

    @property
    def _learner(self) -> Learner:
        return Learner(self._tuner, self.adapter_name, self._network, self.encoder)

    @property
    def _network(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it."""
        return self.model.get_base_model()

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
            `forward_passes` (how often the rows went through the model, in
            units of its depth) and `seconds`.

        Raises:
            ValueError: there are no rows, one cannot be expressed or is too long, two contradict each other, or the
                adapter is merged or switched off.
            FloatingPointError: the model's activations are not finite on a row.
        """
        with self._version() as progress:
            if not self.rows:
                raise ValueError("train_dataset is missing; give a list of dicts or a datasets.Dataset")
            rows = self._completed(progress)
            check_consistent(rows)
            answers = {asked(row): row.completion for row in rows}
            if any(answers.get(asked(e), e.completion) != e.completion for e in self.facts):
                # A correction: nothing of the old answer is left where it was never taught.
                rest = [e.row() for e in self.facts if asked(e) not in answers]
                self._reset()
                self._teach(rest + rows, progress)
            else:
                self._teach(rows, progress)
                self._rehearse({*answers}, progress)
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
        with self._version() as progress:
            check_alike(lambda: {"choice of facts": sorted(gone)})
            rest = [e.row() for e in self.facts if e.id not in gone]
            self._reset()
            self.metrics = {"facts": 0}
            if rest:
                self._teach(rest, progress)
        return self._tracked("train", {**self.metrics, "forgotten": len(gone)})

    def rollback(self) -> None:
        """Return to the adapter before the last `train`, `forget` or `consolidate`, bit for bit. The last eight are
        kept with the model in memory, not in files.

        Raises:
            ValueError: there is none.
        """
        with self._tuner.serving.changing():
            versions = self._tuner.versions.get(self.adapter_name)
            if not versions:
                raise ValueError(f"the adapter {self.adapter_name!r} has no earlier version in this session")
            self._tuner.restore(self.adapter_name, versions.pop())

    @property
    def facts(self) -> tuple[Entry, ...]:
        """The ledger: what the adapter was taught, in order, with ids and dates."""
        taught = self._tuner.taught.get(self.adapter_name)
        return taught.entries if taught is not None else ()

    def _reset(self) -> None:
        """Make the adapter what it was before its first lesson, or where its weights were changed by others."""
        taught = self._tuner.taught.pop(self.adapter_name, None)
        self._tuner.clear(self.adapter_name)
        if taught is not None and taught.foundation:
            self._tuner.install(self.adapter_name, taught.foundation)

    def _teach(self, rows: list[Row], progress: tqdm) -> None:
        """Teach rows beside what binds, and note them."""
        start, known = time.perf_counter(), len(self.facts)
        joint = self.joint([self.encoder.encode(rows[0])])
        moments = self._moments(progress) if joint else None
        chats = (None, None) if joint else self._preserved(len(rows), progress)
        kept = moments or chats[0]
        prompts = [p for p in kept.prompts if p is not None] if kept and self.args.standing else []
        lessons = split_lessons(rows, prompts, lambda asked, told: self._answers(asked, told, progress))
        progress.total = progress.n + 3 * sum(len(taught) for taught, _ in lessons) // world_size()
        results, misread, entries, missed = [], [], [], []
        own = {id(row) for row in rows}  # the others are preserved chats, taught with a standing instruction
        held = self._tuner.taught.get(self.adapter_name)
        styled = (held is not None and held.styled) or any(standing for _, standing in lessons)
        for taught, standing in lessons:
            if joint and not standing:
                lesson = JointLesson(self._learner, taught, moments, self.args, progress.update)
                metrics, unread, unsaid_now = lesson.run()
            elif standing or chats[0] is None or not chats[0].held_out:
                metrics, unread, unsaid_now = self._swept(taught, standing, chats, self.args, progress)
            else:
                metrics, unread, unsaid_now = self._swept_gently(taught, chats, self.args, styled, progress)
            results.append(metrics)
            misread += [taught[i] for i in unread if id(taught[i]) in own]
            missed += [taught[i] for i in unsaid_now if id(taught[i]) in own]
            entries += [entry(row, standing) for row in taught if id(row) in own]
        now = self._tuner.taught[self.adapter_name]
        entries = joined(now.entries, entries)
        rehearsed = now.rehearsed if known else len(entries)
        self._tuner.taught[self.adapter_name] = replace(now, entries=entries, rehearsed=rehearsed)
        if misread:
            logger.warning(
                f"{len(misread)} of {len(rows)} rows are not read in context: with its instruction the model gives "
                f"another answer than the completion (rows {_shown(misread)})"
            )
        gently = joint or any(m.get("strength", 0) > self.args.preserve_strength for m in results)
        if gently and missed:
            allowed = self.args.divergence_of(len(entries))
            logger.warning(
                f"{len(missed)} of {len(rows)} rows are not said after the lesson (rows {_shown(missed)}): they do not "
                f"fit beside what is preserved, at max_divergence={allowed:.2g}; raise it, give other "
                "wordings of their questions, or teach fewer rows at once"
            )
        beside = sum(len(taught) for taught, _ in lessons) - len(rows)
        self.metrics = {
            "facts": len(rows), "chats": beside, **together(results), "unread": len(misread), "unsaid": len(missed),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _swept(
        self, taught: list[Row], standing: bool, chats: tuple, args: QFTrainingArguments, progress: tqdm
    ) -> tuple[dict[str, float], list[int], list[int]]:
        """Teach rows module by module, and those that the model does not say yet again. Returns metrics, the rows it
        does not read in context, and those that it does not say at last."""
        known, chosen = len(self.facts), list(range(len(taught)))
        metrics, unread = {}, []
        for sweep in range(1 if standing else args.sweeps):
            lesson = ModuleLesson(
                self._learner, [self.encoder.encode(taught[i]) for i in chosen], args, progress.update,
                chats=chats, standing=standing, earlier=known + len(taught) * (sweep > 0), again=sweep > 0,
            )  # fmt: skip
            found, misread, missed = lesson.run()
            if sweep == 0:
                metrics, unread = found, misread
            else:
                metrics["forward_passes"] += found["forward_passes"] * len(chosen) / len(taught)
            chosen = [chosen[i] for i in missed]
            if not chosen:
                break
        return metrics, unread, chosen

    def _swept_gently(
        self,
        taught: list[Row],
        chats: tuple[Preserved, Preserved | None],
        args: QFTrainingArguments,
        styled: bool,
        progress: tqdm,
    ) -> tuple[dict[str, float], list[int], list[int]]:
        """As `_swept`, but where the chats held out diverge more than is allowed, anew with more weight on what is
        preserved."""
        kept, before = chats[0], self._tuner.version(self.adapter_name)
        options = {"batch_tokens": args.batch_tokens, "pad_id": self.encoder.tokenizer.pad_token_id}
        allowed = args.divergence_of(len({asked(e) for e in self.facts} | {asked(row) for row in taught}))
        with nullcontext() if styled else self._tuner.without_adapters():
            head = head_inputs(self._network, kept.held_out, kept.answers, **options)
        strength, harmful, fitting = args.preserve_strength, None, None
        for left in reversed(range(STRENGTH_TRIES)):
            found = self._swept(taught, False, chats, replace(args, preserve_strength=strength), progress)
            kl = diverged(self._network, kept.held_out, kept.answers, head, **options)
            state = strength, found, kl, self._tuner.version(self.adapter_name)
            if kl.mean() > allowed:
                harmful = strength
            else:
                fitting = state
                if harmful is None or kl.mean() >= BUDGET_USED * allowed:
                    break
            if not left:
                break
            if fitting is not None:
                strength = math.sqrt(harmful * fitting[0])
            else:
                strength *= min(max(float(kl.mean()) / allowed, STRENGTH_RAISED[0]), STRENGTH_RAISED[1])
            self._tuner.restore(self.adapter_name, before)
        strength, (metrics, unread, missed), kl, version = fitting or state
        self._tuner.restore(self.adapter_name, version)
        worst = max(part.mean() for part in kl.split(list(kept.answers)))
        taught_now = self._tuner.taught[self.adapter_name]
        self._tuner.taught[self.adapter_name] = replace(taught_now, settings=self.args.to_dict())
        metrics.update(kl_preserved=float(kl.mean()), kl_preserved_worst=float(worst), strength=strength)
        return metrics, unread, missed

    def _rehearse(self, new: set[str], progress: tqdm) -> None:
        """Once the ledger has grown enough, teach again those of its entries that the model no longer says."""
        taught = self._tuner.taught[self.adapter_name]
        rows = [e.row() for e in taught.entries if not e.standing and asked(e) not in new]
        growth = self.args.rehearse
        if not rows or not growth or self.args.preserve_strength == 0 or taught.facts < growth * taught.rehearsed:
            return
        start = time.perf_counter()
        self._tuner.taught[self.adapter_name] = replace(taught, rehearsed=taught.facts)
        examples = [self.encoder.encode(row) for row in rows]
        joint, pad = self.joint(examples), self.encoder.tokenizer.pad_token_id
        for _ in range(1 if joint else self.args.sweeps):
            missed = unsaid(
                self._network, examples, LEAD if joint else SAFE, batch_tokens=self.args.batch_tokens, pad_id=pad
            )
            rows, examples = [rows[i] for i in missed], [examples[i] for i in missed]
            if not examples:
                break
            if joint:
                JointLesson(self._learner, rows, self._moments(progress), self.args, progress.update).run()
            else:
                chats, once = self._preserved(len(rows), progress), replace(self.args, sweeps=1)
                if chats[0] is not None and chats[0].held_out:
                    self._swept_gently(rows, chats, once, taught.styled, progress)
                else:
                    self._swept(rows, False, chats, once, progress)
        self.metrics["seconds"] += time.perf_counter() - start
        self.metrics["rank"] = self.model.peft_config[self.adapter_name].r

    @torch.no_grad()
    def prepare(self) -> None:
        """Make and cache ahead what does not depend on the facts: the preserved chats' keys and the model's own chats.

        `train()` does it where it has not been done. It is the slow part the first time a model is taught.
        """
        with all_or_none(), self._ready() as progress:
            if self.joint([]):
                self._moments(progress)
            else:
                self._preserved(len(self.rows), progress)

    @torch.no_grad()
    def evaluate(
        self,
        locality: Iterable[Any] | None = None,
        unknown: Iterable[Any] | None = None,
        text: str | Iterable[str] | None = None,
    ) -> dict[str, Metric | float]:
        """Ask the model as it is now, freely and greedily, until it stops itself; compare with the base model.

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
            kept = {
                name: prompt_rows(prompts, name)
                for name, prompts in (("locality", locality), ("unknown", unknown))
                if prompts is not None
            }
            texts = [text] if isinstance(text, str) else list(text) if text is not None else []
            if not (self.rows or any(kept.values()) or texts):
                raise ValueError("there is nothing to evaluate; give rows to the trainer, or locality, unknown or text")
            check_alike(lambda: {"questions": [kept, texts]})
            rows = self._completed(progress)
            ask = Evaluator(
                self._network, self.encoder, batch_tokens=self.args.batch_tokens,
                max_new_tokens=self.args.max_new_tokens, progress=progress.update,
            )  # fmt: skip
            found = measure(ask, rows, paraphrase_rows(rows, self.dataset), kept, texts, self._tuner.without_adapters)
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
            needed all sweeps).

        Raises:
            ValueError: what `train()` would raise of the rows and the adapter's state.
        """
        from .plan import plan

        return plan(self)

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
        from ..evaluate.report import write_report

        return write_report(self, path, locality=locality, unknown=unknown, text=text, strengths=strengths)

    def _tracked(self, group: str, metrics: dict) -> dict:
        """Metrics, sent to the trackers of `report_to`."""
        if self._trackers is not None:
            self._trackers.log(group, metrics)
        return metrics

    def joint(self, examples: list[Example]) -> bool:
        """Whether lessons are solved jointly (see `joint_lesson.py`): two passes of a few tokens of the first of the
        examples, or of a question where there are none."""
        question = Row(0, "", "Who are you?", None)
        ids = examples[0].bare_ids if examples else self.encoder.prompt_ids(question, instructed=False)
        blocks, names = find_blocks(self._network)[1], list(self._tuner.layers(self.adapter_name))
        with self._tuner.without_adapters():
            trace_writers(self._network, blocks, names, ids[:8], self._tuner.writers)
            return suits(self._network, names, blocks, self._tuner.writers, ids[:8], self.args)

    def _moments(self, progress: tqdm) -> PreservedMoments:
        names, depth = list(self._tuner.layers(self.adapter_name)), len(find_blocks(self._network)[1])
        layers = self._tuner.layers(self.adapter_name)
        late = {name: layers[name] for name in writers_late(names, self._tuner.writers, depth)}
        with self._tuner.without_adapters():
            return preserved_moments(
                self._network, self.encoder, late, self.chats, self.args.preserve_chats,
                batch_tokens=self.args.batch_tokens, seed=self.args.seed, cache_dir=self.args.cache_dir,
                progress=progress.update,
            )  # fmt: skip

    def _preserved(self, rows: int, progress: tqdm) -> tuple[Preserved | None, Preserved | None]:
        return preserved_and_contrasting(self._learner, self.chats, self.args, rows, len(self.facts), progress.update)

    def _answers(self, rows: list[Row], instructed: bool, progress: tqdm) -> list[tuple[str, bool]]:
        """The base model's own answers, and whether each ended."""
        progress.total = (progress.total or 0) + len(rows) // world_size()
        with self._tuner.without_adapters():
            return generate(
                self._network,
                self.encoder.tokenizer,
                [self.encoder.prompt_ids(row, instructed=instructed) for row in rows],
                max_new_tokens=self.args.max_new_tokens,
                batch_tokens=self.args.batch_tokens,
                progress=progress.update,
            )

    def _completed(self, progress: tqdm) -> list[Row]:
        """The rows, those without a completion answered by the base model in context."""
        open_rows = [row for row in self.rows if row.completion is None]
        if not open_rows:
            return self.rows
        answers = self._answers(open_rows, True, progress)
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
        return [replace(row, completion=completions.get(row.index, row.completion)) for row in self.rows]

    @contextmanager
    def _progress(self) -> Iterator[tqdm]:
        off = self.args.disable_tqdm or are_progress_bars_disabled() or not is_main()
        with tqdm(desc="Teaching", unit="row", delay=2, leave=False, disable=off) as bar:
            yield bar

    @contextmanager
    def _ready(self) -> Iterator[tqdm]:
        """No other thread runs the model, which is fit, in evaluation mode, and the same in all processes."""
        with self._tuner.serving.changing():
            check_teachable(self.model, self.adapter_name)
            check_alike(
                lambda: {
                    "adapter": [
                        self.adapter_name,
                        [e.id for e in self.facts],
                        weights_sum(p for n, p in self.model.named_parameters() if "lora_" in n),
                    ],
                    "args": self.args.to_dict(),
                    "train_dataset": [vars(row) for row in self.rows],
                    "preserve_dataset": [vars(chat) for chat in self.chats or []],
                }
            )
            with _evaluating(self._network), self._progress() as progress:
                yield progress

    @contextmanager
    def _version(self) -> Iterator[tqdm]:
        """Change the adapter, as one version: what it was before is kept for `rollback`, or put back if this fails."""
        with self._tuner.serving.changing():
            tuner, before, metrics = self._tuner, self._tuner.version(self.adapter_name), self.metrics
            try:
                with all_or_none(), self._ready() as progress:
                    yield progress
            except BaseException:
                tuner.restore(self.adapter_name, before)
                self.metrics = metrics
                raise
            tuner.versions[self.adapter_name] = [*tuner.versions.get(self.adapter_name, []), before][-_VERSIONS:]


def _shown(rows: list[Row]) -> str:
    """Rows by number or, from the ledger, by prompt; the first twenty."""
    shown = ", ".join(str(row.index) if row.index >= 0 else repr(row.prompt) for row in rows[:20])
    return shown + (", …" if len(rows) > 20 else "")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
