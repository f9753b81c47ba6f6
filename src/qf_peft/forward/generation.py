"""Free generation: in batches, or one answer piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

from ..runtime.processes import exchange, rank, world_size
from .capture import by_length
from .prefix import Group, empty_cache, prefill, repeated, shared
from .recording import Recorded, Recorder, recording, stretches

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
    recorder: Recorder | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[tuple[str, bool]]:
    """The model's answers to prompts of token ids: greedy, or sampled at temperature 1 if a seed is given.

    What several prompts begin with is run once. Batches hold up to `batch_tokens` tokens of what is left of them and of
    usual answers. Of several processes each takes its share of the batches, and all get all answers; a `recorder` is
    given those of its own process.

    Returns:
        For each prompt the text without special tokens and outer whitespace, and whether the model ended it itself
        (and was not cut at `max_new_tokens`).
    """
    config = _config(model, tokenizer, max_new_tokens, sample=sample_seed is not None)
    answers, stops = {}, _stops(config)
    groups = _groups(model, prompts, max_new_tokens)
    begun, cache, before = None, None, {}
    for number, (group, chosen) in enumerate(_batches(groups, prompts, max_new_tokens, batch_tokens)):
        if number % world_size() != rank():
            continue
        if group is not begun:
            begun, cache, before = group, *_prefilled(model, group, recorder)
        batch = [prompts[i] for i in chosen]
        with torch.random.fork_rng(enabled=sample_seed is not None), recording(recorder, len(batch)) as met:
            if sample_seed is not None:
                torch.manual_seed(sample_seed + number)
            written = _written(model, config, batch, len(group.prefix), cache)
        for i, tokens in zip(chosen, written, strict=True):
            ended = tokens[-1] in stops
            text = tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True).strip()
            answers[i] = (text, ended)
        if recorder is not None:
            _record(recorder, (chosen, written), batch, before, met)
        progress(len(chosen))
    everywhere = {i: answer for part in exchange(answers) for i, answer in part.items()}
    return [everywhere[i] for i in range(len(prompts))]


def _groups(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Group]:
    """The prompts by what they begin with, of which at least the last token is left; in one group where the padding
    behind that would push it out of attention's window."""
    text = model.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if empty_cache(model) is None or any(window and longest > window for window in windows):
        return [Group(list(range(len(prompts))), ())]
    return shared(prompts, [len(ids) - 1 for ids in prompts])


def _batches(
    groups: list[Group], prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int
) -> Iterator[tuple[Group, list[int]]]:
    room = min(max_new_tokens, _USUAL_ANSWER)
    for group in groups:
        begin = len(group.prefix)
        lengths = [len(prompts[i]) - begin + begin // 4 + room for i in group.members]
        for places in by_length(lengths, batch_tokens):
            yield group, [group.members[place] for place in places]


def _prefilled(
    model: nn.Module, group: Group, recorder: Recorder | None
) -> tuple[Cache | None, dict[str, torch.Tensor]]:
    """A cache with what a group's prompts begin with, and what was recorded on the way."""
    if not group.prefix:
        return None, {}
    cache, size = empty_cache(model), len(group.prefix)
    with recording(recorder, 1) as met:
        prefill(model, group.prefix, cache)
    return cache, stretches(met, [0], [size], size) or {}


def _written(
    model: nn.Module, config: GenerationConfig, prompts: list[Sequence[int]], begin: int, cache: Cache | None
) -> list[list[int]]:
    """Token ids of the answers to prompts padded on the left, behind their first `begin` tokens, which are cached; the
    token that ends an answer is its last."""
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    pairs = list(zip(prompts, pads, strict=True))
    output = model.generate(
        input_ids=torch.tensor(
            [[*ids[:begin], *[config.pad_token_id] * pad, *ids[begin:]] for ids, pad in pairs], device=device
        ),
        attention_mask=torch.tensor(
            [[1] * begin + [0] * pad + [1] * (len(ids) - begin) for ids, pad in pairs], device=device
        ),
        generation_config=config,
        **({} if cache is None else {"past_key_values": repeated(cache, len(prompts))}),
    )
    stops, answers = _stops(config), output[:, width:].tolist()
    ends = [next((k + 1 for k, token in enumerate(tokens) if token in stops), len(tokens)) for tokens in answers]
    return [tokens[:end] for tokens, end in zip(answers, ends, strict=True)]


def _record(
    recorder: Recorder,
    answers: tuple[list[int], list[list[int]]],
    prompts: list[Sequence[int]],
    before: Mapping[str, torch.Tensor],
    met: Mapping[str, list[torch.Tensor]],
) -> None:
    """Give a batch's keys to the recorder."""
    chosen, written = answers
    begin = len(next(iter(before.values()))) if before else 0
    width = max(map(len, prompts))
    lengths = [len(ids) - begin + len(tokens) - 1 for ids, tokens in zip(prompts, written, strict=True)]
    total = width - begin + max(map(len, written)) - 1
    keys = stretches(met, [width - len(ids) for ids in prompts], lengths, total)
    if keys is not None:
        recorder.take(Recorded(chosen, written, lengths, before, keys))


def _stops(config: GenerationConfig) -> set[int]:
    stops = config.eos_token_id
    return set(stops) if isinstance(stops, (list, tuple)) else {stops}


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
