"""The chats whose answers must stay: from a dataset, or written by the model itself; and their keys, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from .capture import Point, forward_pass
from .generation import generate
from .generic_prompts import FACTUAL, OPEN
from .processes import check_alike, exchange, writes_cache
from .quantized import sample
from .rows import Encoder, Row, Text, read_messages

logger = logging.get_logger(__name__)

_FORMAT = 2
_ANSWER_TOKENS = 64  # as much of an answer as is kept
_WRITING_TOKENS = 4096  # at once; what is sampled depends on it
_MOST_KEYS = 8192  # of one module; more are thinned out evenly


@dataclass(frozen=True)
class Preserved:
    """Chats to be preserved and the keys at their answer positions, with the base weights."""

    sequences: list[list[int]]
    """Token ids of prompt and answer."""
    kept: list[int]
    """How many of each sequence's last positions are answer positions."""
    keys: Mapping[str, Tensor]
    """By module name, in the model's dtype: (Σ kept, d_in), or where only the answers' first steps were asked for
    (chats, d_in)."""
    prompts: list[Text | None]
    """Each chat's prompt, None where it is plain text."""

    @property
    def owners(self) -> Tensor:
        """For each key the chat it belongs to: (Σ kept)."""
        return torch.repeat_interleave(torch.arange(len(self.kept)), torch.tensor(self.kept, dtype=torch.long))


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
    """User turns that the model writes itself, sampled after the template's user header (Magpie, arXiv 2406.08464).

    Duplicates and turns that do not end are dropped; where less than half are left, or there is no chat template,
    generic prompts are added.
    """
    turns: list[str] = []
    opening = encoder.user_opening()
    if opening is not None:
        wanted = -(-count * 5 // 4)
        answers = generate(
            network,
            encoder.tokenizer,
            [opening] * wanted,
            max_new_tokens=_ANSWER_TOKENS,
            batch_tokens=_WRITING_TOKENS,
            sample_seed=seed,
            progress=progress,
        )
        turns = list(dict.fromkeys(text for text, ended in answers if ended and text))[:count]
    if len(turns) < count / 2:
        turns += [p for p in (*FACTUAL, *OPEN) if p not in turns]
    return [Chat(turn) for turn in turns]


def preserved_keys(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: list[Chat],
    own: int = 0,
    *,
    starts_only: bool = False,
    batch_tokens: int,
    seed: int,
    cache_dir: str | Path | None,
    progress: Callable[[int], None] = lambda n: None,
) -> Preserved:
    """The keys of chats at their answer positions, in one forward sweep; from the cache where they are in it.

    Args:
        network: the model, its adapters off.
        encoder: its tokenizer's.
        modules: the target modules, by name.
        chats: what to preserve. Those without an answer are answered by the model.
        own: how many chats the model shall write itself besides.
        starts_only: keep only the keys at the steps where answers begin, by which the nearest chats are found.
        batch_tokens: tokens at once, padding included.
        seed: of the chats it writes itself.
        cache_dir: a folder; by default `qf_peft` in Hugging Face's cache.
        progress: called with the number of chats done.

    Returns:
        The chats and keys. The cache's file name is a hash of the model (its configuration, revision and a sample of
        its weights), the modules and the chats; a file that is torn or does not say it is this very content is made
        anew.
    """
    content = [own, starts_only, *((c.prompt, c.completion, c.text) for c in chats)]
    identity = hashlib.sha256(
        json.dumps([_FORMAT, fingerprint(network), encoder.identity(), sorted(modules), content, seed]).encode()
    ).hexdigest()
    folder = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HOME) / "qf_peft"
    path = folder / f"preserved-{identity[:32]}.safetensors"
    check_alike(lambda: {"model, or other chats to be preserved": identity})
    cached = _read(path, identity, sorted(modules))
    if all(exchange(cached is not None)):
        return cached
    if own:
        chats = [*chats, *write_chats(network, encoder, own, seed, progress)]
    preserved = _measure(network, encoder, modules, chats, starts_only, batch_tokens, progress)
    try:
        if writes_cache():
            _write(path, identity, preserved)
    except OSError as error:  # a full disk or a folder that cannot be written costs the cache, not the lesson
        logger.warning(f"the preserved keys could not be cached in {folder}: {error}")
        return preserved
    return _read(path, identity, sorted(modules)) or preserved  # from where one module's keys are read at a time


def _measure(
    network: nn.Module,
    encoder: Encoder,
    modules: Mapping[str, nn.Module],
    chats: list[Chat],
    starts_only: bool,
    batch_tokens: int,
    progress: Callable[[int], None],
) -> Preserved:
    sequences, kept, prompts = answered_chats(network, encoder, chats, batch_tokens, progress)
    thinned = max(1, -(-sum(kept) // _MOST_KEYS))
    if thinned > 1 and not starts_only:
        sequences, kept, prompts = sequences[::thinned], kept[::thinned], prompts[::thinned]
    points = {name: Point(module, "input") for name, module in modules.items()}
    dtype = network.get_input_embeddings().weight.dtype
    found = forward_pass(
        network,
        sequences,
        kept,
        points,
        batch_tokens=batch_tokens,
        pad_id=encoder.tokenizer.pad_token_id,
        progress=progress,
    )
    if starts_only:
        starts = answer_starts(kept)
        found = {name: keys[starts] for name, keys in found.items()}
    return Preserved(sequences, kept, {name: keys.to("cpu", dtype) for name, keys in found.items()}, prompts)


def answered_chats(
    network: nn.Module,
    encoder: Encoder,
    chats: list[Chat],
    batch_tokens: int,
    progress: Callable[[int], None],
) -> tuple[list[list[int]], list[int], list[Text | None]]:
    """Chats as token ids, those without an answer answered by the model; how many of each one's last steps are the
    answer's (all of plain text's); and their prompts. Chats too long for the model are left out.

    Raises:
        ValueError: every chat is too long.
    """
    rows = [Row(i, "", c.prompt, c.completion) if c.text is None else None for i, c in enumerate(chats)]
    silent = [row for row in rows if row is not None and row.completion is None]
    answers = generate(
        network,
        encoder.tokenizer,
        [encoder.prompt_ids(row, instructed=False) for row in silent],
        max_new_tokens=_ANSWER_TOKENS,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    answered = {row.index: answer for row, answer in zip(silent, answers, strict=True)}
    sequences, kept, prompts = [], [], []
    for row, chat in zip(rows, chats, strict=True):
        if row is None:
            ids, count = encoder.text_ids(chat.text)
        else:
            text, ended = answered.get(row.index, (row.completion, True))
            if text:
                ids, count = encoder.answer_ids(Row(row.index, "", row.prompt, text), ended)
            else:  # an empty answer is one too: the step that ends the turn at once
                ids, count = [*encoder.prompt_ids(row, instructed=False), encoder.tokenizer.eos_token_id or 0], 1
        if count and (encoder.max_length is None or len(ids) <= encoder.max_length):
            sequences.append(ids)
            kept.append(count)
            prompts.append(chat.prompt)
    if not sequences:
        raise ValueError("every chat to be preserved is longer than the model allows; give shorter ones")
    return sequences, kept, prompts


def answer_starts(kept: Sequence[int]) -> Tensor:
    """Where each sequence's positions begin in a pass's result: (sequences)."""
    return torch.tensor([0, *kept[:-1]]).cumsum(0)


def fingerprint(network: nn.Module) -> str:
    """A hash by which a model's weights are recognised: its configuration and 64 values of every parameter."""
    config = {k: v for k, v in network.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps([config, getattr(network.config, "_commit_hash", None)], default=str).encode())
    for path, module in network.named_modules():
        if "lora_" in path:
            continue
        with align_module_device(module):  # weights that are offloaded come back for a moment
            for name, parameter in module.named_parameters(recurse=False):
                digest.update(f"{path}.{name}".replace(".base_layer", "").encode())
                for values in sample(parameter) if parameter.device.type != "meta" else ():
                    digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, identity: str, preserved: Preserved) -> None:
    tensors = {name: keys.contiguous() for name, keys in preserved.keys.items()}
    header = {
        "identity": identity, "sequences": preserved.sequences, "kept": preserved.kept, "prompts": preserved.prompts,
        "sum": _sum(tensors),
    }  # fmt: skip
    write_tensors(path, tensors, {"preserved": json.dumps(header)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path, identity: str, modules: Sequence[str]) -> Preserved | None:
    """What the file holds, or None if it is missing, torn, or of other content."""
    if not path.exists():
        return None
    try:
        keys, state = _KeysInFile(path), path.stat()
        seen = str(path), state.st_mtime_ns, state.st_size
        header = keys.header
        whole = seen in _found_whole or header["sum"] == _sum(keys)
        if missing := [name for name in modules if name not in keys]:
            raise KeyError(missing[0])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning(f"the cache {path.name} is damaged ({error}); it is made anew")
        return None
    if header.get("identity") != identity or not whole:
        logger.warning(f"the cache {path.name} does not hold what its name says; it is made anew")
        return None
    _found_whole.add(seen)
    return Preserved(header["sequences"], header["kept"], keys, header["prompts"])


_found_whole: set[tuple[str, int, int]] = set()  # files, with time and size, whose sum was found right


class _KeysInFile(Mapping):
    """Keys by module name, read from the file one module at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self.header = json.loads(file.metadata()["preserved"])
            self._names = sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name).clone()  # of its own: a file that is cut short takes mapped tensors with it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def nearest(starts: Tensor, taught: Tensor, count: int) -> list[int]:
    """The chats nearest to what is taught, in turn for each taught row.

    Args:
        starts: (m, d), the chats' keys where their answers begin, at one module.
        taught: (n, d), the taught rows'.
        count: how many.

    Returns:
        Indices into the chats, by the cosine of the keys less the chats' mean.
    """
    unit, middle = torch.nn.functional.normalize, starts.float().mean(0)
    alike = unit(starts.float() - middle, dim=1) @ unit(taught.float() - middle, dim=1).T
    ranked = alike.argsort(dim=0, descending=True, stable=True).flatten().tolist()
    return list(dict.fromkeys(ranked))[:count]


def _norms(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys, dim=1, dtype=torch.float32).clamp(min=1e-12)


def nearness(keys: Tensor, taught: Tensor, significance: Tensor) -> Tensor:
    """Weights of preserved keys (m, d_in) by how alike they are to what is taught: (m), summing to 1.

    The squared cosine to each of the (at most 256) most significant taught keys, averaged by significance: what lies
    near a taught key is what teaching endangers.
    """
    chosen = significance.topk(min(256, len(significance))).indices
    unit = torch.nn.functional.normalize(taught[chosen].float(), dim=1)
    # In the keys' own dtype, which is what they were computed in: no copy of them, and fast.
    alike = (keys @ unit.to(keys.dtype).T).float() / _norms(keys)[:, None]
    weights = alike.clamp(min=0).square() @ significance[chosen] + 1e-12
    return weights / weights.sum()
