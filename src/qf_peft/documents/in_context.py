"""The base model with a text in its context: its answers, what it writes on request, and user turns of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapter.model import QFModel
from ..adapter.modes import evaluating
from ..data.rows import Encoder, Example, Row, Text
from ..forward.blocks import text_config
from ..forward.capture import forward_pass
from ..forward.generation import generate

_ANSWER_TOKENS = 128  # an answer that has not ended by then is none
_TURN_TOKENS = 64


class ContextModel:
    """Asks a model with a text as its instruction, its adapters off.

    Args:
        model: a causal language model, with or without adapters.
        processing_class: its tokenizer, or a processor that has one.
        batch_tokens: how many tokens go through the model at once.
        seed: of sampled turns.
        progress: called with a word for what is done, how many prompts are done and how many there are.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.model, self.batch_tokens, self.seed, self.progress = model, batch_tokens, seed, progress
        self.network = model.get_base_model() if isinstance(model, PeftModel) else model
        self.window: int | None = getattr(text_config(self.network), "max_position_embeddings", None)
        self.encoder = Encoder(processing_class, max_length=self.window)

    def count(self, text: str) -> int:
        """A text's tokens."""
        return len(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def as_instruction(self, text: str) -> Text:
        """The text as an instruction that the chat template takes: a system message, or else a first exchange."""
        try:
            self.encoder.prompt_ids(Row(0, text, "?", None), instructed=True)
        except ValueError:
            return [{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}]
        return text

    def answers(self, pairs: Sequence[tuple[Text, str]], instructed: bool = True) -> list[str | None]:
        """Greedy answers to (instruction, prompt); None where one is empty, does not end or does not fit."""
        name = "answering in context" if instructed else "answering without context"
        found = self._generate([self._ids(pair, instructed) for pair in pairs], _ANSWER_TOKENS, name)
        return [text if ended and text else None for text, ended in found]

    def written(self, pairs: Sequence[tuple[Text, str]], max_new_tokens: int, what: str) -> list[tuple[str, bool]]:
        """What the model greedily writes to (instruction, request), and whether it ended; empty what does not fit."""
        return self._generate([self._ids(pair, True) for pair in pairs], max_new_tokens, what)

    def user_turns(self, instructions: Sequence[Text], count: int) -> list[list[str]]:
        """For each instruction user turns that the model samples behind it (Magpie, arXiv 2406.08464): `count` less
        those that are empty or do not end. None without a chat template."""
        openings = [self.encoder.user_opening(instruction) for instruction in instructions]
        if not openings or openings[0] is None:
            return [[] for _ in instructions]
        found = self._generate([ids for ids in openings for _ in range(count)], _TURN_TOKENS, "sampling", self.seed)
        turns = [text if ended else "" for text, ended in found]
        return [[t for t in turns[i * count : (i + 1) * count] if t] for i in range(len(openings))]

    @torch.no_grad()
    def surety(self, facts: Sequence[tuple[Text, str, str]]) -> list[float]:
        """How surely each (instruction, prompt, answer) is read: the geometric mean, from 0 to 1, of the probabilities
        that the model gives the answer's tokens, and its end, with the instruction in context. 0 of what the chat
        template cannot express."""
        examples: dict[int, Example] = {}
        for number, fact in enumerate(facts):
            with suppress(ValueError):
                examples[number] = self.encoder.encode(Row(number, *fact))
        if not examples:
            return [0.0] * len(facts)
        gold = torch.tensor([token for e in examples.values() for token in e.targets])
        positions = [e.taught for e in examples.values()]

        def compare(order: Tensor, logits: Tensor, _: Tensor) -> dict[str, Tensor]:
            taken = gold[order].to(logits.device)
            return {"log": logits.float().log_softmax(-1).gather(1, taken[:, None])[:, 0].cpu()}

        with self._base():
            found = forward_pass(
                self.network, [e.context_ids for e in examples.values()], positions, {}, on_logits=compare,
                batch_tokens=self.batch_tokens, pad_id=self.encoder.tokenizer.pad_token_id,
            )["log"]  # fmt: skip
        parts = zip(examples.items(), found.split(positions), strict=True)
        sure = {number: float(part[e.header :].mean().exp()) for (number, e), part in parts}
        return [sure.get(number, 0.0) for number in range(len(facts))]

    def _ids(self, pair: tuple[Text, str], instructed: bool) -> list[int]:
        instruction, prompt = pair
        return self.encoder.prompt_ids(Row(0, instruction, prompt, None), instructed)

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], max_new_tokens: int, what: str, seed: int | None = None
    ) -> list[tuple[str, bool]]:
        fits = [i for i, ids in enumerate(prompts) if self.window is None or len(ids) + 16 <= self.window]
        found = [("", False)] * len(prompts)
        if not fits:
            return found
        if self.window is not None:
            max_new_tokens = min(max_new_tokens, self.window - max(len(prompts[i]) for i in fits))
        done = len(prompts) - len(fits)

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.progress(what, done, len(prompts))

        with self._base():
            written = generate(
                self.network, self.encoder.tokenizer, [prompts[i] for i in fits], max_new_tokens=max_new_tokens,
                batch_tokens=self.batch_tokens, sample_seed=seed, progress=progress,
            )  # fmt: skip
        for i, answer in zip(fits, written, strict=True):
            found[i] = answer
        return found

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The base model in evaluation mode; where it is taught QF, no other thread runs it meanwhile."""
        tuner = getattr(self.model, "base_model", None) if isinstance(self.model, PeftModel) else None
        with ExitStack() as stack:
            if isinstance(tuner, QFModel):
                stack.enter_context(tuner.serving.changing())
                stack.enter_context(tuner.without_adapters())
            elif tuner is not None:
                stack.enter_context(self.model.disable_adapter())
            stack.enter_context(evaluating(self.model))
            yield
