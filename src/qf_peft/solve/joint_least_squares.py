"""One least squares over several modules that write into the same stream: keys and a moment of each in, one low-rank
change of each out.

Modules l = 1 … m write into one residual stream. With keys Y_l (n × d_l) at the n taught positions, the stream's wanted
change R (n × d), weights s and moments P_l of what must stay, the changes sought minimise

    Σ_i s_i ‖Σ_l ΔW_l y_li − r_i‖² / ρ + Σ_l tr(ΔW_l P_l ΔW_lᵀ).

Each module's part then follows from what its keys tell apart beside what it must keep: with K = Σ_l Y_l P_l⁻¹ Y_lᵀ,

    ΔW_l = (Cᵀ) Y_l P_l⁻¹,   C = (K + ρ S⁻¹)⁻¹ R,

the kernel form of ridge regression (Saunders et al., 1998) on the modules' keys side by side, each in its own metric.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .least_squares import LowRankDelta
from .second_moment import SecondMoment


class JointSystem:
    """The factorised least squares of one lesson; right-hand sides and ridges may then be tried at little cost.

    Args:
        keys: by module, Y_l (n, d_l), float32.
        bounds: by module, P_l, with its `floor` > 0 on the diagonal.
        significance: s (n), > 0.
    """

    kernel: Tensor
    """(n, n) float64: K."""

    def __init__(self, keys: Mapping[str, Tensor], bounds: Mapping[str, SecondMoment], significance: Tensor) -> None:
        self.significance = significance.double()
        self._factors: dict[str, Tensor] = {}  # a module: (n, d_l) float32, Y_l P_l⁻¹
        n = len(significance)
        self.kernel = torch.zeros(n, n, dtype=torch.float64, device=significance.device)
        for name, rows in keys.items():
            solved = bounds[name].solve(rows)
            self.kernel += rows.double() @ solved.T
            self._factors[name] = solved.float()
        self.kernel = (self.kernel + self.kernel.T) / 2
        self._ridge, self._cholesky = None, None

    def ridge(self, relative: float) -> float:
        """ρ as a multiple of the kernel's mean diagonal."""
        return relative * float(self.kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))

    def changes(self, residual: Tensor, relative: float) -> dict[str, LowRankDelta]:
        """The modules' changes for R (n, d), with ρ = `ridge(relative)`; factors of rank ≤ min(n, d) in float32."""
        rho = self.ridge(relative)
        if rho != self._ridge:
            system = self.kernel + torch.diag(rho / self.significance)
            self._ridge, self._cholesky = rho, torch.linalg.cholesky(system)
        coefficients = torch.cholesky_solve(residual.double(), self._cholesky).float()
        n, width = coefficients.shape
        if n <= width:
            return {name: LowRankDelta(A=rows, B=coefficients.T) for name, rows in self._factors.items()}
        unit = torch.eye(width, device=coefficients.device)
        return {name: LowRankDelta(A=coefficients.T @ rows, B=unit) for name, rows in self._factors.items()}
