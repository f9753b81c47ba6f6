"""The chats that must stay as they are: from a dataset, or written by the model itself, as token ids with answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Encoder, Row, Text, read_messages
from ..forward.generation import generate
from ..forward.recording import Recorded, Recorder
from ..runtime.processes import exchange
from .constants import ANSWER_TOKENS
from .generic_prompts import FACTUAL, OPEN

_WRITING_TOKENS = 4096  # at once; what is sampled depends on it


@dataclass(frozen=True)
class Chat:
    """A chat to be preserved: a prompt and perhaps its answer, or plain text."""

    prompt: list[dict[str, str]] | str | None
    completion: str | None = None
    text: str | None = None


def read_preserve_dataset(dataset: Iterable[Any]) -> list[Chat]:
    """Check a preserve dataset: prompts (strings), or rows with `prompt`, `messages` or plain `text`.

    Raises:
        ValueError: it is empty or a row is of another form; the message names the row.
    """
    if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
        raise ValueError(f"preserve_dataset is a {type(dataset).__name__}; expected a list of prompts or rows")
    chats = []
    for index, row in enumerate(dataset):
        where = f"preserve_dataset, row {index}"
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} is a {type(row).__name__}; expected a prompt or a dict")
        row = {key: value for key, value in row.items() if value is not None}
        if "messages" in row:
            messages = read_messages(row["messages"], f"{where}: messages")
            answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
            if not messages:
                raise ValueError(f"{where}: messages has no prompt before the assistant's answer")
            chats.append(Chat(messages, answer))
        elif "prompt" in row:
            prompt, answer = row["prompt"], row.get("completion")
            prompt = prompt if isinstance(prompt, str) else read_messages(prompt, f"{where}: prompt")
            if answer is not None and not isinstance(answer, str):
                answer = read_messages(answer, f"{where}: completion")[-1]["content"]
            if not prompt or (isinstance(prompt, str) and not prompt.strip()):
                raise ValueError(f"{where}: prompt is empty")
            chats.append(Chat(prompt, answer))
        elif isinstance(row.get("text"), str) and row["text"].strip():
            chats.append(Chat(None, text=row["text"]))
        else:
            raise ValueError(f"{where} has the columns {sorted(row)}; expected 'prompt', 'messages' or 'text'")
    if not chats:
        raise ValueError("preserve_dataset is empty; leave it out to let the model write chats itself")
    return chats


def write_chats(
    network: nn.Module, encoder: Encoder, count: int, seed: int, progress: Callable[[int], None]
) -> list[Chat]:
    """User turns that the model writes itself, sampled after the template's user header (Magpie, arXiv 2406.08464);
    without a chat template plain texts, sampled from the first token on.

    Duplicates and turns that do not end are dropped; where less than half are left, generic prompts are added.
    """
    tokenizer, opening = encoder.tokenizer, encoder.user_opening()
    plain = opening is None
    if plain:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        opening = [first] if first is not None else []
    made: list[Chat] = []
    if opening:
        wanted = -(-count * 5 // 4)
        answers = generate(
            network,
            tokenizer,
            [opening] * wanted,
            max_new_tokens=ANSWER_TOKENS,
            batch_tokens=_WRITING_TOKENS,
            sample_seed=seed,
            progress=progress,
        )
        texts = dict.fromkeys(text for text, ended in answers if text and (ended or plain))
        made = [Chat(None, text=text) if plain else Chat(text) for text in texts][:count]
    if len(made) < count / 2:
        turns = {chat.prompt for chat in made}
        made += [Chat(p) for p in (*FACTUAL, *OPEN) if p not in turns]
    return made


@dataclass(frozen=True)
class Answered:
    """A chat as token ids."""

    chat: int
    """Its place among those given."""
    ids: list[int]
    """Prompt and answer."""
    positions: int
    """How many of the last steps are the answer's (all of plain text's)."""
    prompt: Text | None
    """None where it is plain text."""
    recorded: bool = False
    """Whether some process recorded it as it was written."""


def answered_chats(
    network: nn.Module,
    encoder: Encoder,
    chats: list[Chat],
    batch_tokens: int,
    progress: Callable[[int], None],
    answer_tokens: int = ANSWER_TOKENS,
    recorder: Recorder | None = None,
) -> list[Answered]:
    """Chats as token ids, those without an answer answered by the model in so many tokens at most, which a recorder is
    told of by their places among the chats given. Chats too long for the model are left out.

    Raises:
        ValueError: every chat is too long.
    """
    rows = [Row(i, "", c.prompt, c.completion) if c.text is None else None for i, c in enumerate(chats)]
    silent = [row for row in rows if row is not None and row.completion is None]
    said: dict[int, list[int]] = {}

    def take(part: Recorded) -> None:
        places = [silent[i].index for i in part.prompts]
        said.update(zip(places, part.answers, strict=True))
        recorder.take(replace(part, prompts=places))

    prompts = [encoder.prompt_ids(row, instructed=False) for row in silent]
    answers = generate(
        network,
        encoder.tokenizer,
        prompts,
        max_new_tokens=answer_tokens,
        batch_tokens=batch_tokens,
        recorder=None if recorder is None else Recorder(recorder.modules, take),
        progress=progress,
    )
    recorded = {place: tokens for part in exchange(said) for place, tokens in part.items()}
    answered = {row.index: found for row, *found in zip(silent, prompts, answers, strict=True)}
    made = []
    for row, (index, chat) in zip(rows, enumerate(chats), strict=True):
        if row is None:
            ids, count = encoder.text_ids(chat.text)
        elif index in recorded:
            ids, count = [*answered[index][0], *recorded[index]], len(recorded[index])
        else:
            text, ended = answered[index][1] if index in answered else (row.completion, True)
            if text:
                ids, count = encoder.answer_ids(Row(index, "", row.prompt, text), ended)
            else:  # an empty answer is one too: the step that ends the turn at once
                ids, count = [*answered[index][0], encoder.tokenizer.eos_token_id or 0], 1
        if count and (encoder.max_length is None or len(ids) <= encoder.max_length):
            made.append(Answered(index, ids, count, chat.prompt, index in recorded))
    if not made:
        raise ValueError("every chat to be preserved is longer than the model allows; give shorter ones")
    return made


def answer_starts(positions: Sequence[int]) -> Tensor:
    """Where each sequence's positions begin in a pass's result: (sequences)."""
    return torch.tensor([0, *positions[:-1]]).cumsum(0)
