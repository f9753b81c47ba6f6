"""An adapter's files: all of one save or none of it, and beside the weights the ledger and what binds later lessons.

PEFT writes an adapter's files in place, one after the other. Here a save goes into a folder of its own and is taken
over at once: that folder's renaming decides, and what a killed process left half done the next reader finishes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..data.ledger import LEDGER_NAME
from ..data.writing import INCOMING, check_folder, saving_to
from ..runtime.processes import by_main
from .statistics_file import STATISTICS_NAME, weights_sum, write_statistics

logger = logging.get_logger(__name__)

_UNFINISHED = ".qf_saving-"  # one that is still being written, or was broken off


@by_main
def save_at_once(
    model: PeftModel,
    save_directory: str | os.PathLike,
    names: list[str],
    saved: Callable[..., None],
    *args: Any,
    **options: Any,
) -> None:
    """Write all files of QF adapters or none, and the ledger with them; of several processes the main one writes.

    Args:
        model: the model with the adapters.
        save_directory: the folder.
        names: the adapters to write.
        saved: PEFT's own `save_pretrained`, with its further arguments.
    """
    target = Path(save_directory)
    for name in names:
        check_folder(_folder(target, name))
    with saving_to(target, "the adapter"):
        _write(model, target, names, saved, *args, **options)


def _write(
    model: PeftModel, target: Path, names: list[str], saved: Callable[..., None], *args: Any, **options: Any
) -> None:
    """Write the adapters elsewhere, and let their folders take them over."""
    target.mkdir(parents=True, exist_ok=True)
    for folder in {_folder(target, name) for name in ("default", *names)}:
        _clear(folder)
    with tempfile.TemporaryDirectory(dir=target, prefix=_unfinished()) as temporary:
        if (target / "README.md").is_file():  # whose text is kept
            shutil.copy(target / "README.md", temporary)
        with model.base_model.serving.generating():  # the weights and what is known of them are of one time
            saved(model, temporary, *args, **options)
            for name in names:
                folder = Path(temporary, name if name != "default" else "")
                taught = model.base_model.taught.get(name)
                if taught is not None and model.peft_config[name].keep_statistics:
                    layers = model.base_model.adapter_layers(name)
                    factors = {module: model.base_model.factors(name, module) for module in layers}
                    if not all(taught.holds(module, pair) for module, pair in factors.items()):
                        deltas = {module: model.base_model.delta(name, module) for module in layers}
                        taught = taught.settled(factors, deltas)
                    write_statistics(folder, taught, factors)
        for name in sorted(names, key=lambda name: name == "default"):
            _take_over(Path(temporary, name if name != "default" else ""), _folder(target, name))
        if "default" not in names:
            for path in Path(temporary).glob("*.md"):
                path.replace(target / path.name)


def _folder(target: Path, name: str) -> Path:
    return target if name == "default" else target / name


def _take_over(source: Path, target: Path) -> None:
    """Make a folder's files those of `source`: from the renaming on they are the folder's, come what may."""
    finish_saving(target)
    target.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(dir=target, prefix=_unfinished()))
    for path in [p for p in source.iterdir() if p.is_file()]:
        path.replace(whole / path.name)
        with (whole / path.name).open("rb") as file:
            os.fsync(file.fileno())
    while True:
        try:
            whole.rename(target / INCOMING)
            break
        except OSError:
            if not (target / INCOMING).exists():
                raise
            finish_saving(target)  # another process has saved here just now: the last one's files stay
    finish_saving(target)


def _unfinished() -> str:
    """How the folder of a save is called that this process writes."""
    return f"{_UNFINISHED}{os.getpid()}-"


def _clear(folder: Path) -> None:
    """Remove saves that were broken off; not those that a living process is at."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        writer = path.name.removeprefix(_UNFINISHED).split("-")[0]
        if not (writer.isdigit() and psutil.pid_exists(int(writer))):
            shutil.rmtree(path, ignore_errors=True)


def finish_saving(folder: str | os.PathLike) -> None:
    """Finish a save that was taken over but broken off."""
    incoming = Path(folder, INCOMING)
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
