"""The closed-form solves: keys, residuals and weights in, a low-rank change of one weight out. No model in sight.

Notation, for a module with weight W (d_out × d_in): the rows of `keys` Y (n × d_in) are its inputs at the n taught
positions, the rows of `residual` R (n × d_out) what its outputs there should change by, `significance` s (n) how much
each row counts. The change sought is ΔW (d_out × d_in) with ΔW y_i ≈ r_i.

Factorisations are done in float64: they are small, and nearly equal keys are the rule, not the exception. What is as
long as the tokens is gone through in blocks of rows, so that keys may lie in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.devices import solves_on, whole_products, wide
from .second_moment import SecondMoment, add_gram, row_blocks

_COLUMNS = 1024  # of one block of a wide matrix
_LARGE = 2048  # rows of a Gram matrix whose eigenvectors take too long


@dataclass(frozen=True)
class TaughtTokens:
    """The rows of one module's least squares, one a taught position."""

    keys: Tensor
    """(n, d_in) float32: the module's inputs in the bare pass."""
    residual: Tensor
    """(n, d_out) float32: what the module's outputs should change by, measured from the base weights."""
    significance: Tensor
    """(n) float32: how much each row counts."""

    def __add__(self, other: TaughtTokens) -> TaughtTokens:
        device = other.keys.device  # these may come from a file
        return TaughtTokens(
            torch.cat([self.keys.to(device), other.keys]),
            torch.cat([self.residual.to(device), other.residual]),
            torch.cat([self.significance.to(device), other.significance]),
        )

    def to(self, device: torch.device) -> TaughtTokens:
        return TaughtTokens(self.keys.to(device), self.residual.to(device), self.significance.to(device))


@dataclass(frozen=True)
class LowRankDelta:
    """The change ΔW = B A of a weight."""

    A: Tensor
    """(rank, d_in)"""
    B: Tensor
    """(d_out, rank)"""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), without forming it."""
        a, b = wide(self.A), wide(self.B)
        return float(((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt())

    def __call__(self, keys: Tensor) -> Tensor:
        """ΔW applied to keys (n, d_in): (n, d_out)."""
        with whole_products():
            return keys @ self.A.T @ self.B.T

    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        """The sum of two changes, by stacking their factors."""
        return LowRankDelta(torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1))

    def dense(self) -> Tensor:
        """ΔW itself, (d_out, d_in)."""
        return self.B @ self.A

    def to(self, *given: torch.dtype | torch.device | Tensor) -> LowRankDelta:
        """The same factors with another dtype, on another device, or both of them as of a tensor."""
        return LowRankDelta(self.A.to(*given), self.B.to(*given))

    def compressed(self, rank: int | None = None, tolerance: float = 0.0) -> LowRankDelta:
        """The nearest change (in Frobenius norm) of at most `rank`, with factors of equal norm; or the one of least
        rank that is at most `tolerance` away.

        From the singular values of B A, found without forming it where it is larger than its factors: QR of B, and the
        eigenvectors of the small core's Gram matrix. Singular values below float32's rounding of the largest are
        dropped in any case.
        """
        if self.rank == 0:
            return self
        a, b = wide(self.A), wide(self.B)
        if b.shape[1] >= b.shape[0]:  # more directions than outputs
            core, basis = b @ a, None
        else:
            basis, core = torch.linalg.qr(b)
            core = core @ a
        gram = core @ core.T
        if tolerance and len(gram) > _LARGE:  # what is dropped hides float32's rounding, which is several times faster
            values, u = (part.double() for part in torch.linalg.eigh(gram.float()))
        else:
            values, u = torch.linalg.eigh(gram)
        s, u = values.clamp(min=0).sqrt().flip(0), u.flip(1)
        keep = int((s > s[0] * torch.finfo(torch.float32).eps).sum())
        dropped = s.square().flip(0).cumsum(0).flip(0).sqrt()  # dropped[k]: the norm lost if k are kept
        keep = min(keep, max(1, int((dropped > tolerance).sum())))
        keep = keep if rank is None else min(keep, rank)
        u, root = u[:, :keep], s[:keep].sqrt()
        return LowRankDelta(
            A=((u.T @ core) / root[:, None]).to(self.A),
            B=((u if basis is None else basis @ u) * root).to(self.B),
        )


@whole_products()
def minimum_norm(keys: Tensor, residual: Tensor, significance: Tensor | None = None) -> LowRankDelta:
    """The smallest ΔW among those that minimise Σ_i s_i ‖ΔW y_i − r_i‖².

    ΔW = (√S R)ᵀ (√S Y)⁺ᵀ, which for equal weights is Rᵀ (Y Yᵀ)⁺ Y: the solve of QF (arXiv 2507.04300), there written
    W' = W − [W(Y−X) − B](YᵀY)⁻¹Yᵀ with keys as columns. From the smaller of the two Gram matrices G (n × n or
    d_in × d_in): its eigenvectors, without the directions in which the keys are zero to the precision they came in, as
    a pseudo-inverse does; a G of more than 2,048 rows by Cholesky factors of G + δ I, with δ at that precision, and
    three steps of iterative refinement (iterated Tikhonov regularisation), which leaves (δ / (δ + σ²))⁴ of the part
    along a singular value σ.

    Args:
        keys: Y, (n, d_in).
        residual: R, (n, d_out).
        significance: s, (n), ≥ 0; by default 1 for every row.

    Returns:
        Factors of rank ≤ min(n, d_in, d_out), in float32 (float64 if the keys are).

    Raises:
        ValueError: shapes do not agree, or a value is not finite or a weight negative.
    """
    home = keys.device
    keys, residual = keys.to(solves_on(home)), residual.to(solves_on(home))
    root, kept = _checked(keys, residual, significance)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    n, width = int(kept.sum()), keys.shape[1]
    y, r = keys if n == len(keys) else keys[kept], residual if n == len(keys) else residual[kept]
    root = root[kept, None]
    # A singular value of Y is noise below the usual tolerance of a rank, d_in · eps · the largest.
    noise = (width * torch.finfo(dtype).eps) ** 2
    if n <= width:
        gram = y.new_zeros(n, n, dtype=torch.float64)
        for part in row_blocks(width, _COLUMNS):
            block = y[:, part] * root  # float64, as the root is
            gram.addmm_(block, block.T)
        del block
        weights, wide = _pseudo_solve(gram, r * root, noise).mul_(root), None
        if r.shape[1] <= n:  # d_out × d_in is smaller than n × d_in
            wide = sum_of_products(weights, y)
        delta = LowRankDelta(A=y.double(), B=weights.T) if wide is None else _rows(wide)
    else:
        gram, cross = y.new_zeros(width, width, dtype=torch.float64), 0.0
        for part in row_blocks(n):
            block = y[part] * root[part]
            add_gram(gram, block)
            cross = cross + block.T @ (r[part] * root[part])
        delta = _rows(_pseudo_solve(gram, cross, noise).T)
    return (delta if min(n, width) > _LARGE and delta.rank == r.shape[1] else delta.compressed()).to(dtype).to(home)


def preserving(
    keys: Tensor,
    residual: Tensor,
    moment: SecondMoment,
    strength: float,
    ridge: float,
    significance: Tensor | None = None,
) -> LowRankDelta:
    """The ΔW that minimises Σ_i s_i ‖ΔW y_i − r_i‖² + tr(ΔW P ΔWᵀ) with P = λ C + ε I.

    The least squares of ROME and MEMIT (arXiv 2202.05262, 2210.07229) with QF's residual; see [`recursive_update`].

    Args:
        keys: Y, (n, d_in).
        residual: R, (n, d_out).
        moment: C, the second moment of the keys whose outputs must stay.
        strength: λ ≥ 0, the weight of preservation.
        ridge: ε > 0, the weight of ‖ΔW‖² itself.
        significance: s, (n), ≥ 0; by default 1 for every row.

    Returns:
        Factors of equal norm and rank ≤ min(n, d_in, d_out), in float32.

    Raises:
        ValueError: shapes do not agree, a value is not finite, a weight or λ negative, or ε not positive.
    """
    if not strength >= 0:
        raise ValueError(f"strength={strength!r}; expected a number from 0 up")
    bound = moment.copy()
    if bound.root is not None:
        bound.root = bound.root * strength**0.5
    else:
        bound.matrix *= strength
    bound.ridge = ridge
    given = torch.ones(len(keys), device=keys.device) if significance is None else significance
    return recursive_update(bound, TaughtTokens(keys, residual, given)).compressed().to(torch.float32)


@whole_products()
def recursive_update(bound: SecondMoment, *parts: TaughtTokens) -> LowRankDelta:
    """The ΔW that minimises Σ_i s_i ‖ΔW y_i − r_i‖² + tr(ΔW P ΔWᵀ), where P is `bound`, its ridge ε on the diagonal;
    and P + Yᵀ S Y in `bound`: one step of recursive least squares.

    With Q = P + Yᵀ S Y this is ΔW = Rᵀ S Y Q⁻¹, by one Cholesky factorisation, of the cheaper form:

    - primal: of Q, d_in × d_in;
    - dual, where P = Kᵀ K + ε I has m rows and m + n < d_in: with the rows √s y put behind K, and √s r behind zeros as
      the rows of Z, ΔW = Zᵀ (K Kᵀ + ε I)⁻¹ K, of (m + n) × (m + n).

    Args:
        bound: P, with ε > 0 in its `ridge`; updated in place.
        parts: the rows of Y, R and s, in one part or several.

    Returns:
        Factors of rank ≤ min(m + n, d_out) in float64, not compressed, where it was solved for.

    Raises:
        ValueError: shapes do not agree, a value is not finite, a weight negative, or ε not positive.
    """
    parts = [rows.to(solves_on(rows.keys.device)) for rows in parts]
    for rows in parts:
        _checked(rows.keys, rows.residual, rows.significance)
        if bound.width != rows.keys.shape[1]:
            width = rows.keys.shape[1]
            raise ValueError(f"the moment is of keys of width {bound.width}; the keys taught have width {width}")
    if not bound.ridge > 0:
        raise ValueError(f"ridge={bound.ridge!r}; expected a positive number (use minimum_norm for none)")
    for rows in parts:
        bound.update(rows.keys, rows.significance)
    roots = [rows.significance.double().sqrt()[:, None] for rows in parts]
    wanted = [rows.residual.double() * root for rows, root in zip(parts, roots, strict=True)]
    moves = [part.any(1) for part in wanted]  # rows whose output shall change; ΔW has no higher rank
    few, outs = sum(int(part.sum()) for part in moves) < wanted[0].shape[1], wanted[0].shape[1]
    if bound.root is not None:
        keys = bound.root
        gram = _gram(keys, bound.ridge)
        gram.diagonal().add_(bound.ridge)
        factor, before = torch.linalg.cholesky(gram, out=gram), len(keys) - sum(map(len, wanted))
        if few:
            chosen = before + torch.cat(moves).nonzero()[:, 0]
            unit = gram.new_zeros(len(keys), len(chosen))
            unit[chosen, torch.arange(len(chosen), device=unit.device)] = 1.0
            change = torch.cholesky_solve(unit, factor).T.to(keys.dtype) @ keys
            return LowRankDelta(A=change.double(), B=torch.cat([w[m] for w, m in zip(wanted, moves, strict=True)]).T)
        all_wanted = torch.cat([gram.new_zeros(before, outs), *wanted])
        return _rows((torch.cholesky_solve(all_wanted, factor).T.to(keys.dtype) @ keys).double())
    del wanted
    system = bound.matrix.clone()
    system.diagonal().add_(bound.ridge)
    factor = torch.linalg.cholesky(system, out=system)
    if few:
        pairs = list(zip(parts, roots, moves, strict=True))
        keys = torch.cat([rows.keys[m].double() * root[m] for rows, root, m in pairs])
        residual = torch.cat([rows.residual[m].double() * root[m] for rows, root, m in pairs])
        return LowRankDelta(A=torch.cholesky_solve(keys.T, factor).T, B=residual.T)
    moved = [rows for rows, move in zip(parts, moves, strict=True) if bool(move.any())]
    cross = sum(sum_of_products(rows.residual, rows.keys, rows.significance) for rows in moved)
    return _rows(torch.cholesky_solve(cross.T, factor).T)


@whole_products()
def jointly(deltas: Sequence[LowRankDelta], bounds: Sequence[SecondMoment]) -> LowRankDelta:
    """The minimiser of Σ_i tr((ΔW − ΔW_i) P_i (ΔW − ΔW_i)ᵀ): ΔW = (Σ ΔW_i P_i) (Σ P_i)⁻¹.

    Where each ΔW_i minimises a least squares whose curvature is P_i, this minimises their sum: RegMean (Jin et al.,
    arXiv 2212.09849), which is Fisher merging (Matena and Raffel, arXiv 2111.09832) with the whole matrix.

    Args:
        deltas: the changes ΔW_i.
        bounds: P_i, each with its `ridge` > 0 on the diagonal.

    Returns:
        Factors of equal norm, in float32.

    Raises:
        ValueError: there are none, or their numbers or widths differ.
    """
    if not deltas or len(deltas) != len(bounds) or len({bound.width for bound in bounds}) != 1:
        raise ValueError(f"{len(deltas)} changes and {len(bounds)} moments of widths {[b.width for b in bounds]}")
    total = SecondMoment(bounds[0].width)
    for bound in bounds:
        total.add(bound)
    rows = []
    for delta, bound in zip(deltas, bounds, strict=True):
        a = wide(delta.A)
        if bound.matrix is not None:
            weighed = a @ bound.matrix.to(a)
        else:
            root = bound.root.to(a.device).double()
            weighed = (a @ root.T) @ root
        rows.append(weighed + bound.ridge * a)
    a = _apply_inverse(total, 1.0, total.ridge, torch.cat(rows))
    return LowRankDelta(A=a, B=torch.cat([wide(delta.B) for delta in deltas], dim=1)).compressed().to(torch.float32)


@whole_products()
def sum_of_products(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_i w_i l_i r_iᵀ over the rows of two matrices (n, p) and (n, q): (p, q) float64, without copies of either.

    Products are in float32 (float64 where `left` is), sums over blocks of rows in float64.
    """
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for part in row_blocks(len(left)):
        rows = left[part].to(dtype)
        rows = rows if weights is None else rows * weights[part, None].to(dtype)
        for some in row_blocks(right.shape[1], _COLUMNS):
            total[:, some] += rows.T @ right[part, some].to(dtype)
    return total


def _rows(dense: Tensor) -> LowRankDelta:
    """A change of full rank d_out: A is the change itself."""
    return LowRankDelta(A=dense, B=torch.eye(len(dense), dtype=dense.dtype, device=dense.device))


def _pseudo_solve(gram: Tensor, wanted: Tensor, noise: float) -> Tensor:
    """G⁺ Z of a positive semidefinite G (k, k) and Z (k, m); eigenvalues below `noise` of the largest count as 0.

    G itself may be overwritten.
    """
    if len(gram) <= _LARGE:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > noise * values.max() if values.numel() and values.max() > 0 else torch.zeros_like(values).bool()
        vectors, values = vectors[:, kept], values[kept]
        return vectors @ ((vectors.T @ wanted) / values[:, None])
    shift = noise * _largest_eigenvalue(gram)
    gram.diagonal().add_(shift)
    factor = torch.linalg.cholesky(gram, out=gram)
    solution = torch.cholesky_solve(wanted, factor)
    for _ in range(3):  # the refinement x + (G + δ)⁻¹ (Z − G x), with one term less
        solution = torch.cholesky_solve(solution.mul_(shift).add_(wanted), factor)
    return solution


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Of a positive semidefinite matrix, to a few percent, by power iteration."""
    vector = torch.ones(len(matrix), 1, dtype=matrix.dtype, device=matrix.device)
    for _ in range(20):
        vector = matrix @ (vector / vector.norm().clamp(min=1e-300))
    return float(vector.norm())


def _checked(keys: Tensor, residual: Tensor, significance: Tensor | None) -> tuple[Tensor, Tensor]:
    """√s (n) float64, and which rows count (n)."""
    if keys.ndim != 2 or residual.ndim != 2 or keys.shape[0] != residual.shape[0]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and residual {tuple(residual.shape)}; expected (n, d_in) and (n, d_out)"
        )
    for name, values in (("keys", keys), ("residual", residual)):
        if not all(bool(torch.isfinite(values[part]).all()) for part in row_blocks(len(values))):
            raise ValueError(f"{name} hold values that are not finite")
    if significance is None:
        significance = keys.new_ones(len(keys))
    s = significance.to(keys.device).double()
    if s.shape != keys.shape[:1]:
        raise ValueError(f"significance has shape {tuple(s.shape)}; expected ({keys.shape[0]},)")
    if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
        raise ValueError("significance has a value that is negative or not finite; expected numbers from 0 up")
    return s.sqrt(), s > 0


def _gram(keys: Tensor, ridge: float) -> Tensor:
    """K Kᵀ in float64, its products in float32 where their rounding (some eps √m of the largest row's square) is well
    below the ridge that is added to it."""
    rounding = torch.finfo(torch.float32).eps * len(keys) ** 0.5 * float(keys.square().sum(1).amax())
    rows = keys if 4 * rounding < ridge else keys.double()
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    add_gram(gram, rows.T)
    return gram


def _apply_inverse(moment: SecondMoment, strength: float, ridge: float, rows: Tensor) -> Tensor:
    """rows · (λ C + ε I)⁻¹ for rows (n, d_in)."""
    if moment.matrix is not None:
        system = moment.matrix.to(rows.device, torch.float64) * strength
        system.diagonal().add_(ridge)
        return torch.cholesky_solve(rows.T, torch.linalg.cholesky(system)).T
    root = moment.root.to(rows.device).double() * strength**0.5
    gram = root @ root.T
    gram.diagonal().add_(ridge)
    return (rows - torch.cholesky_solve(root @ rows.T, torch.linalg.cholesky(gram)).T @ root) / ridge
