"""An adapter as it was before its last lessons: in memory as far as a budget goes, beyond it in temporary files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers.utils import logging

from ..forward.scratch import Scratch
from .state import TaughtAdapter

logger = logging.get_logger(__name__)

KEPT = 8  # versions
MEMORY = 1e9  # bytes of theirs in memory


@dataclass(frozen=True)
class Version:
    """An adapter at one time, on the host. What did not change is shared with other versions."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """By module name: A (r, d_in) and B (d_out, r)."""
    scaling: dict[str, float]
    rank: tuple[int, float]
    """`r` and `lora_alpha` of the configuration."""
    taught: TaughtAdapter | None

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        yield from (part for pair in self.factors.values() for part in pair)
        if self.taught is not None:
            yield from self.taught.tensors()


def within_memory(versions: Sequence[Version], before: Version, present: TaughtAdapter | None) -> list[Version]:
    """The last eight versions, the newest `before` the `present` one. Where what they hold, and the present one does
    not, takes more than a gigabyte, the oldest ones' is put into files (`TMPDIR`)."""
    versions = [*versions, before][-KEPT:]
    shared = {id(tensor) for tensor in present.tensors()} if present is not None else set()
    room, moved = MEMORY, {}
    try:
        for version in reversed(versions):
            for tensor in version.tensors():
                if id(tensor) in shared or id(tensor) in moved or in_file(tensor):
                    continue
                room -= tensor.nbytes
                moved[id(tensor)] = tensor if room >= 0 else Scratch(0).keep(tensor)
    except OSError as error:
        safe = shared | moved.keys()
        versions = [version for version in versions if all(id(t) in safe or in_file(t) for t in version.tensors())]
        logger.warning(f"only {len(versions)} earlier versions are kept for rollback: {error}")

    def there(tensor: Tensor) -> Tensor:
        return moved.get(id(tensor), tensor)

    return [
        version
        if all(there(tensor) is tensor for tensor in version.tensors())
        else replace(
            version,
            factors={name: (there(a), there(b)) for name, (a, b) in version.factors.items()},
            taught=version.taught.map(there) if version.taught is not None else None,
        )
        for version in versions
    ]


def in_file(tensor: Tensor) -> bool:
    """Whether a tensor lies in a temporary file (see [`Scratch`])."""
    return tensor.untyped_storage().is_shared()
