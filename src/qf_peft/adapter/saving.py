"""An adapter's files: all of one save or none of it, and beside the weights the ledger and what binds later lessons.

PEFT writes an adapter's files in place, one after the other. Here a save goes into a folder of its own and is taken
over at once: that folder's renaming decides, and what a killed process left half done the next reader finishes.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..data.ledger import from_lines, to_lines
from ..runtime.processes import by_main
from ..solve.least_squares import LowRankDelta
from ..solve.second_moment import SecondMoment
from .state import TaughtAdapter, TaughtTokens

logger = logging.get_logger(__name__)

LEDGER_NAME = "qf_ledger.jsonl"
STATISTICS_NAME = "qf_statistics.safetensors"
_FORMAT = 1
_INCOMING = ".qf_incoming"  # a whole save, to be taken over
_UNFINISHED = ".qf_saving-"  # one that is still being written, or was broken off


def save_at_once() -> None:
    """Let `PeftModel.save_pretrained` of a QF adapter write all its files or none, and the ledger with them; of several
    processes the main one writes.

    PEFT has no place where a tuner could, so the method is wrapped; for adapters of other types it is what it was.
    """
    saved = getattr(PeftModel.save_pretrained, "before_qf_peft", PeftModel.save_pretrained)

    @by_main
    def save(self: PeftModel, save_directory: str | os.PathLike, names: list[str], *args: Any, **options: Any) -> None:
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for folder in {_folder(target, name) for name in ("default", *names)}:
            _clear(folder)
        with tempfile.TemporaryDirectory(dir=target, prefix=_unfinished()) as temporary:
            if (target / "README.md").is_file():  # whose text is kept
                shutil.copy(target / "README.md", temporary)
            with self.base_model.serving.generating():  # the weights and what is known of them are of one time
                saved(self, temporary, *args, **options)
                for name in names:
                    folder = Path(temporary, name if name != "default" else "")
                    taught = self.base_model.taught.get(name)
                    if taught is not None and self.peft_config[name].keep_statistics:
                        layers = self.base_model.layers(name)
                        factors = {module: self.base_model.factors(name, module) for module in layers}
                        if not all(taught.holds(module, pair) for module, pair in factors.items()):
                            held = {module: self.base_model.delta(name, module) for module in layers}
                            taught = taught.settled(factors, held)
                        write_statistics(folder, taught, factors)
            for name in sorted(names, key=lambda name: name == "default"):
                _take_over(Path(temporary, name if name != "default" else ""), _folder(target, name))
            if "default" not in names:
                for path in Path(temporary).glob("*.md"):
                    path.replace(target / path.name)

    @functools.wraps(saved)
    def save_pretrained(self: PeftModel, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
        given = inspect.signature(saved).bind(self, save_directory, *args, **options).arguments
        names = given.get("selected_adapters") or list(self.peft_config)
        kinds = {getattr(self.peft_config.get(name), "peft_type", None) for name in names}
        main = given.get("is_main_process", True)
        if kinds != {"QF"} or not main or Path(save_directory).is_file():
            return saved(self, save_directory, *args, **options)
        return save(self, save_directory, names, *args, **options)

    save_pretrained.before_qf_peft = saved
    PeftModel.save_pretrained = save_pretrained


def _folder(target: Path, name: str) -> Path:
    return target if name == "default" else target / name


def _take_over(source: Path, target: Path) -> None:
    """Make a folder's files those of `source`: from the renaming on they are the folder's, come what may."""
    settle(target)
    target.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(dir=target, prefix=_unfinished()))
    for path in [p for p in source.iterdir() if p.is_file()]:
        path.replace(whole / path.name)
        with (whole / path.name).open("rb") as file:
            os.fsync(file.fileno())
    while True:
        try:
            whole.rename(target / _INCOMING)
            break
        except OSError:
            if not (target / _INCOMING).exists():
                raise
            settle(target)  # another process has saved here just now: the last one's files stay
    settle(target)


def _unfinished() -> str:
    """How the folder of a save is called that this process writes."""
    return f"{_UNFINISHED}{os.getpid()}-"


def _clear(folder: Path) -> None:
    """Remove saves that were broken off; not those that a living process is at."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        writer = path.name.removeprefix(_UNFINISHED).split("-")[0]
        if not (writer.isdigit() and psutil.pid_exists(int(writer))):
            shutil.rmtree(path, ignore_errors=True)


def settle(folder: str | os.PathLike) -> None:
    """Finish a save that was taken over but broken off."""
    incoming = Path(folder, _INCOMING)
    try:
        names = {path.name for path in incoming.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in sorted(names):
        with suppress(FileNotFoundError):  # the one who saves, or another who loads, is at it too
            (incoming / name).replace(Path(folder, name))
    # A save without statistics leaves none of an earlier one behind; after a break these were moved before.
    kept = Path(folder, STATISTICS_NAME)
    if STATISTICS_NAME not in names and kept.is_file() and not _belongs(Path(folder)):
        kept.unlink(missing_ok=True)
        Path(folder, LEDGER_NAME).unlink(missing_ok=True)
    with suppress(OSError):
        incoming.rmdir()


def _belongs(folder: Path) -> bool:
    """Whether a folder's statistics are of its weights."""
    try:
        with safe_open(folder / STATISTICS_NAME, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("qf_peft", "{}"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return False
    return header.get("weights") == weights_sum(tensors.values())


def weights_sum(tensors: Any) -> str:
    """A hash of an adapter's factors, whatever they are called."""
    parts = sorted(hashlib.sha256(_bytes(tensor)).hexdigest() for tensor in tensors)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def write_statistics(folder: Path, taught: TaughtAdapter, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the ledger and the statistics of an adapter with these factors."""
    lines = to_lines(taught.entries)
    tensors = {
        f"{part}/{module}/{field}": tensor.detach().to("cpu", copy=True).contiguous()
        for part, module, field, tensor in _tensors(taught)
    }
    header = {
        "format": _FORMAT,
        "weights": weights_sum(tensor for pair in factors.values() for tensor in pair),
        "ledger": hashlib.sha256(lines.encode()).hexdigest(),
        "floor": {module: bound.floor for module, bound in taught.bound.items()},
        "rehearsed": taught.rehearsed,
        "styled": taught.styled,
        "settings": taught.settings,
    }
    (folder / LEDGER_NAME).write_text(lines, encoding="utf-8")
    save_file(tensors, folder / STATISTICS_NAME, metadata={"qf_peft": json.dumps(header)})


def _tensors(taught: TaughtAdapter) -> Iterator[tuple[str, str, str, Tensor]]:
    for module, tokens in taught.tokens.items():
        for field in ("keys", "residual", "significance"):
            yield "tokens", module, field, getattr(tokens, field)
    for part in ("offset", "delta", "foundation"):
        for module, delta in getattr(taught, part).items():
            yield part, module, "A", delta.A
            yield part, module, "B", delta.B
    for module, bound in taught.bound.items():
        yield "bound", module, *(("root", bound.root) if bound.matrix is None else ("matrix", bound.matrix))


def read_statistics(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], device: torch.device
) -> TaughtAdapter | None:
    """What `write_statistics` wrote, or None if there is nothing, or it is not of these factors (a warning says so)."""
    if not (folder / STATISTICS_NAME).is_file():
        return None
    try:
        lines = (folder / LEDGER_NAME).read_text(encoding="utf-8")
        with safe_open(folder / STATISTICS_NAME, framework="pt") as file:
            header = json.loads((file.metadata() or {})["qf_peft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']}; this version reads {_FORMAT}")
        if header["ledger"] != hashlib.sha256(lines.encode()).hexdigest():
            raise ValueError("the ledger was changed")
        if header["weights"] != weights_sum(tensor for pair in factors.values() for tensor in pair):
            raise ValueError("the weights are not those that were taught")
        entries = from_lines(lines, LEDGER_NAME)
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            part, module, field = name.split("/")
            if module not in factors or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is of no module of the adapter, or not finite")
            found.setdefault(part, {}).setdefault(module, {})[field] = tensor.to(device)
        bound = {}
        for module, fields in found.get("bound", {}).items():
            (field, tensor), width = next(iter(fields.items())), factors[module][0].shape[1]
            if tensor.shape[1:] != (width,) or (field == "matrix" and len(tensor) != width):
                raise ValueError(f"what binds {module} has shape {tuple(tensor.shape)}; expected rows of {width}")
            bound[module] = SecondMoment(width)
            bound[module].floor = float(header["floor"][module])
            bound[module].root = bound[module].matrix = None
            setattr(bound[module], field, tensor)
        deltas = {
            part: {module: LowRankDelta(**fields) for module, fields in found.get(part, {}).items()}
            for part in ("offset", "delta", "foundation")
        }
        for module, delta in ((m, d) for part in deltas.values() for m, d in part.items()):
            a, b = factors[module]
            if delta.A.shape != (delta.rank, a.shape[1]) or delta.B.shape != (b.shape[0], delta.rank):
                raise ValueError(f"a change of {module} has another shape than its weight")
        return TaughtAdapter(
            tokens={module: TaughtTokens(**fields) for module, fields in found.get("tokens", {}).items()},
            bound=bound, installed=dict(factors), entries=entries, rehearsed=int(header["rehearsed"]),
            settings=dict(header["settings"]), styled=bool(header["styled"]), **deltas,
        )  # fmt: skip
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning(
            f"{folder / STATISTICS_NAME} is left out: {error}. The adapter works and can be taught on, but what it was "
            "taught is not known"
        )
        return None
