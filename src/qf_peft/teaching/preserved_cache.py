"""What is measured once for a model and its preserved chats, in files that say what they are of and are whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import align_module_device
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from ..adapter.quantized import sample
from ..data.rows import Encoder
from ..data.writing import whole_file
from ..runtime.processes import check_alike, exchange, writes_cache

logger = logging.get_logger(__name__)

_FORMAT = 7
CACHE_SIZE = 20.0  # GB: two datasets' keys at all blocks of a model of 7 billion parameters, or moments of dozens
_UNFINISHED = ".qf_cache-"  # a file that is being written, or was broken off
_BROKEN_OFF = 24 * 3600  # seconds after which nobody writes it any more
_OF_THE_FILES = ("transformers_version", "_name_or_path", "dtype")  # of a configuration: not the model
_NAME = re.compile(r"(moments|preserved)-[0-9a-f]{32}\.safetensors")
_found_whole: set[tuple[str, int, int]] = set()  # files, with time and size, whose sum was found right
Made = TypeVar("Made")


@dataclass(frozen=True)
class Cache:
    """A folder for what is measured once, and how large it may grow."""

    folder: str | Path | None = None
    """By default `qf_peft` in Hugging Face's cache."""
    size: float = CACHE_SIZE
    """In GB. Beyond it the files that were used longest ago are removed, but for the one just written."""

    @property
    def path(self) -> Path:
        return Path(self.folder) if self.folder is not None else Path(constants.HF_HOME) / "qf_peft"


def cached(
    kind: str,
    content: Any,
    network: nn.Module,
    encoder: Encoder,
    cache: Cache,
    make: Callable[[], Made],
    pack: Callable[[Made], tuple[dict[str, Tensor], dict[str, Any]]],
    unpack: Callable[[dict[str, Any], Mapping[str, Tensor]], Made],
) -> Made:
    """What `make` makes, from the file where it is in one.

    The file's name is a hash of the model (its configuration, revision and a sample of its weights), the tokenizer and
    the content; a file that is torn, or does not say that it is of this very content, is made anew.

    Args:
        kind: how the file's name begins.
        content: what is measured, as JSON can hold it.
        network, encoder: the model and its tokenizer's.
        cache: where it is.
        make: measures it.
        pack: what was made as tensors by name, and the rest for JSON.
        unpack: the way back, of the tensors read one by one from the file. May raise KeyError, TypeError or ValueError.
    """
    identity = hashlib.sha256(
        json.dumps([_FORMAT, kind, fingerprint(network), encoder.identity(), content]).encode()
    ).hexdigest()
    folder = cache.path
    path = folder / f"{kind}-{identity[:32]}.safetensors"
    check_alike(lambda: {"model, or other chats to be preserved": identity})
    found = _read(path, identity, unpack)
    if all(exchange(found is not None)):
        return found
    made = make()
    try:
        if writes_cache():
            _write(path, identity, *pack(made))
            _evict(folder, cache.size, path)
    except OSError as error:  # a full disk or a folder that cannot be written costs the cache, not the lesson
        logger.warning(f"what is preserved could not be cached in {folder}: {error}")
        return made
    return _read(path, identity, unpack) or made  # as the next time, rounding included


def fingerprint(network: nn.Module) -> str:
    """A hash by which a model's weights are recognised: its configuration, and 64 values of every parameter. In what
    dtype its files are does not count, only in what it runs."""
    config = {k: v for k, v in network.config.to_dict().items() if k not in _OF_THE_FILES}
    revision, dtype = getattr(network.config, "_commit_hash", None), network.get_input_embeddings().weight.dtype
    digest = hashlib.sha256(json.dumps([config, revision, str(dtype)], default=str).encode())
    for path, module in network.named_modules():
        if "lora_" in path:
            continue
        with align_module_device(module):  # weights that are offloaded come back for a moment
            for name, parameter in module.named_parameters(recurse=False):
                digest.update(f"{path}.{name}".replace(".base_layer", "").encode())
                for values in sample(parameter) if parameter.device.type != "meta" else ():
                    digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, identity: str, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Write a file under a temporary name and rename it."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = json.dumps({"identity": identity, "sum": _sum(tensors), **rest})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, _UNFINISHED) as file:
        save_file(tensors, file, metadata={"preserved": header})


def _evict(folder: Path, size: float, written: Path) -> None:
    """Remove the files used longest ago until those left take no more than so many GB, and what was broken off."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _BROKEN_OFF:
                path.unlink()
    files = []
    for path in folder.iterdir():
        with suppress(OSError):
            if _NAME.fullmatch(path.name) and path != written:
                state = path.stat()
                files.append((max(state.st_atime_ns, state.st_mtime_ns), state.st_size, path))
    room = size * 1e9 - written.stat().st_size
    for _, taken, path in sorted(files, reverse=True):
        room -= taken
        if room < 0:
            with suppress(OSError):  # another process was faster, or (where open files stay) it is being read
                path.unlink()


def _read(path: Path, identity: str, unpack: Callable[[dict[str, Any], Mapping[str, Tensor]], Made]) -> Made | None:
    """What the file holds, or None if it is missing, torn, or of other content."""
    if not path.exists():
        return None
    try:
        tensors, state = _TensorsInFile(path), path.stat()
        seen = str(path), state.st_mtime_ns, state.st_size
        header = tensors.header
        if header.get("identity") != identity or not (seen in _found_whole or header["sum"] == _sum(tensors)):
            logger.warning(f"the cache {path.name} does not hold what its name says; it is made anew")
            return None
        found = unpack(header, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning(f"the cache {path.name} is damaged ({error}); it is made anew")
        return None
    _found_whole.add(seen)
    with suppress(OSError):  # when it was used last, which file systems seldom note by themselves
        os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))
    return found


class _TensorsInFile(Mapping):
    """Tensors by name, each read from the file when it is asked for; it is kept open, because it may be removed."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, safe_open(path, framework="pt").__enter__()
        self.header = json.loads(self._file.metadata()["preserved"])
        self._names = sorted(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                return file.get_tensor(name).clone()  # of its own: a file cut short takes mapped tensors with it
        except FileNotFoundError:
            return self._file.get_tensor(name).clone()

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
