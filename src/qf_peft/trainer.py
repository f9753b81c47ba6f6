"""QFTrainer: walks through passes and solves, and installs what they give."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .blocks import split_path, text_config
from .capture import Point, forward_pass
from .config import QFConfig
from .generation import generate
from .model import QFModel
from .rows import Encoder, Example, Row, read_rows
from .solve import LowRankDelta, minimum_norm
from .statistics import TaughtAdapter, TaughtTokens
from .stream import Writer, aim_through_norm, norm_gain, trace_writer
from .training_args import QFTrainingArguments

logger = logging.get_logger(__name__)


class QFTrainer:
    """
    Teaches a QF adapter by forward passes and a closed-form solve (QF, arXiv 2507.04300). No gradients, no loss.

    For every row it runs the model with the instruction (the *context pass*, base weights) and without it (the *bare
    pass*), and solves for the smallest change of each target module under which the bare pass's residual stream becomes
    the context pass's at the taught positions. Several target modules are taught in the order of the blocks, each after
    the bare pass was run again with the changes before it.

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
        processing_class: Any = None,
    ) -> None:
        self.adapter_name = _active_qf_adapter(model)
        self.model = model
        self.args = args if args is not None else QFTrainingArguments()
        if not isinstance(self.args, QFTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; expected QFTrainingArguments")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the model's tokenizer")
        if train_dataset is None:
            raise ValueError("train_dataset is missing; give a list of dicts or a datasets.Dataset")
        self.rows = read_rows(train_dataset)
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
            `facts` and `taught_tokens` (rows and taught positions of this call), `kl_before` and `kl_after` (mean KL
            divergence from the context pass's predictions to the bare pass's at the taught positions, in nats),
            `residual_left` (the part of the wanted change of the last taught module's stream that is still missing: its
            norm over the change's), `rank`, `forward_passes` (how often the rows went through the model, whole or in
            part) and `seconds`.

        Raises:
            ValueError: a row cannot be expressed or is too long, or the adapter is merged or switched off.
            FloatingPointError: the model's activations are not finite on a row.
        """
        start = time.perf_counter()
        _check_teachable(self.model, self.adapter_name)
        with _evaluating(self._network), self._restored_on_failure(), self._progress() as progress:
            examples = [self.encoder.encode(row) for row in self._completed(progress)]
            metrics = self._teach(examples, progress)
        self.metrics = {"facts": len(examples), **metrics, "seconds": time.perf_counter() - start}
        return self.metrics

    def _teach(self, examples: list[Example], progress: tqdm) -> dict[str, float]:
        tuner, adapter, network = self._tuner, self.adapter_name, self._network
        layers = tuner.layers(adapter)
        writers = self._writers(layers, examples[0])
        progress.total = (progress.total or 0) + (2 + len(layers)) * len(examples)
        passes = _Passes(network, examples, self.args.per_device_train_batch_size, self.encoder, progress)

        goals = {name: _goal(network, name, layers[name], writer) for name, writer in writers.items()}
        head = Point(network.get_output_embeddings(), "input")
        with tuner.without_adapters():
            context = passes.run("context", {**goals, "unembedding": head})
        predicted = context.pop("unembedding")

        known = self._known(layers)
        significance = torch.tensor([s for example in examples for s in example.significance])
        tokens = dict(known.tokens)
        kl_before = first_missing = None
        for name, layer in layers.items():
            points = {"keys": Point(layer, "input"), "output": Point(layer, "output"), "goal": goals[name]}
            if kl_before is None:
                bare, kl_before = passes.run_with_kl(points, predicted)
            else:
                bare = passes.run("bare", points)
            missing = context[name] - bare["goal"]
            first_missing = missing
            residual = _residual(network, name, writers[name], bare["output"], missing)
            before = tuner.delta(adapter, name)
            if name in known.offset:
                before = before + LowRankDelta(A=known.offset[name].A, B=-known.offset[name].B)
            new = TaughtTokens(bare["keys"], residual + before(bare["keys"]), significance.to(residual.device))
            tokens[name] = known.tokens[name] + new if name in known.tokens else new
            delta = minimum_norm(tokens[name].keys, tokens[name].residual, tokens[name].significance)
            tuner.install(adapter, {name: (delta + known.offset[name]).compressed() if name in known.offset else delta})
        last = next(reversed(layers))
        after, kl_after = passes.run_with_kl({"goal": goals[last]}, predicted)
        left = (context[last] - after["goal"]).norm() / first_missing.norm().clamp(min=torch.finfo(torch.float32).tiny)
        installed = {name: tuner.factors(adapter, name) for name in layers}
        tuner.taught[adapter] = TaughtAdapter(tokens, known.offset, installed, known.facts + len(examples))
        return {
            "taught_tokens": len(significance),
            "kl_before": kl_before,
            "kl_after": kl_after,
            "residual_left": float(left),
            "rank": tuner.peft_config[adapter].r,
            "forward_passes": passes.count,
        }

    def _writers(self, layers: Mapping[str, LoraLayer], example: Example) -> dict[str, Writer]:
        """How each target module reaches the stream; measured once for blocks of one kind."""
        network, kinds, writers = self._network, {}, {}

        def run(ids: Tensor) -> None:
            network.get_decoder()(input_ids=ids, use_cache=False)

        for name in layers:
            path, index, suffix = split_path(name)
            block = network.get_submodule(f"{path}.{index}")
            kind = (type(block), suffix, tuple(n for n, _ in block.named_modules() if "lora_" not in n))
            if kind not in kinds:
                with self._tuner.without_adapters():
                    kinds[kind] = trace_writer(run, network, name, example.bare_ids[:8])
                if kinds[kind].norm is not None:
                    logger.warning(
                        f"{suffix} writes into the residual stream through {kinds[kind].norm}; what is taught there is "
                        "approached as near as that norm allows (see `residual_left` in the metrics)"
                    )
            writers[name] = kinds[kind]
        return writers

    def _known(self, layers: Mapping[str, LoraLayer]) -> TaughtAdapter:
        """What the adapter was taught; where its weights came from elsewhere, they are kept as an offset."""
        tuner, adapter = self._tuner, self.adapter_name
        known = tuner.taught.get(adapter, TaughtAdapter())
        tokens, offset = dict(known.tokens), dict(known.offset)
        for name in layers:
            present, ours = tuner.factors(adapter, name), known.installed.get(name)
            same = ours is not None and all(
                a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(present, ours, strict=True)
            )
            if not same:
                if name in tokens:
                    logger.warning(
                        f"the weights of {name} were changed since they were taught; they are kept and taught on"
                    )
                tokens.pop(name, None)
                offset.pop(name, None)
                if bool(present[0].any()) and bool(present[1].any()):
                    offset[name] = tuner.delta(adapter, name)
        return replace(known, tokens=tokens, offset=offset)

    def _completed(self, progress: tqdm) -> list[Row]:
        """The rows, those without a completion answered by the base model in context."""
        open_rows = [row for row in self.rows if row.completion is None]
        if not open_rows:
            return self.rows
        progress.total = (progress.total or 0) + len(open_rows)
        with self._tuner.without_adapters():
            answers = generate(
                self._network,
                self.encoder.tokenizer,
                [self.encoder.prompt_ids(row, instructed=True) for row in open_rows],
                max_new_tokens=self.args.max_new_tokens,
                batch_size=self.args.per_device_train_batch_size,
                progress=progress.update,
            )
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


class _Passes:
    """Passes of the examples through the network, counted."""

    def __init__(
        self, network: nn.Module, examples: list[Example], batch_size: int, encoder: Encoder, progress: tqdm
    ) -> None:
        self.network = network
        self.sequences = {"context": [e.context_ids for e in examples], "bare": [e.bare_ids for e in examples]}
        self.kept = [e.taught for e in examples]
        self.options = {
            "batch_size": batch_size,
            "pad_id": encoder.tokenizer.pad_token_id,
            "progress": progress.update,
        }
        self.count = 0

    def run(self, which: str, points: Mapping[str, Point]) -> dict[str, Tensor]:
        """Keep the points' activations at the taught positions: (n, d) each. Ends at the last point."""
        self.count += 1
        return forward_pass(self.network, self.sequences[which], self.kept, points, **self.options)

    def run_with_kl(self, points: Mapping[str, Point], predicted: Tensor) -> tuple[dict[str, Tensor], float]:
        """A whole bare pass, and the mean KL to its predictions from those of the context pass's head inputs."""
        self.count += 1
        divergence = torch.empty(sum(self.kept))

        def compare(order: Tensor, bare: Tensor, context: Tensor) -> None:
            p, q = context.log_softmax(-1), bare.log_softmax(-1)
            divergence[order] = (p.exp() * (p - q)).sum(-1).clamp(min=0).cpu()

        found = forward_pass(
            self.network, self.sequences["bare"], self.kept, points, head_inputs=predicted, on_logits=compare,
            **self.options,
        )  # fmt: skip
        return found, float(divergence.mean())


def _goal(network: nn.Module, name: str, layer: nn.Module, writer: Writer) -> Point:
    """Where the bare pass shall become like the context pass: the stream, or a non-writer's own output."""
    if writer.place is None:
        return Point(layer, "output")
    path, index, _ = split_path(name)
    return Point(network.get_submodule(f"{path}.{index}").get_submodule(writer.place), writer.side)


def _residual(network: nn.Module, name: str, writer: Writer, output: Tensor, missing: Tensor) -> Tensor:
    """What the module's outputs (n, d_out) must change by for the stream to change by `missing` (n, d_out)."""
    change = missing.to(output.device) / writer.multiplier
    if writer.norm is None:
        return change
    path, index, _ = split_path(name)
    norm = network.get_submodule(f"{path}.{index}").get_submodule(writer.norm)
    gain = norm_gain(norm, output)
    normed = gain * output / output.square().mean(1, keepdim=True).sqrt()
    return aim_through_norm(gain, output, normed + change) - output


def _active_qf_adapter(model: Any) -> str:
    """The name of the one active adapter of a QF PeftModel.

    Raises:
        ValueError: it is none, or its active adapter is of another type, or several are active.
    """
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"model is a {type(model).__name__} without a QF adapter; give "
            "get_peft_model(model, QFConfig(task_type='CAUSAL_LM'))"
        )
    if not isinstance(model.base_model, QFModel):
        active = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
        kind = getattr(model.peft_config[active].peft_type, "value", "other")
        raise ValueError(
            f"the active adapter {active!r} is a {kind} adapter; QFTrainer teaches QF adapters. Merge it into the base "
            "(model.merge_and_unload()) or remove it (model.unload()), then get_peft_model(model, QFConfig(...))"
        )
    active = model.base_model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({active}); choose the one to teach with model.set_adapter(name)"
        )
    return active[0]


def _check_teachable(model: PeftModel, adapter: str) -> None:
    """The adapter must be the one at work: active, on, not merged, and no adapter of another type beside it."""
    if _active_qf_adapter(model) != adapter:
        raise ValueError(
            f"the trainer was made for the adapter {adapter!r}, but {model.active_adapter!r} is active now; call "
            f"model.set_adapter({adapter!r}) or make a new trainer"
        )
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"the adapter {layer.merged_adapters[0]!r} is merged into {name}; call model.unmerge_adapter() before "
                "teaching"
            )
        if layer.disable_adapters:
            raise ValueError(f"the adapters of {name} are disabled; enable them before teaching")
        for other in layer.active_adapters:
            if other in layer.lora_A and not isinstance(model.peft_config.get(other), QFConfig):
                raise ValueError(
                    f"{name} has an active adapter {other!r} that is not a QF adapter; merge it or remove it before "
                    "teaching, so that it is clear which weights the facts are measured on"
                )
        if adapter in layer.lora_A and adapter not in layer.active_adapters:
            raise ValueError(f"the adapter {adapter!r} is not active in {name}; call model.set_adapter({adapter!r})")
    if model.get_base_model().get_output_embeddings() is None:
        raise ValueError(
            f"{type(model.get_base_model()).__name__} predicts no tokens; QF needs a causal language model"
        )


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
