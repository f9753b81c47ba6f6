"""Free generation: in batches, or one answer piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

from ..runtime.processes import exchange, rank, world_size
from .capture import by_length

# What a model's own generation config may say otherwise; transformers fills whatever is left None from it.
_PLAIN = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_new_tokens": 0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "length_penalty": 1.0,
    "renormalize_logits": False, "remove_invalid_values": False,
}  # fmt: skip
_USUAL_ANSWER = 64  # tokens that an answer is given room for in sizing batches


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    sample_seed: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[tuple[str, bool]]:
    """The model's answers to prompts of token ids: greedy, or sampled at temperature 1 if a seed is given.

    Batches hold up to `batch_tokens` tokens of prompts and usual answers. Of several processes each takes its share of
    them, and all get all answers.

    Returns:
        For each prompt the text without special tokens and outer whitespace, and whether the model ended it itself
        (and was not cut at `max_new_tokens`).
    """
    config = _config(model, tokenizer, max_new_tokens, sample=sample_seed is not None)
    stops = config.eos_token_id
    stops = set(stops) if isinstance(stops, (list, tuple)) else {stops}
    device = model.get_input_embeddings().weight.device
    answers: dict[int, tuple[str, bool]] = {}
    room = min(max_new_tokens, _USUAL_ANSWER)
    for number, chosen in enumerate(by_length([len(ids) + room for ids in prompts], batch_tokens)):
        if number % world_size() != rank():
            continue
        width = max(len(prompts[i]) for i in chosen)
        pads = [width - len(prompts[i]) for i in chosen]
        ids = [[tokenizer.pad_token_id] * pad + list(prompts[i]) for pad, i in zip(pads, chosen, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        with torch.random.fork_rng(enabled=sample_seed is not None):
            if sample_seed is not None:
                torch.manual_seed(sample_seed + number)
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
        for i, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
            ended = next((k for k, token in enumerate(tokens) if token in stops), None)
            text = tokenizer.decode(tokens[:ended], skip_special_tokens=True).strip()
            answers[i] = (text, ended is not None)
        progress(len(chosen))
    everywhere = {i: answer for part in exchange(answers) for i, answer in part.items()}
    return [everywhere[i] for i in range(len(prompts))]


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    context: Callable[[], AbstractContextManager],
) -> Iterator[str]:
    """The model's greedy answer to a prompt of token ids, in pieces as they come, without special tokens.

    The model runs in a thread of its own, within `context()`. Closing the generator, or an exception where it is
    consumed (such as `KeyboardInterrupt`), stops it after the token it is at.

    Raises:
        Exception: what the model raised.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    config, stopped, errors = _config(model, tokenizer, max_new_tokens), threading.Event(), []
    ids = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)

    def stop(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(ids),), stopped.is_set(), device=ids.device)

    @torch.no_grad()
    def run() -> None:
        try:
            with context():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )  # fmt: skip
        except BaseException as error:  # raised where the pieces are read
            errors.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=run, name="qf_peft-stream", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]


def _config(model: nn.Module, tokenizer: Any, max_new_tokens: int, sample: bool = False) -> GenerationConfig:
    """Greedy, or sampling at temperature 1; the model's own stop tokens."""
    config = GenerationConfig.from_model_config(model.config)
    own = getattr(model, "generation_config", None)
    stops = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    config.update(
        do_sample=sample,
        temperature=1.0,
        top_k=0 if sample else 50,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        max_length=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
        **_PLAIN,
        **({"min_p": 0.0} if sample else {}),
    )  # 50 is transformers' "not set", of which it does not warn
    return config
