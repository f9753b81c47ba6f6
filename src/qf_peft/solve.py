"""The closed-form solves: keys, residuals and weights in, a low-rank change of one weight out. No model in sight.

Notation, for a module with weight W (d_out × d_in): the rows of `keys` Y (n × d_in) are its inputs at the n taught
positions, the rows of `residual` R (n × d_out) what its outputs there should change by, `significance` s (n) how much
each row counts. The change sought is ΔW (d_out × d_in) with ΔW y_i ≈ r_i.

Factorisations are done in float64: they are small, and nearly equal keys are the rule, not the exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .moments import SecondMoment


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
        a, b = self.A.double(), self.B.double()
        return float(((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt())

    def __call__(self, keys: Tensor) -> Tensor:
        """ΔW applied to keys (n, d_in): (n, d_out)."""
        return keys @ self.A.T @ self.B.T

    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        """The sum of two changes, by stacking their factors."""
        return LowRankDelta(torch.cat([self.A, other.A]), torch.cat([self.B, other.B], dim=1))

    def dense(self) -> Tensor:
        """ΔW itself, (d_out, d_in)."""
        return self.B @ self.A

    def to(self, dtype: torch.dtype) -> LowRankDelta:
        """The same factors in another dtype."""
        return LowRankDelta(self.A.to(dtype), self.B.to(dtype))

    def compressed(self, rank: int | None = None, tolerance: float = 0.0) -> LowRankDelta:
        """The nearest change (in Frobenius norm) of at most `rank`, with factors of equal norm; or the one of least
        rank that is at most `tolerance` away.

        From the singular values of B A, found without forming it: QR of each factor, SVD of the small core. Singular
        values below float32's rounding of the largest are dropped in any case.
        """
        if self.rank == 0:
            return self
        q_in, r_in = torch.linalg.qr(self.A.double().T)
        q_out, r_out = torch.linalg.qr(self.B.double())
        u, s, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        keep = int((s > s[0] * torch.finfo(torch.float32).eps).sum())
        dropped = s.square().flip(0).cumsum(0).flip(0).sqrt()  # dropped[k]: the norm lost if k are kept
        keep = min(keep, max(1, int((dropped > tolerance).sum())))
        keep = keep if rank is None else min(keep, rank)
        root = s[:keep].sqrt()
        return LowRankDelta(
            A=((root[:, None] * vh[:keep]) @ q_in.T).to(self.A.dtype),
            B=((q_out @ u[:, :keep]) * root).to(self.B.dtype),
        )


def minimum_norm(keys: Tensor, residual: Tensor, significance: Tensor | None = None) -> LowRankDelta:
    """The smallest ΔW among those that minimise Σ_i s_i ‖ΔW y_i − r_i‖².

    ΔW = (√S R)ᵀ (√S Y)⁺ᵀ, which for equal weights is Rᵀ (Y Yᵀ)⁺ Y: the solve of QF (arXiv 2507.04300), there written
    W' = W − [W(Y−X) − B](YᵀY)⁻¹Yᵀ with keys as columns. From the eigenvectors of the smaller of the two Gram matrices
    (n × n or d_in × d_in); directions in which the keys are zero to the precision they came in are left alone, as by a
    pseudo-inverse.

    Args:
        keys: Y, (n, d_in).
        residual: R, (n, d_out).
        significance: s, (n), ≥ 0; by default 1 for every row.

    Returns:
        Factors of equal norm and rank ≤ min(n, d_in, d_out), in float32 (float64 if the keys are).

    Raises:
        ValueError: shapes do not agree, or a value is not finite or a weight negative.
    """
    y, r = _weighted(keys, residual, significance)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    if y.shape[0] <= y.shape[1]:
        values, vectors = torch.linalg.eigh(y @ y.T)
        rows = vectors.T @ y
    else:
        values, vectors = torch.linalg.eigh(y.T @ y)
        rows = vectors.T * values.clamp(min=0).sqrt()[:, None]
        vectors = None
    # A singular value of Y is noise below the usual tolerance of a rank, max(n, d_in) · eps · the largest.
    noise = (max(y.shape) * torch.finfo(dtype).eps) ** 2
    kept = values > noise * values.max() if values.numel() and values.max() > 0 else torch.zeros_like(values).bool()
    scale = values[kept].rsqrt()
    a = scale[:, None] * rows[kept]
    b = r.T @ (vectors[:, kept] * scale) if vectors is not None else (r.T @ (y @ a.T)) * scale.square()
    return LowRankDelta(A=a, B=b).compressed().to(dtype)


def preserving(
    keys: Tensor,
    residual: Tensor,
    moment: SecondMoment,
    strength: float,
    ridge: float,
    significance: Tensor | None = None,
    form: Literal["auto", "dual", "primal"] = "auto",
) -> LowRankDelta:
    """The ΔW that minimises Σ_i s_i ‖ΔW y_i − r_i‖² + tr(ΔW P ΔWᵀ) with P = λ C + ε I.

    The least squares of ROME and MEMIT (arXiv 2202.05262, 2210.07229) with QF's residual. Equal in exact arithmetic:

    - primal: ΔW = Rᵀ S Y (Yᵀ S Y + P)⁻¹, one Cholesky factorisation of d_in × d_in;
    - dual: ΔW = Rᵀ √S (√S Y P⁻¹ Yᵀ √S + I)⁻¹ √S Y P⁻¹, one of n × n, where P⁻¹ Yᵀ needs only m × m if C is the moment
      of m < d_in keys (Woodbury's identity).

    Args:
        keys: Y, (n, d_in).
        residual: R, (n, d_out).
        moment: C, the second moment of the keys whose outputs must stay.
        strength: λ ≥ 0, the weight of preservation.
        ridge: ε > 0, the weight of ‖ΔW‖² itself.
        significance: s, (n), ≥ 0; by default 1 for every row.
        form: which of the two; "auto" takes the cheaper.

    Returns:
        Factors of equal norm and rank ≤ min(n, d_in, d_out), in float32 (float64 if the keys are).

    Raises:
        ValueError: shapes do not agree, a value is not finite, a weight or λ negative, or ε not positive.
    """
    y, r = _weighted(keys, residual, significance)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    n, width = y.shape
    if moment.width != width:
        raise ValueError(f"the moment is of keys of width {moment.width}; the keys taught have width {width}")
    if not strength >= 0:
        raise ValueError(f"strength={strength!r}; expected a number from 0 up")
    if not ridge > 0:
        raise ValueError(f"ridge={ridge!r}; expected a positive number (use minimum_norm for none)")
    if form == "auto":
        small = moment.root is not None and n + moment.root.shape[0] < width
        form = "dual" if small else "primal"
    if form == "dual":
        a = _apply_inverse(moment, strength, ridge, y)
        kernel = a @ y.T
        kernel.diagonal().add_(1.0)
        b = torch.cholesky_solve(r, torch.linalg.cholesky(kernel)).T
    elif form == "primal":
        system = _dense(moment, y) * strength + y.T @ y
        system.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(system)
        if n <= r.shape[1]:
            a, b = torch.cholesky_solve(y.T, factor).T, r.T
        else:  # more tokens than outputs: the product Rᵀ S Y first
            a, b = torch.cholesky_solve(y.T @ r, factor).T, torch.eye(r.shape[1], dtype=y.dtype, device=y.device)
    else:
        raise ValueError(f"form={form!r}; expected 'auto', 'dual' or 'primal'")
    return LowRankDelta(A=a, B=b).compressed().to(dtype)


def null_space(
    keys: Tensor,
    residual: Tensor,
    moment: SecondMoment,
    threshold: float,
    bound: SecondMoment,
    significance: Tensor | None = None,
) -> LowRankDelta:
    """The ΔW that acts only in preserved keys' null space: AlphaEdit's solve (arXiv 2410.02355), with QF's residual.

    With Q the projection onto the eigenvectors of C whose eigenvalues are at most `threshold` times the mean one,
    ΔW = Rᵀ S Y Q (Q Yᵀ S Y Q + Q B Q + ε I)⁻¹, where B is the moment of the keys taught before.

    Args:
        keys, residual, significance: as in [`preserving`].
        moment: C, the second moment of the keys whose outputs must stay.
        threshold: which directions count as null, relative to the mean eigenvalue.
        bound: B, and in its `floor` ε > 0, the weight of ‖ΔW‖².

    Returns:
        Factors of equal norm in float32 (float64 if the keys are).
    """
    if moment.root is not None:  # few keys: their span, by the small Gram matrix
        root = moment.root.to(keys.device).double()
        values, vectors = torch.linalg.eigh(root @ root.T)
        kept = values > max(threshold * moment.trace / moment.width, 1e-12)
        basis = (vectors[:, kept] * values[kept].rsqrt()).T @ root
    else:
        values, vectors = torch.linalg.eigh(_dense(moment, keys))
        basis = vectors[:, values > threshold * values.mean()].T

    def projected(rows: Tensor) -> Tensor:
        rows = rows.double()
        return rows - (rows @ basis.T) @ basis

    inside = SecondMoment(moment.width)
    if bound.root is not None:
        inside.root = projected(bound.root.to(keys.device)).float()
    else:
        half = projected(bound.matrix.to(keys.device))
        inside.root, inside.matrix = None, projected(half.T)
    y = projected(keys).to(keys.dtype)
    return preserving(y, residual, inside, 1.0, bound.floor, significance)


def jointly(deltas: Sequence[LowRankDelta], bounds: Sequence[SecondMoment]) -> LowRankDelta:
    """The minimiser of Σ_i tr((ΔW − ΔW_i) P_i (ΔW − ΔW_i)ᵀ): ΔW = (Σ ΔW_i P_i) (Σ P_i)⁻¹.

    Where each ΔW_i minimises a least squares whose curvature is P_i, this minimises their sum: RegMean (Jin et al.,
    arXiv 2212.09849), which is Fisher merging (Matena and Raffel, arXiv 2111.09832) with the whole matrix.

    Args:
        deltas: the changes ΔW_i.
        bounds: P_i, each with its `floor` > 0 on the diagonal.

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
        a = delta.A.double()
        if bound.matrix is not None:
            weighed = a @ bound.matrix.to(a)
        else:
            root = bound.root.to(a.device).double()
            weighed = (a @ root.T) @ root
        rows.append(weighed + bound.floor * a)
    a = _apply_inverse(total, 1.0, total.floor, torch.cat(rows))
    return LowRankDelta(A=a, B=torch.cat([delta.B.double() for delta in deltas], dim=1)).compressed().to(torch.float32)


def _weighted(keys: Tensor, residual: Tensor, significance: Tensor | None) -> tuple[Tensor, Tensor]:
    """√S Y and √S R in float64, without the rows of weight 0."""
    if keys.ndim != 2 or residual.ndim != 2 or keys.shape[0] != residual.shape[0]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and residual {tuple(residual.shape)}; expected (n, d_in) and (n, d_out)"
        )
    for name, values in (("keys", keys), ("residual", residual)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold values that are not finite")
    if significance is None:
        return keys.double(), residual.double()
    s = significance.to(keys.device).double()
    if s.shape != keys.shape[:1]:
        raise ValueError(f"significance has shape {tuple(s.shape)}; expected ({keys.shape[0]},)")
    if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
        raise ValueError("significance has a value that is negative or not finite; expected numbers from 0 up")
    kept = s > 0
    root = s[kept].sqrt()[:, None]
    return keys[kept].double() * root, residual[kept].double() * root


def _dense(moment: SecondMoment, like: Tensor) -> Tensor:
    """C as a d_in × d_in matrix."""
    if moment.matrix is not None:
        return moment.matrix.to(like.device, torch.float64)
    root = moment.root.to(like.device).double()
    return root.T @ root


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
