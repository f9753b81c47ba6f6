"""Other editors' solves, with QF's keys and targets: each takes what `least_squares.recursive_update` takes.

`with solving_by(alphaedit): trainer.train()` teaches by one of them. Each gets

- `bound`: P, the moment of what binds besides (keys taught before, and a small ridge ε in its `ridge`); the new keys
  are added to it, so that they bind the lessons that follow where the editor lets them;
- `new`: the keys Y, residuals R and weights s of what is taught;
- `stays`: the preserved keys K, with their weights, and in `residual` what brings their outputs back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qf_peft.solve.least_squares import LowRankDelta, TaughtTokens, recursive_update
from qf_peft.solve.second_moment import SecondMoment
from qf_peft.teaching.module_lesson import ModuleLesson

_NULL = 1e-2  # of the mean eigenvalue: what AlphaEdit counts as null
_SHRINKING = 0.1  # RLSEdit's μ, over the mean diagonal of the anchors' moment


def alphaedit(bound: SecondMoment, new: TaughtTokens, stays: TaughtTokens) -> LowRankDelta:
    """The ΔW that acts only in preserved keys' null space (AlphaEdit, arXiv 2410.02355).

    With Q the projection onto the eigenvectors of the preserved keys' moment whose eigenvalues are next to nothing,
    ΔW = Rᵀ S Y Q (Q Yᵀ S Y Q + Q B Q + ε I)⁻¹, where B is the moment of the keys taught before.

    Args:
        bound: B, with ε > 0 in its `ridge`; the new keys are added to it.
        new: Y, R and s.
        stays: the preserved keys.
    """
    moment = SecondMoment(bound.width).update(stays.keys, stays.significance)
    if moment.root is not None:  # few keys: their span, by the small Gram matrix
        root = moment.root.to(new.keys.device).double()
        values, vectors = torch.linalg.eigh(root @ root.T)
        kept = values > max(_NULL * moment.trace / moment.width, 1e-12)
        basis = (vectors[:, kept] * values[kept].rsqrt()).T @ root
    else:
        values, vectors = torch.linalg.eigh(moment.matrix.to(new.keys.device, torch.float64))
        basis = vectors[:, values > _NULL * values.mean()].T

    def projected(rows: Tensor) -> Tensor:
        rows = rows.double()
        return rows - (rows @ basis.T) @ basis

    inside = SecondMoment(bound.width)
    if bound.root is not None:
        inside.root = projected(bound.root.to(new.keys.device)).float()
    else:
        half = projected(bound.matrix.to(new.keys.device))
        inside.root, inside.matrix = None, projected(half.T)
    inside.ridge = bound.ridge
    change = recursive_update(
        inside, TaughtTokens(projected(new.keys).to(new.keys.dtype), new.residual, new.significance)
    )
    bound.update(new.keys, new.significance)
    return change


def memit(bound: SecondMoment, new: TaughtTokens, stays: TaughtTokens) -> LowRankDelta:
    """MEMIT's ΔW = Rᵀ S Y (Yᵀ S Y + λ C + ε I)⁻¹ (arXiv 2210.07229), where λ C is the preserved keys' weighted moment.
    Keys taught before do not bind: MEMIT's C is the pretrained model's alone."""
    alone = SecondMoment(bound.width).update(stays.keys, stays.significance)
    alone.ridge = bound.ridge
    bound.update(new.keys, new.significance)
    return recursive_update(alone, new)


def rlsedit(bound: SecondMoment, new: TaughtTokens, stays: TaughtTokens) -> LowRankDelta:
    """RLSEdit's recursive least squares (arXiv 2601.15686): all that was taught so far is fitted, beside two soft
    penalties, μ ‖ΔW‖² of the weight's change and λ tr(ΔW C ΔWᵀ) of the outputs at anchor keys, here the preserved
    ones. So P begins as μ I + λ C, and each lesson is a step P ← P + Yᵀ S Y with ΔW = Rᵀ S Y P⁻¹ for what is new."""
    if not bound.count:  # the first lesson
        bound.update(stays.keys, stays.significance)
        bound.ridge += _SHRINKING * bound.trace / bound.width
    return recursive_update(bound, new)


class UltraEdit:
    """UltraEdit's solve (arXiv 2505.14679) with QF's residual in the place of the gradient it descends.

    Keys and residuals are normalised by their running means and deviations over all lessons (h, r → ĥ, r̂); each key
    is to be moved by v = η ‖ĥ‖² r̂, and ΔW = Vᵀ H (Hᵀ H + I)⁻¹ over the lesson's keys H. Nothing is preserved, and what
    was taught before does not bind.

    Args:
        rate: η.
        modules: how many modules a lesson solves, in an order that stays: each has statistics of its own.
    """

    def __init__(self, rate: float, modules: int) -> None:
        self.rate, self.modules, self.calls = rate, modules, 0
        self.seen: dict[int, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, bound: SecondMoment, new: TaughtTokens, stays: TaughtTokens) -> LowRankDelta:
        keys, width = new.keys.double(), bound.width
        both = torch.cat([keys, new.residual.double()], dim=1)
        mean, deviation = self._statistics(self.calls % self.modules, both)
        self.calls += 1
        hidden, wished = ((both - mean) / deviation).split([width, both.shape[1] - width], dim=1)
        values = self.rate * hidden.square().sum(1, keepdim=True) * wished
        identity = SecondMoment(width)
        identity.ridge = 1.0
        bound.update(new.keys, new.significance)
        return recursive_update(identity, TaughtTokens(keys, values, torch.ones(len(keys), device=keys.device)))

    def _statistics(self, module: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean and standard deviation of a module's rows (n, d), these included: (d) each."""
        count, mean, squares = self.seen.get(module, (0, rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])))
        total = count + len(rows)
        apart = rows.mean(0) - mean
        squares = squares + (rows - rows.mean(0)).square().sum(0) + apart.square() * count * len(rows) / total
        mean = mean + apart * len(rows) / total
        self.seen[module] = total, mean, squares
        return mean, (squares / total + 1e-8).sqrt()


@contextmanager
def solving_by(solve: Callable[..., LowRankDelta]) -> Iterator[None]:
    """Lessons that preserve chats solve each module by `solve`."""
    ours, ModuleLesson.solve = ModuleLesson.__dict__["solve"], staticmethod(solve)
    try:
        yield
    finally:
        ModuleLesson.solve = ours
