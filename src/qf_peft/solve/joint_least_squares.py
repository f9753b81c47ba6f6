"""One least squares over several modules that write into the same stream: keys and a moment of each in, one low-rank
change of each out.

Modules l = 1 … m write into one residual stream. With keys Y_l (n × d_l) at the n taught positions, the stream's wanted
change R (n × d), weights s and moments P_l of what must stay, the changes sought minimise

    Σ_i s_i ‖Σ_l ΔW_l y_li − r_i‖² / ρ + Σ_l tr(ΔW_l P_l ΔW_lᵀ).

Each module's part then follows from what its keys tell apart beside what it must keep: with K = Σ_l Y_l P_l⁻¹ Y_lᵀ,

    ΔW_l = (Cᵀ) Y_l P_l⁻¹,   C = (K + ρ S⁻¹)⁻¹ R,

the kernel form of ridge regression (Saunders et al., 1998) on the modules' keys side by side, each in its own metric.
Where the tokens are more than the keys are wide, Y = [Y_1 … Y_m] with d_1 + … + d_m = D < n, the normal equations are
the smaller system:

    [ΔW_1 … ΔW_m] = Rᵀ S Y (ρ P + Yᵀ S Y)⁻¹,   P = diag(P_1 … P_m).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..runtime.devices import solves_on, whole_products, wide
from .least_squares import LowRankDelta
from .second_moment import SecondMoment, row_blocks


def joint_system(keys: Mapping[str, Tensor], bound: Callable[[str], SecondMoment], significance: Tensor) -> JointSystem:
    """The least squares of one lesson, in the form whose matrix is smaller.

    Args:
        keys: by module, Y_l (n, d_l), float32.
        bound: gives of a module P_l, with its `ridge` > 0 on the diagonal; asked once for each, and let go.
        significance: s (n), > 0.
    """
    fewer = len(significance) <= sum(rows.shape[1] for rows in keys.values())
    return (_KernelForm if fewer else _NormalEquations)(keys, bound, significance)


class JointSystem(ABC):
    """The factorised least squares of one lesson; right-hand sides and ridges may then be tried at little cost. See
    [`joint_system`]."""

    spread: float
    """The mean diagonal of K: the taught keys' mean square, each module's in its own metric."""

    def __init__(self, keys: Mapping[str, Tensor], significance: Tensor) -> None:
        self.significance = wide(significance)
        self.place = solves_on(significance.device)
        self._widths = {name: rows.shape[1] for name, rows in keys.items()}
        self._ridge, self._cholesky = None, None

    def ridge(self, relative: float) -> float:
        """ρ as a multiple of the mean diagonal of K."""
        return relative * max(self.spread, torch.finfo(torch.float64).tiny)

    @whole_products()
    def changes(self, residual: Tensor, relative: float) -> dict[str, LowRankDelta]:
        """The modules' changes for R (n, d), with ρ = `ridge(relative)`; factors of rank ≤ min(n, d) in float32."""
        rho = self.ridge(relative)
        if rho != self._ridge:
            self._ridge, self._cholesky = rho, torch.linalg.cholesky(self._matrix(rho))
        return {name: delta.to(residual.device) for name, delta in self._solved(wide(residual)).items()}

    @abstractmethod
    def _matrix(self, rho: float) -> Tensor:
        """What is factorised, float64."""

    @abstractmethod
    def _solved(self, residual: Tensor) -> dict[str, LowRankDelta]:
        """The changes for R in float64, by the Cholesky factor."""


class _KernelForm(JointSystem):
    """n × n: K + ρ S⁻¹."""

    @whole_products()
    def __init__(self, keys: Mapping[str, Tensor], bound: Callable[[str], SecondMoment], significance: Tensor) -> None:
        super().__init__(keys, significance)
        self._factors: dict[str, Tensor] = {}  # a module: (n, d_l) float32, Y_l P_l⁻¹
        n = len(significance)
        kernel = torch.zeros(n, n, dtype=torch.float64, device=self.place)
        for name, rows in keys.items():
            solved = bound(name).solve(rows)
            kernel += wide(rows) @ solved.T
            self._factors[name] = solved.float()
        self._kernel = (kernel + kernel.T) / 2
        self.spread = float(self._kernel.diagonal().mean())

    def _matrix(self, rho: float) -> Tensor:
        return self._kernel + torch.diag(rho / self.significance)

    def _solved(self, residual: Tensor) -> dict[str, LowRankDelta]:
        coefficients = torch.cholesky_solve(residual, self._cholesky).float()
        n, width = coefficients.shape
        if n <= width:
            return {name: LowRankDelta(A=rows, B=coefficients.T) for name, rows in self._factors.items()}
        unit = torch.eye(width, device=coefficients.device)
        return {name: LowRankDelta(A=coefficients.T @ rows, B=unit) for name, rows in self._factors.items()}


class _NormalEquations(JointSystem):
    """D × D: P + Yᵀ S Y / ρ."""

    @whole_products()
    def __init__(self, keys: Mapping[str, Tensor], bound: Callable[[str], SecondMoment], significance: Tensor) -> None:
        super().__init__(keys, significance)
        self._keys, width = keys, sum(self._widths.values())
        self._bound, self._gram = (torch.zeros(width, width, dtype=torch.float64, device=self.place) for _ in range(2))
        squares, first = 0.0, 0
        for name, rows in keys.items():
            own = slice(first, first + rows.shape[1])
            first = own.stop
            self._bound[own, own] = bound(name).dense().to(self.place)
            factor = torch.linalg.cholesky(self._bound[own, own])
            for part in row_blocks(len(rows)):
                whitened = torch.linalg.solve_triangular(factor, wide(rows[part]).T, upper=False)
                squares += float(whitened.square().sum())
        self.spread = squares / len(significance)
        for part in row_blocks(len(significance)):
            rows = self._rows(part)
            self._gram += rows.T @ (rows * self.significance[part][:, None])

    def _rows(self, part: slice) -> Tensor:
        """Some tokens' keys, of all modules side by side: (tokens, D) float64."""
        return torch.cat([wide(rows[part]) for rows in self._keys.values()], 1)

    def _matrix(self, rho: float) -> Tensor:
        return self._bound + self._gram / rho

    def _solved(self, residual: Tensor) -> dict[str, LowRankDelta]:
        right = torch.zeros(self._gram.shape[0], residual.shape[1], dtype=torch.float64, device=self.place)
        for part in row_blocks(len(residual)):
            right += self._rows(part).T @ (residual[part] * self.significance[part][:, None])
        change = torch.cholesky_solve(right / self._ridge, self._cholesky).float()
        unit = torch.eye(residual.shape[1], device=change.device)
        parts = change.split(list(self._widths.values()))
        return {name: LowRankDelta(A=part.T, B=unit) for name, part in zip(self._widths, parts, strict=True)}
