"""What is measured once for a model and its preserved chats, in files that say what they are of and are whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from ..runtime.processes import check_alike, exchange, writes_cache

logger = logging.get_logger(__name__)

_FORMAT = 5
_found_whole: set[tuple[str, int, int]] = set()  # files, with time and size, whose sum was found right
Made = TypeVar("Made")


def cached(
    kind: str,
    content: Any,
    network: nn.Module,
    encoder: Encoder,
    cache_dir: str | Path | None,
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
        cache_dir: a folder; by default `qf_peft` in Hugging Face's cache.
        make: measures it.
        pack: what was made as tensors by name, and the rest for JSON.
        unpack: the way back, of the tensors read one by one from the file. May raise KeyError, TypeError or ValueError.
    """
    identity = hashlib.sha256(
        json.dumps([_FORMAT, kind, fingerprint(network), encoder.identity(), content]).encode()
    ).hexdigest()
    folder = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HOME) / "qf_peft"
    path = folder / f"{kind}-{identity[:32]}.safetensors"
    check_alike(lambda: {"model, or other chats to be preserved": identity})
    found = _read(path, identity, unpack)
    if all(exchange(found is not None)):
        return found
    made = make()
    try:
        if writes_cache():
            _write(path, identity, *pack(made))
    except OSError as error:  # a full disk or a folder that cannot be written costs the cache, not the lesson
        logger.warning(f"what is preserved could not be cached in {folder}: {error}")
        return made
    return _read(path, identity, unpack) or made  # as the next time, rounding included


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


def _write(path: Path, identity: str, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Write a file under a temporary name and rename it."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = json.dumps({"identity": identity, "sum": _sum(tensors), **rest})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"preserved": header})
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    return found


class _TensorsInFile(Mapping):
    """Tensors by name, each read from the file when it is asked for."""

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
