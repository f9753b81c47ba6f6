"""The model under comparison: fresh copies of it, its answers, and what a lesson takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL
from qf_peft.data.rows import Encoder, Row
from qf_peft.forward.generation import generate

_USUAL = 64  # tokens of an answer that most keep to


class Answer(NamedTuple):
    text: str
    ended: bool
    """Whether the model stopped by itself, and was not cut."""


class Unfit(ValueError):
    """A method cannot do what is asked of it; the message says why, and the table shows a dash."""


class Bench:
    """One model and how it is asked.

    Args:
        model: a folder or an id on the Hub.
        dtype: of the weights, such as "float32".
        device: by default a GPU where there is one.
        cache: where methods may keep what they make once a model.
        tokens: the most tokens of an answer.
        batch_tokens: tokens that go through the model at once.
    """

    def __init__(
        self,
        model: str | Path = TINY_MODEL,
        cache: Path | None = None,
        *,
        dtype: str = "float32",
        device: str | None = None,
        tokens: int = 512,
        batch_tokens: int = 4096,
    ) -> None:
        self.path, self.dtype, self.cache = str(model), getattr(torch, dtype), cache
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokens, self.batch_tokens = tokens, batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tiny = self.path == str(TINY_MODEL)
        config = AutoConfig.from_pretrained(self.path).get_text_config(decoder=True)
        self.depth: int = config.num_hidden_layers
        self.window: int | None = getattr(config, "max_position_embeddings", None)
        self.encoder = Encoder(self.tokenizer, max_length=self.window)

    @property
    def name(self) -> str:
        """The model's name, without the folder that it lies in."""
        return Path(self.path).name if Path(self.path).is_dir() else self.path

    def base(self) -> nn.Module:
        """A fresh copy of the model, nothing taught."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype, attn_implementation="eager")
        return model.to(self.device).eval()

    def prompt_ids(self, prompt: str, instruction: str | None = None) -> list[int]:
        """The token ids of a question in the chat template, with a text as its instruction if there is one."""
        if instruction is None:
            return self.encoder.prompt_ids(Row(0, "", prompt, None), False)
        try:
            return self.encoder.prompt_ids(Row(0, instruction, prompt, None), True)
        except ValueError:  # a chat template without a system role
            before = [{"role": "user", "content": instruction}, {"role": "assistant", "content": "I see."}]
            return self.encoder.prompt_ids(Row(0, before, prompt, None), True)

    def ask(
        self, model: nn.Module, prompts: Sequence[str], instructions: Sequence[str | None] | None = None
    ) -> dict[str, Answer]:
        """Greedy answers to the model's own stop, by prompt; each is asked once.

        Args:
            model: the one to ask.
            prompts: questions, each asked alone.
            instructions: for each an instruction, or None.
        """
        asked = dict(zip(prompts, instructions or [None] * len(prompts), strict=True))
        ids = {prompt: self.prompt_ids(prompt, text) for prompt, text in asked.items()}
        model.eval()
        found: dict[str, Answer] = {}
        # Few answers are long: those that have not ended soon are asked again, so that the others need not wait.
        for tokens in dict.fromkeys((min(_USUAL, self.tokens), self.tokens)):
            left = [prompt for prompt in ids if prompt not in found or not found[prompt].ended]
            if not left:
                break
            if self.window is not None:
                tokens = max(1, min(tokens, self.window - max(len(ids[prompt]) for prompt in left)))
            given = [ids[prompt] for prompt in left]
            said = generate(model, self.tokenizer, given, max_new_tokens=tokens, batch_tokens=self.batch_tokens)
            found.update((prompt, Answer(*answer)) for prompt, answer in zip(left, said, strict=True))
        return {prompt: found[prompt] for prompt in asked}


class Cost:
    """Seconds of what runs inside, and the peak of memory over what was taken before, in MB: a GPU's own count, or the
    growth of the process's resident memory, sampled every five milliseconds."""

    seconds = memory_mb = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = self.peak = _resident()
            self.running = True
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, _resident())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        self.seconds = time.perf_counter() - self.start
        if self.device.type != "cuda":
            self.running = False
            self.thread.join()
        self.memory_mb = (self.peak - self.before) / 2**20


def _resident() -> int:
    """Bytes of the process's resident memory."""
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss
