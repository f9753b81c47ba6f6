"""The second moment of keys that must keep their outputs: C = E[k kᵀ] (d_in × d_in), kept as small as it can be."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Accumulates C = Σ_j w_j k_j k_jᵀ over keys k_j and their weights w_j.

    While the keys are fewer than d_in they are kept as rows of a `root` K with C = Kᵀ K, so that memory is
    O(keys × d_in); from then on as the `matrix` C itself.

    Args:
        width: d_in, the keys' width.
    """

    root: Tensor | None
    """(m, d_in) float32: the rows √w_j k_j, while m < d_in."""
    matrix: Tensor | None
    """(d_in, d_in) float64 (float32 after `compact`): C, once there are at least d_in keys."""
    count: int
    """How many keys were added."""
    floor: float
    """What is added to C's diagonal by those who solve with it: a ridge, and what `compact` took off the rows."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self.floor = 0.0
        self.root = torch.zeros(0, width)
        self.matrix = None

    def update(self, keys: Tensor, weights: Tensor | float = 1.0) -> SecondMoment:
        """Add keys (n, d_in) with weights (n) ≥ 0, or one weight for all. Returns itself.

        Raises:
            ValueError: the keys' width is not d_in, or a weight is negative or not finite.
        """
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise ValueError(f"keys have shape {tuple(keys.shape)}; expected (n, {self.width})")
        weights = torch.as_tensor(weights, dtype=torch.float32, device=keys.device).expand(keys.shape[0])
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError("a weight of a key is negative or not finite; expected numbers from 0 up")
        rows = keys.float() * weights.sqrt()[:, None]
        self.count += keys.shape[0]
        if self.root is not None and self.root.shape[0] + rows.shape[0] < self.width:
            self.root = torch.cat([self.root.to(rows.device), rows])
            return self
        if self.matrix is None:
            old = self.root.to(rows.device).double()
            self.matrix, self.root = old.T @ old, None
        self.matrix = self.matrix.to(rows.device, torch.float64).add_(rows.T @ rows)
        return self

    def add(self, other: SecondMoment) -> SecondMoment:
        """Add another's content, its floor too. Returns itself."""
        if other.root is not None:
            self.update(other.root)
        else:
            if self.matrix is None:
                root = self.root.to(other.matrix.device).double()
                self.matrix, self.root = root.T @ root, None
            self.matrix = self.matrix.double() + other.matrix.to(self.matrix.device).double()
        self.count += other.count - (other.root.shape[0] if other.root is not None else 0)
        self.floor += other.floor
        return self

    def copy(self) -> SecondMoment:
        """Another of the same content; updating one leaves the other."""
        twin = SecondMoment(self.width)
        twin.count, twin.floor, twin.root = self.count, self.floor, self.root
        twin.matrix = None if self.matrix is None else self.matrix.to(torch.float64, copy=True)
        return twin

    def compact(self, rank: int) -> SecondMoment:
        """Bound the memory: C in float32, and where d_in > `rank` its `rank` largest directions as rows. Returns
        itself.

        What the next largest eigenvalue δ says was lost at most is taken off those kept, and half of it added to the
        `floor`: Robust Frequent Directions (Luo et al., arXiv 1705.05067), so that ‖C − C'‖ ≤ δ / 2.
        """
        if self.width <= rank or (self.root is not None and self.root.shape[0] <= rank):
            self.matrix = None if self.matrix is None else self.matrix.float()
            return self
        if self.root is not None:
            root = self.root.double()
            values, vectors = torch.linalg.eigh(root @ root.T)
            rows = vectors.T @ root
        else:
            values, rows = torch.linalg.eigh(self.matrix.double())
            rows = rows.T * values.clamp(min=0).sqrt()[:, None]
        lost, top = values[-rank - 1].clamp(min=0), values[-rank:].clamp(min=1e-300)
        self.root = (rows[-rank:] * ((top - lost).clamp(min=0) / top).sqrt()[:, None]).float()
        self.matrix = None
        self.floor += float(lost) / 2
        return self

    @property
    def trace(self) -> float:
        """tr C: the keys' weighted squared norms, summed."""
        if self.matrix is not None:
            return float(self.matrix.trace())
        return float(self.root.double().square().sum())

    def quadratic(self, vectors: Tensor) -> Tensor:
        """vᵀ C v for each row v of `vectors` (n, d_in): (n)."""
        v = vectors.double()
        if self.matrix is not None:
            return ((v @ self.matrix.double()) * v).sum(1)
        return (v @ self.root.double().T).square().sum(1)
