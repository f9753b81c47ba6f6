"""Room for activations: in memory as far as a budget goes, beyond it in temporary files mapped into memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Scratch:
    """Hands out tensors for activations and counts those that are still in use.

    Args:
        budget: how many bytes may lie in memory; None for any number.
        folder: where files are made; by default the system's folder for temporary files (`TMPDIR`), which should not be
            in memory itself. A file's name is removed as soon as it is open, so that nothing is left however the
            process ends.
        device, dtype: where tensors in memory are, and of which dtype all are; by default as asked for.
    """

    held: int
    """How many bytes in memory are in use."""

    def __init__(
        self,
        budget: float | None = None,
        folder: str | Path | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.budget, self.folder, self.held = budget, folder, 0
        self.device, self.dtype = device, dtype

    def take(self, values: Tensor) -> Tensor:
        """Activations as soon as they are met: as, and where, they will lie."""
        return values.to(self.device or values.device, self.dtype or values.dtype)

    def empty(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A tensor (rows, columns) without content, on the device or, beyond the budget, in a file."""
        dtype, device = self.dtype or dtype, self.device or device
        size = rows * columns * dtype.itemsize
        if self.budget is None or self.held + size <= self.budget or not size:
            return self._counted(torch.empty(rows, columns, dtype=dtype, device=device))
        return self._in_file(rows * columns, dtype).view(rows, columns)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself or, beyond the budget, a copy of it in a file."""
        if self.budget is None or self.held + tensor.nbytes <= self.budget:
            return self._counted(tensor)
        return self._in_file(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)

    def map(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`work` done on tensors (n, …) a block of rows at a time; the results (n, d) together."""
        result: Tensor | None = None
        for first in range(0, len(tensors[0]), _ROWS):
            part = slice(first, first + _ROWS)
            values = work(*(tensor[part] for tensor in tensors))
            if result is None:
                result = self.empty(len(tensors[0]), values.shape[1], values.dtype, values.device)
            result[part] = values.to(result.device)
        return result if result is not None else work(*tensors)

    def _counted(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes

        def release() -> None:
            self.held -= size

        self.held += size
        weakref.finalize(tensor, release)
        return tensor

    def _in_file(self, numel: int, dtype: torch.dtype) -> Tensor:
        handle, path = tempfile.mkstemp(prefix="qf_peft-", dir=self.folder)
        try:
            if hasattr(os, "posix_fallocate"):  # else a full disk would be noticed in the midst of it, and kill us
                os.posix_fallocate(handle, 0, numel * dtype.itemsize)
        except OSError as error:
            Path(path).unlink()
            raise OSError(
                error.errno,
                f"no room for {numel * dtype.itemsize / 1e9:.2g} GB of activations ({error.strerror}); set TMPDIR to a "
                "folder on a larger disk, or raise activation_memory",
                str(Path(path).parent),
            ) from error
        finally:
            os.close(handle)
        tensor = torch.from_file(path, shared=True, size=numel, dtype=dtype)
        try:
            Path(path).unlink()
        except OSError:  # where an open file keeps its name
            weakref.finalize(tensor, Path(path).unlink, missing_ok=True)
        return tensor


_ROWS = 4096
