"""Other editors' solves, with QF's keys and targets: each takes what `qf_peft.solve.least_squares.beside` takes.

`with solving_by(alphaedit): trainer.train()` teaches by one of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qf_peft.solve.least_squares import LowRankDelta, TaughtTokens, beside
from qf_peft.solve.second_moment import SecondMoment
from qf_peft.teaching.module_lesson import ModuleLesson

_NULL = 1e-2  # of the mean eigenvalue: what AlphaEdit counts as null


def alphaedit(bound: SecondMoment, new: TaughtTokens, stays: TaughtTokens) -> LowRankDelta:
    """The ΔW that acts only in preserved keys' null space (AlphaEdit, arXiv 2410.02355).

    With Q the projection onto the eigenvectors of the preserved keys' moment whose eigenvalues are next to nothing,
    ΔW = Rᵀ S Y Q (Q Yᵀ S Y Q + Q B Q + ε I)⁻¹, where B is the moment of the keys taught before.

    Args:
        bound: B, with ε > 0 in its `floor`; the new keys are added to it.
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
    inside.floor = bound.floor
    change = beside(inside, TaughtTokens(projected(new.keys).to(new.keys.dtype), new.residual, new.significance))
    bound.update(new.keys, new.significance)
    return change


@contextmanager
def solving_by(solve: Callable[..., LowRankDelta]) -> Iterator[None]:
    """Lessons that preserve chats solve each module by `solve`."""
    ours, ModuleLesson.solve = ModuleLesson.__dict__["solve"], staticmethod(solve)
    try:
        yield
    finally:
        ModuleLesson.solve = ours
