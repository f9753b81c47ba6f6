"""QFTrainer: walks through passes and solves, and installs what they give."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .blocks import text_config
from .checks import active_qf_adapter, check_teachable
from .evaluation import Evaluator, Metric, normalise, paraphrase_rows, prompt_rows, proportion
from .generation import generate
from .lesson import Lesson
from .model import QFModel
from .preserve import Preserved, preserved_keys, read_preserve_dataset
from .preserved_walk import contrast_count, middle
from .rows import Encoder, Example, Row, read_rows
from .standing import answered_under, standing_instructions
from .training_args import QFTrainingArguments

logger = logging.get_logger(__name__)


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
        train_dataset (list of dicts or `datasets.Dataset`): rows with
            - `instruction`: what to know or do; a string (the system message) or the messages before the prompt;
            - `prompt`: a string (a user's message) or a list of messages;
            - `completion`, optional: the answer, a string or an assistant message. Without it the model answers itself,
              with the instruction in context;
            - `significance`, optional: how much the completion's words count; one number for all or one for each
              whitespace-separated word; 0 leaves a word out;

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
        self.adapter_name = active_qf_adapter(model)
        self.model = model
        self.args = args if args is not None else QFTrainingArguments()
        if not isinstance(self.args, QFTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; expected QFTrainingArguments")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the model's tokenizer")
        if train_dataset is None:
            raise ValueError("train_dataset is missing; give a list of dicts or a datasets.Dataset")
        self.dataset = train_dataset
        self.rows = read_rows(train_dataset)
        self.chats = read_preserve_dataset(preserve_dataset) if preserve_dataset is not None else None
        positions = getattr(text_config(self._network), "max_position_embeddings", None)
        self.encoder = Encoder(processing_class, max_length=positions)
        self.metrics: dict[str, float] = {}

    @property
    def _tuner(self) -> QFModel:
        return self.model.base_model

    @property
    def _network(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it."""
        return self.model.get_base_model()

    @torch.no_grad()
    def train(self) -> dict[str, float]:
        """Teach the rows to the active adapter, beside what it was taught before.

        Earlier rows are remembered with the model and solved together with the new ones. If anything fails midway the
        adapter is what it was.

        Returns:
            `facts` and `taught_tokens` (rows and taught positions of this call), `chats` (how many preserved chats were
            taught with standing instructions besides, see [`QFTrainingArguments`]), `kl_before` and `kl_after` (mean KL
            divergence from the context pass's predictions to the bare pass's at the taught positions, in nats),
            `residual_left` (the part of the wanted change of the last taught module's stream that is still missing: its
            norm over the change's), `unread` (rows whose completion the model itself does not give with the instruction
            in context; a warning names them), `rank`, `forward_passes` (how often the rows went through the model, in
            units of its depth) and `seconds`.

        Raises:
            ValueError: a row cannot be expressed or is too long, or the adapter is merged or switched off.
            FloatingPointError: the model's activations are not finite on a row.
        """
        start = time.perf_counter()
        check_teachable(self.model, self.adapter_name)
        with _evaluating(self._network), self._restored_on_failure(), self._progress() as progress:
            rows = self._completed(progress)
            preserved, contrast = self._preserved(len(rows), progress)
            lessons = self._lessons(rows, preserved, progress)
            progress.total = progress.n + 3 * sum(len(lesson) for lesson, _ in lessons)
            results, unread = [], []
            for taught, standing in lessons:
                examples = [self.encoder.encode(row) for row in taught]
                metrics, wrong, unsaid = self._teach(examples, preserved, contrast, standing, self._facts, progress)
                results.append(metrics)
                unread += [taught[i].index for i in wrong if taught[i].index >= 0]
                for _ in range(0 if standing else self.args.sweeps - 1):
                    if not unsaid:
                        break
                    examples = [examples[i] for i in unsaid]
                    metrics, _, unsaid = self._teach(
                        examples, preserved, contrast, standing, self._facts + len(taught), progress
                    )
                    results[-1]["forward_passes"] += metrics["forward_passes"] * len(examples) / len(taught)
            taught = self._tuner.taught[self.adapter_name]
            self._tuner.taught[self.adapter_name] = replace(taught, facts=taught.facts + len(rows))
        if unread:
            shown = ", ".join(str(index) for index in sorted(unread)[:20])
            logger.warning(
                f"{len(unread)} of {len(rows)} rows are not read in context: with its instruction the model gives "
                f"another answer than the completion (rows {shown}{', …' if len(unread) > 20 else ''})"
            )
        chats = sum(len(taught) for taught, _ in lessons) - len(rows)
        self.metrics = {
            "facts": len(rows), "chats": chats, **_together(results), "unread": len(unread),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        return self.metrics

    @torch.no_grad()
    def prepare(self) -> None:
        """Make and cache ahead what does not depend on the facts: the preserved chats' keys and the model's own chats.

        `train()` does it where it has not been done. It is the slow part the first time a model is taught.
        """
        check_teachable(self.model, self.adapter_name)
        with _evaluating(self._network), self._progress() as progress:
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
        check_teachable(self.model, self.adapter_name)
        kept = {
            name: prompt_rows(prompts, name)
            for name, prompts in (("locality", locality), ("unknown", unknown))
            if prompts is not None
        }
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        with _evaluating(self._network), self._progress() as progress:
            rows = self._completed(progress)
            ask = Evaluator(
                self._network, self.encoder, batch_size=self.args.per_device_train_batch_size,
                max_new_tokens=self.args.max_new_tokens, progress=progress.update,
            )  # fmt: skip
            others = paraphrase_rows(rows, self.dataset)
            with self._tuner.without_adapters():
                result: dict[str, Metric | float] = {"in_context": ask.right(rows, instructed=True)}
                before = {name: ask.answers(asked) for name, asked in kept.items()}
                quiet = [
                    replace(row, completion=answer)
                    for name, asked in kept.items()
                    for row, answer in zip(asked, before[name], strict=True)
                    if answer
                ]
                base = ask.head_inputs(quiet) if quiet else None
                if texts:
                    result["perplexity_before"] = ask.perplexity(texts)
            result["recall"] = ask.right(rows)
            if others:
                result["paraphrase"] = ask.right(others)
            for name, asked in kept.items():
                now = ask.answers(asked)
                right = [
                    a is not None and a == b and (r.completion is None or a == normalise(r.completion))
                    for a, b, r in zip(now, before[name], asked, strict=True)
                ]
                result[name] = proportion(right)
            if base is not None:
                result["kl"] = ask.divergence(quiet, base)
            if texts:
                result["perplexity"] = ask.perplexity(texts)
        return result

    def _teach(
        self,
        examples: list[Example],
        preserved: Preserved | None,
        contrast: Preserved | None,
        standing: bool,
        earlier: int,
        progress: tqdm,
    ) -> tuple[dict[str, float], list[int], list[int]]:
        return Lesson(
            self._tuner, self.adapter_name, self._network, examples, preserved, contrast, standing, earlier, self.args,
            self.encoder.tokenizer.pad_token_id, progress.update,
        ).run()  # fmt: skip

    @property
    def _facts(self) -> int:
        """How many rows the adapter was taught before."""
        taught = self._tuner.taught.get(self.adapter_name)
        return taught.facts if taught is not None else 0

    def _preserved(self, rows: int, progress: tqdm) -> tuple[Preserved | None, Preserved | None]:
        """The chats whose answers must stay with their keys, and those of which the nearest are taken besides."""
        args, preserved, contrast = self.args, None, None
        if args.preserve_strength == 0:
            return None, None
        layers = self._tuner.layers(self.adapter_name)
        options = {
            "batch_size": args.per_device_train_batch_size,
            "seed": args.seed,
            "cache_dir": args.cache_dir,
            "progress": progress.update,
        }
        with self._tuner.without_adapters():
            preserved = preserved_keys(
                self._network, self.encoder, layers, self.chats or [],
                0 if self.chats is not None else args.preserve_chats, **options,
            )  # fmt: skip
            if contrast_count(rows, self._facts, args.contrast_chats):
                name = middle(list(layers))
                options["seed"] += 1  # other chats than those preserved
                contrast = preserved_keys(
                    self._network, self.encoder, {name: layers[name]}, [], args.contrast_chats, starts_only=True,
                    **options,
                )  # fmt: skip
        return preserved, contrast

    def _lessons(self, rows: list[Row], preserved: Preserved | None, progress: tqdm) -> list[tuple[list[Row], bool]]:
        """The rows in the lessons they are taught in, and whether it is a standing instruction's."""
        if preserved is None or not self.args.standing:
            return [(rows, False)]

        def ask(asked: list[Row], instructed: bool) -> list[tuple[str, bool]]:
            return self._answers(asked, instructed, progress)

        prompts = [prompt for prompt in preserved.prompts if prompt is not None]
        groups = standing_instructions(rows, prompts, ask)
        stands = {row.index for group in groups for row in group}
        facts = [row for row in rows if row.index not in stands]
        # What changes everything comes first, so that facts are solved on top of it.
        lessons = [(group + answered_under(group, prompts, ask), True) for group in groups]
        return lessons + ([(facts, False)] if facts else [])

    def _answers(self, rows: list[Row], instructed: bool, progress: tqdm) -> list[tuple[str, bool]]:
        """The base model's own answers, and whether each ended."""
        progress.total = (progress.total or 0) + len(rows)
        with self._tuner.without_adapters():
            return generate(
                self._network,
                self.encoder.tokenizer,
                [self.encoder.prompt_ids(row, instructed=instructed) for row in rows],
                max_new_tokens=self.args.max_new_tokens,
                batch_size=self.args.per_device_train_batch_size,
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
        with tqdm(desc="Teaching", unit="row", delay=2, leave=False, disable=self.args.disable_tqdm) as bar:
            yield bar

    @contextmanager
    def _restored_on_failure(self) -> Iterator[None]:
        tuner, adapter = self._tuner, self.adapter_name
        factors = {name: tuner.factors(adapter, name) for name in tuner.layers(adapter)}
        try:
            yield
        except BaseException:
            tuner.set_factors(adapter, factors)
            raise


def _together(results: list[dict[str, float]]) -> dict[str, float]:
    """Several lessons' metrics as one's: tokens and passes summed, divergences averaged over the tokens."""
    tokens = [metrics["taught_tokens"] for metrics in results]
    merged = dict(results[-1])
    for name in ("kl_before", "kl_after", "residual_left"):
        merged[name] = sum(n * metrics[name] for n, metrics in zip(tokens, results, strict=True)) / sum(tokens)
    merged["taught_tokens"] = sum(tokens)
    merged["forward_passes"] = round(sum(metrics["forward_passes"] for metrics in results), 2)
    return merged


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
