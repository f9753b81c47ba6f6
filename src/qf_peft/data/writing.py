"""Files that are written whole or not at all, and their errors, said so that one knows what to do."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

INCOMING = ".qf_incoming"  # in an adapter's folder a whole save, to be taken over


@contextmanager
def whole_file(path: Path, prefix: str | None = None) -> Iterator[Path]:
    """Another name beside a file, to be written under: it becomes the file once that has gone well.

    Args:
        path: the file, new or to be replaced.
        prefix: how the other name begins; by default as a hidden file's of this name.
    """
    temporary = path.with_name(f"{prefix or f'.{path.name}-'}{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def saving_to(path: str | os.PathLike, what: str) -> Iterator[None]:
    """While open, errors of files become one that says where `what` could not be saved, and why.

    Raises:
        OSError: of the kind that it was (`PermissionError`, …), with its number.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if number is None:
            found = re.search(r"os error (\d+)", str(error))  # as safetensors says it
            number, reason = (int(found[1]), os.strerror(int(found[1]))) if found else (errno.EIO, str(error))
        advice = {
            errno.ENOSPC: "; make room, or give another folder",
            errno.EACCES: "; give a folder that may be written to",
            errno.EROFS: "; give a folder that may be written to",
        }.get(number, "")
        raise OSError(
            number, f"{what} could not be saved: {reason}{advice}. What was there is as it was", str(path)
        ) from error


def check_folder(path: Path) -> None:
    """Refuse a path that is a file, or that leads through one, before anything is written.

    Raises:
        ValueError: the message names the file.
    """
    for place in (path, *path.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{place} is a file; give a folder")
            return
