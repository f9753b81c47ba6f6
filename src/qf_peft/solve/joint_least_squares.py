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

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..runtime.devices import solves_on, whole_products, wide
from .least_squares import LowRankDelta
from .second_moment import SecondMoment


class JointSystem:
    """The factorised least squares of one lesson; right-hand sides and ridges may then be tried at little cost.

    Args:
        keys: by module, Y_l (n, d_l), float32.
        bound: gives of a module P_l, with its `ridge` > 0 on the diagonal; asked once for each, and let go.
        significance: s (n), > 0.
    """

    kernel: Tensor
    """(n, n) float64: K."""

    def __init__(self, keys: Mapping[str, Tensor], bound: Callable[[str], SecondMoment], significance: Tensor) -> None:
        self.significance = wide(significance)
        self._factors: dict[str, Tensor] = {}  # a module: (n, d_l) float32, Y_l P_l⁻¹
        n = len(significance)
        self.kernel = torch.zeros(n, n, dtype=torch.float64, device=solves_on(significance.device))
        for name, rows in keys.items():
            solved = bound(name).solve(rows)
            self.kernel += wide(rows) @ solved.T
            self._factors[name] = solved.float()
        self.kernel = (self.kernel + self.kernel.T) / 2
        self._ridge, self._cholesky = None, None

    def ridge(self, relative: float) -> float:
        """ρ as a multiple of the kernel's mean diagonal."""
        return relative * float(self.kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))

    @whole_products()
    def changes(self, residual: Tensor, relative: float) -> dict[str, LowRankDelta]:
        """The modules' changes for R (n, d), with ρ = `ridge(relative)`; factors of rank ≤ min(n, d) in float32."""
        rho = self.ridge(relative)
        if rho != self._ridge:
            system = self.kernel + torch.diag(rho / self.significance)
            self._ridge, self._cholesky = rho, torch.linalg.cholesky(system)
        coefficients = torch.cholesky_solve(wide(residual), self._cholesky).float()
        home, (n, width) = residual.device, coefficients.shape
        if n <= width:
            return {n: LowRankDelta(A=rows, B=coefficients.T).to(home) for n, rows in self._factors.items()}
        unit = torch.eye(width, device=coefficients.device)
        return {n: LowRankDelta(A=coefficients.T @ rows, B=unit).to(home) for n, rows in self._factors.items()}
