"""The second moment of keys that must keep their outputs: C = E[k kᵀ] (d_in × d_in), kept as small as it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..runtime.devices import solves_on, whole_products, wide

_ROWS, _COLUMNS = 4096, 512  # of one block of a product
_EXACT = 2048  # rows whose eigenvectors are soon found


class SecondMoment:
    """Accumulates C = Σ_j w_j k_j k_jᵀ over keys k_j and their weights w_j.

    While the keys are fewer than d_in they are kept as rows of a `root` K with C = Kᵀ K, so that memory is
    O(keys × d_in); from then on as the `matrix` C itself.

    Args:
        width: d_in, the keys' width.
        home: where it lies; by default where the keys are that were added last, which is where it is summed.
    """

    root: Tensor | None
    """(m, d_in) float32: the rows √w_j k_j, while m < d_in."""
    matrix: Tensor | None
    """(d_in, d_in) float64 (float32 after `compact`): C, once there are at least d_in keys."""
    count: int
    """How many keys were added."""
    ridge: float
    """What is added to C's diagonal by those who solve with it: a ridge, and what `compact` took off the rows."""

    def __init__(self, width: int, home: torch.device | None = None) -> None:
        self.width, self.home = width, home
        self.count = 0
        self.ridge = 0.0
        self.root = torch.zeros(0, width)
        self.matrix = None

    @classmethod
    def of(cls, tensor: Tensor, *, rows: bool = False, count: int = 0) -> SecondMoment:
        """The moment C given (d_in, d_in), or with `rows` its root K (m, d_in); of so many keys."""
        made = cls(tensor.shape[1])
        made.root, made.matrix = (tensor, None) if rows else (None, tensor)
        made.count = count
        return made

    def update(self, keys: Tensor, weights: Tensor | float = 1.0) -> SecondMoment:
        """Add keys (n, d_in) with weights (n) ≥ 0, or one weight for all. Returns itself.

        Raises:
            ValueError: the keys' width is not d_in, or a weight is negative or not finite.
        """
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise ValueError(f"keys have shape {tuple(keys.shape)}; expected (n, {self.width})")
        keys = keys.to(solves_on(keys.device))
        weights = torch.as_tensor(weights, dtype=torch.float32, device=keys.device).expand(keys.shape[0])
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError("a weight of a key is negative or not finite; expected numbers from 0 up")
        self.count += keys.shape[0]
        if self.root is not None and self.root.shape[0] + keys.shape[0] < self.width:
            home = self.home or keys.device
            self.root = torch.cat([self.root.to(home), (keys.float() * weights.sqrt()[:, None]).to(home)])
            return self
        self._as_matrix(keys.device)
        for part in row_blocks(keys.shape[0]):
            add_gram(self.matrix, keys[part].float() * weights[part].sqrt()[:, None])
        return self

    def add(self, other: SecondMoment) -> SecondMoment:
        """Add another's content, its ridge too. Returns itself."""
        if other.root is not None:
            self.update(other.root)
        else:
            self._as_matrix(other.matrix.device)
            self.matrix += other.matrix.to(self.matrix.device)
        self.count += other.count - (other.root.shape[0] if other.root is not None else 0)
        self.ridge += other.ridge
        return self

    def copy(self) -> SecondMoment:
        """Another of the same content; updating one leaves the other."""
        twin = SecondMoment(self.width)
        twin.count, twin.ridge, twin.root = self.count, self.ridge, self.root
        twin.matrix = None if self.matrix is None else self.matrix.to(torch.float64, copy=True)
        return twin

    def map(self, move: Callable[[Tensor], Tensor]) -> SecondMoment:
        """Another of the same content with its tensor moved."""
        twin = SecondMoment(self.width, self.home)
        twin.count, twin.ridge = self.count, self.ridge
        twin.root = None if self.root is None else move(self.root)
        twin.matrix = None if self.matrix is None else move(self.matrix)
        return twin

    def scale(self, factor: float) -> SecondMoment:
        """Multiply all by a factor ≥ 0. Returns itself."""
        if self.root is not None:
            self.root = self.root * factor**0.5
        else:
            self.matrix = self.matrix * factor
        self.ridge *= factor
        return self

    def to(self, device: torch.device) -> SecondMoment:
        """Move to a device, or to where what lies there is solved for. Returns itself."""
        device = solves_on(device)
        self.root = None if self.root is None else self.root.to(device)
        self.matrix = None if self.matrix is None else self.matrix.to(device)
        return self

    @whole_products()
    def compact(self, rank: int) -> SecondMoment:
        """Bound the memory: C in float32, exactly symmetric; and where d_in > `rank`, and there are more than twice as
        many rows, the `rank` largest directions as rows. Returns itself.

        What the next largest eigenvalue δ says was lost at most is taken off those kept, and half of it added to the
        `ridge`: Robust Frequent Directions (Luo et al., arXiv 1705.05067), so that ‖C − C'‖ ≤ δ / 2. Of more
        than 2,048 rows, and four times `rank`, the directions are found by random projections (Halko et al., arXiv
        0909.4061), and the error is of the order of δ.
        """
        if self.width <= rank or (self.root is not None and self.root.shape[0] <= 2 * rank):
            self.matrix = None if self.matrix is None else _mirrored(self.matrix.float())
            return self
        whole = self.root if self.root is not None else self.matrix
        if whole.shape[0] > max(4 * rank, _EXACT):
            values, rows = _leading(whole.float(), rank + 8, self.root is not None)
        elif self.root is not None:
            root = self.root.double()
            values, vectors = torch.linalg.eigh(root @ root.T)
            rows = vectors.T @ root
        else:
            values, vectors = torch.linalg.eigh(self.matrix.double())
            rows = vectors.T * values.clamp(min=0).sqrt()[:, None]
        lost, top = values[-rank - 1].clamp(min=0), values[-rank:].clamp(min=1e-300)
        self.root = (rows[-rank:] * ((top - lost).clamp(min=0) / top).sqrt()[:, None]).float()
        self.matrix = None
        self.ridge += float(lost) / 2
        return self

    @whole_products()
    def solve(self, rows: Tensor) -> Tensor:
        """`rows` (n, d_in) times (C + ridge I)⁻¹: (n, d_in) float64; by Cholesky factors of C, or where its root K has
        fewer rows of K Kᵀ + ridge I (Woodbury).

        Raises:
            ValueError: the ridge is not positive.
        """
        if not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge!r}; expected a positive number")
        rows = wide(rows)
        if self.matrix is not None:
            system = self.matrix.to(rows.device, torch.float64, copy=True)
            system.diagonal().add_(self.ridge)
            return torch.cholesky_solve(rows.T, torch.linalg.cholesky(system)).T
        root = self.root.to(rows)
        small = root @ root.T
        small.diagonal().add_(self.ridge)
        inner = torch.cholesky_solve(root @ rows.T, torch.linalg.cholesky(small))
        return (rows - inner.T @ root) / self.ridge

    def dense(self) -> Tensor:
        """C + ridge I: (d_in, d_in) float64."""
        whole = wide(self.matrix).clone() if self.matrix is not None else wide(self.root).T @ wide(self.root)
        whole.diagonal().add_(self.ridge)
        return whole

    @property
    def trace(self) -> float:
        """tr C: the keys' weighted squared norms, summed."""
        if self.matrix is not None:
            return float(self.matrix.trace())
        return float(self.root.double().square().sum())

    def quadratic(self, vectors: Tensor) -> Tensor:
        """vᵀ C v for each row v of `vectors` (n, d_in): (n)."""
        v = wide(vectors).to(self.root.device if self.matrix is None else self.matrix.device)
        if self.matrix is not None:
            return ((v @ self.matrix.double()) * v).sum(1)
        return (v @ self.root.double().T).square().sum(1)

    def _as_matrix(self, device: torch.device) -> None:
        """Go over from the rows to the matrix; what is left to be summed is summed on the device."""
        home = self.home or device
        if self.matrix is not None:
            self.matrix = self.matrix.to(home, torch.float64)
            return
        root, self.root = self.root, None
        self.matrix = torch.zeros(self.width, self.width, dtype=torch.float64, device=home)
        for part in row_blocks(root.shape[0]):
            add_gram(self.matrix, root[part].to(device))


def row_blocks(count: int, size: int = _ROWS) -> Iterator[slice]:
    """Slices of at most so many rows."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


@whole_products()
def add_gram(matrix: Tensor, rows: Tensor) -> None:
    """Add Kᵀ K of rows K (n, d) to a matrix (d, d), which may lie on another device, in place: products in the rows'
    dtype, sums over calls in the matrix's. Of a wide matrix only the blocks on and above the diagonal are computed; the
    rest mirrors them."""
    width = matrix.shape[0]
    for part in row_blocks(width, _COLUMNS):
        product = rows[:, part].T @ rows[:, part.start :]
        matrix[part, part.start :] += product.to(matrix.device)
        if part.stop < width:
            matrix[part.stop :, part] = matrix[part, part.stop :].T


def triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a matrix (d, d), row after row: (d (d + 1) / 2)."""
    return torch.cat([row[i:] for i, row in enumerate(matrix)])


def from_triangle(values: Tensor, width: int) -> Tensor:
    """The symmetric matrix (d, d) of such a triangle."""
    matrix = values.new_zeros(width, width)
    for i, part in enumerate(values.split(list(range(width, 0, -1)))):
        matrix[i, i:] = part
    return _mirrored(matrix)


def _mirrored(matrix: Tensor) -> Tensor:
    """A matrix (d, d) with its lower triangle made the mirror of its upper one, in place, a block at a time."""
    for part in row_blocks(len(matrix), _COLUMNS):
        matrix[part.stop :, part] = matrix[part, part.stop :].T
        block = matrix[part, part]
        block.copy_(block.triu() + block.triu(1).T)
    return matrix


def _leading(whole: Tensor, count: int, rooted: bool) -> tuple[Tensor, Tensor]:
    """About the largest eigenvalues of C (ascending, float64) and rows whose squares sum to C's part along them.

    Two multiplications of C with random vectors find their span, a third one C within it. `whole` is C, or with
    `rooted` a root K of it.
    """

    def apply(vectors: Tensor) -> Tensor:
        return whole.T @ (whole @ vectors) if rooted else whole @ vectors

    generator = torch.Generator().manual_seed(0)
    random = torch.randn(whole.shape[1], count, generator=generator).to(whole)
    basis = torch.linalg.qr(apply(random)).Q
    basis = torch.linalg.qr(apply(basis)).Q
    values, vectors = torch.linalg.eigh((basis.T @ apply(basis)).double())
    values = values.clamp(min=0)
    return values, (basis.double() @ vectors).T * values.sqrt()[:, None]
