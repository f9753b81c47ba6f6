"""The solves against independent formulas: pseudo-inverses and normal equations in float64."""

import sys

import pytest
import torch
from conftest import EXAMPLES

from qf_peft.solve.least_squares import LowRankDelta, TaughtTokens, minimum_norm, preserving
from qf_peft.solve.second_moment import SecondMoment

sys.path.append(str(EXAMPLES))
from editors import alphaedit


def problem(n, d_in=24, d_out=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=g), torch.randn(n, d_out, generator=g)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("n", [1, 5, 24, 60])
def test_minimum_norm_is_the_pseudo_inverse(n):
    keys, residual = problem(n)
    delta = minimum_norm(keys, residual)
    expected = residual.double().T @ torch.linalg.pinv(keys.double()).T
    assert relative(delta.dense(), expected) < 1e-5
    assert delta.rank <= min(n, 24)


@pytest.mark.parametrize("n", [6, 60])
def test_minimum_norm_with_weights(n):
    keys, residual = problem(n)
    s = torch.rand(n, generator=torch.Generator().manual_seed(1)) * 3
    s[::4] = 0
    root = s.double().sqrt()[:, None]
    expected = (root * residual).T @ torch.linalg.pinv(root * keys.double()).T
    assert relative(minimum_norm(keys, residual, s).dense(), expected) < 1e-5


def test_significance_is_repetition():
    """An integer weight is the row repeated that many times, as in the paper's reference; 0 leaves it out."""
    keys, residual = problem(40)  # more rows than d_in, so that weights matter
    s = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))
    times = s.tolist()
    repeated = minimum_norm(
        torch.cat([keys[i : i + 1].repeat(k, 1) for i, k in enumerate(times)]),
        torch.cat([residual[i : i + 1].repeat(k, 1) for i, k in enumerate(times)]),
    )
    assert relative(minimum_norm(keys, residual, s).dense(), repeated.dense()) < 1e-5


@pytest.mark.parametrize("n", [4, 12, 40])
def test_degenerate_keys_give_the_minimum_norm_solution(n):
    keys, residual = problem(n)
    keys = torch.cat([keys, keys[:2], torch.zeros(2, 24)])  # repeated with other residuals, and zero
    residual = torch.cat([residual, problem(n, seed=9)[1][:2], torch.ones(2, 10)])
    delta = minimum_norm(keys, residual).dense()
    assert torch.isfinite(delta).all()
    expected = residual.double().T @ torch.linalg.pinv(keys.double(), rtol=1e-6).T
    assert relative(delta, expected) < 1e-4


def test_keys_all_zero_or_absent_change_nothing():
    for keys, residual in ((torch.zeros(3, 24), torch.ones(3, 10)), (torch.zeros(0, 24), torch.zeros(0, 10))):
        delta = minimum_norm(keys, residual)
        assert delta.dense().shape == (10, 24)
        assert not delta.dense().any()


def test_keys_alike_to_rounding_do_not_explode():
    keys, residual = problem(3)
    twice = torch.cat([keys, keys * (1 + 1e-7)])
    delta = minimum_norm(twice, torch.cat([residual, residual + 1]))
    assert delta.dense().norm() < 10 * minimum_norm(keys, residual).dense().norm()


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("preserved", [0, 5, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_preserving_primal_and_dual_are_the_normal_equations(n, preserved, weighted):
    keys, residual = problem(n)
    s = torch.rand(n, generator=torch.Generator().manual_seed(3)) if weighted else torch.ones(n)
    if weighted and n > 2:
        s[1] = 0
    old, _ = problem(preserved, seed=5)
    moment = SecondMoment(24)
    for chunk in old.split(3):
        moment.update(chunk, 1 / max(preserved, 1))
    strength, ridge = 2.5, 0.03
    y, r, k, w = keys.double(), residual.double(), old.double(), s.double()
    c = k.T @ k / max(preserved, 1)
    system = y.T @ (w[:, None] * y) + strength * c + ridge * torch.eye(24).double()
    expected = (r.T * w) @ y @ torch.linalg.inv(system)
    delta = preserving(keys, residual, moment, strength, ridge, s)
    assert relative(delta.dense(), expected) < 1e-5
    assert delta.rank <= min(n, 10) if preserved == 0 else delta.rank <= 10


def test_preserving_keeps_outputs_of_preserved_keys():
    keys, residual = problem(3)
    old, _ = problem(6, seed=5)
    delta = preserving(keys, residual, SecondMoment(24).update(old), strength=1e6, ridge=1e-3)
    assert delta(old).norm() < 1e-2 * residual.norm()
    assert relative(delta(keys), residual) < 1e-2


def test_moment_is_kept_small_and_exact():
    old, _ = problem(23, seed=5)
    weights = torch.rand(23, generator=torch.Generator().manual_seed(4))
    moment = SecondMoment(24).update(old[:10], weights[:10]).update(old[10:], weights[10:])
    assert moment.matrix is None and moment.root.shape == (23, 24), "fewer keys than d_in: no d_in × d_in matrix"
    c = old.double().T @ (weights.double()[:, None] * old.double())
    assert moment.trace == pytest.approx(float(c.trace()), rel=1e-5)
    probe, _ = problem(4, seed=6)
    expected = torch.einsum("ni,ij,nj->n", probe.double(), c, probe.double())
    assert torch.allclose(moment.quadratic(probe), expected, rtol=1e-4)
    moment.update(old[:1])
    assert moment.matrix is not None and moment.root is None and moment.count == 24
    assert torch.allclose(moment.matrix, c + torch.outer(old[0], old[0]).double(), atol=1e-4)


def test_compressed_is_the_best_low_rank_approximation():
    keys, residual = problem(8)
    delta = minimum_norm(keys, residual)
    u, s, vh = torch.linalg.svd(delta.dense().double())
    for rank in (1, 3, 8):
        small = delta.compressed(rank)
        assert small.rank == rank
        assert relative(small.dense(), (u[:, :rank] * s[:rank]) @ vh[:rank]) < 1e-5
        assert float(small.A.norm()) == pytest.approx(float(small.B.norm()), rel=1e-4)
    doubled = delta + delta
    assert doubled.rank == 16 and doubled.compressed().rank == 8
    assert relative(doubled.compressed().dense(), 2 * delta.dense()) < 1e-5
    nothing = LowRankDelta(torch.zeros(2, 24), torch.zeros(10, 2)).compressed()
    assert nothing.rank == 0 and nothing.dense().shape == (10, 24)


def test_float64_stays_float64():
    keys, residual = problem(4)
    assert minimum_norm(keys.double(), residual.double()).A.dtype == torch.float64
    assert minimum_norm(keys.bfloat16(), residual.bfloat16()).A.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": torch.ones(2, 3)}, r"keys \(2, 3\) and residual \(4, 10\)"),
        ({"significance": torch.ones(3)}, r"significance has shape \(3,\); expected \(4,\)"),
        ({"significance": -torch.ones(4)}, "negative"),
        ({"keys": torch.full((4, 24), float("nan"))}, "keys hold values that are not finite"),
        ({"residual": torch.full((4, 10), float("inf"))}, "residual hold values that are not finite"),
    ],
)
def test_unfit_arguments(arguments, message):
    keys, residual = problem(4)
    with pytest.raises(ValueError, match=message):
        minimum_norm(**{"keys": keys, "residual": residual, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"moment": SecondMoment(5)}, "width 5"),
    ],
)
def test_unfit_arguments_of_preserving(arguments, message):
    keys, residual = problem(4)
    given = {"moment": SecondMoment(24), "strength": 1.0, "ridge": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        preserving(keys, residual, **given)


def test_unfit_moment_updates():
    with pytest.raises(ValueError, match=r"expected \(n, 24\)"):
        SecondMoment(24).update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="negative or not finite"):
        SecondMoment(24).update(torch.ones(2, 24), torch.tensor([1.0, -1.0]))


def test_one_after_another_equals_all_at_once():
    """Recursive least squares: a second batch solved beside the first one's bound is the joint solve of both."""
    generator = torch.Generator().manual_seed(3)
    width, outs = 30, 7
    kept = torch.randn(50, width, generator=generator)
    bound = SecondMoment(width).update(kept, 0.2)
    bound.ridge, total, batches = 0.05, torch.zeros(outs, width), []
    for _ in range(3):
        keys, residual = torch.randn(8, width, generator=generator), torch.randn(8, outs, generator=generator)
        weights = torch.rand(8, generator=generator) + 0.1
        change = preserving(keys, residual - keys @ total.T, bound, 1.0, bound.ridge, weights)
        total = total + change.dense()
        bound = bound.copy().update(keys, weights).compact(1024)
        batches.append((keys, residual, weights))
    y, r, s = (torch.cat([batch[i] for batch in batches]).double() for i in range(3))
    system = y.T @ (s[:, None] * y) + 0.2 * kept.double().T @ kept.double() + 0.05 * torch.eye(width)
    expected = torch.linalg.solve(system, y.T @ (s[:, None] * r)).T
    assert torch.allclose(total.double(), expected, atol=1e-5)


@pytest.mark.parametrize("count", [30, 200])
def test_a_compact_moment_is_near(count):
    """Of 30 (rows) or 200 (a matrix) keys of width 60, twelve directions are kept; the error is half the thirteenth."""
    keys = torch.randn(count, 60, generator=torch.Generator().manual_seed(4)) * torch.linspace(3, 0.1, 60)
    moment = SecondMoment(60).update(keys)
    exact = keys.double().T @ keys.double()
    small = moment.copy().compact(12)
    assert small.matrix is None and small.root.shape == (12, 60) and moment.ridge == 0
    near = small.root.double().T @ small.root.double() + small.ridge * torch.eye(60)
    thirteenth = torch.linalg.eigvalsh(exact)[-13]
    error = torch.linalg.matrix_norm(near - exact, 2)
    assert error <= thirteenth / 2 * (1 + 1e-4)
    untouched = moment.copy().compact(60)
    assert untouched.ridge == 0 and untouched.quadratic(keys[:3]) == pytest.approx(moment.quadratic(keys[:3]), rel=1e-5)


def test_a_compact_moment_of_many_keys_is_near():
    """So many rows that the directions are found by random projections."""
    keys = torch.randn(2300, 2400, generator=torch.Generator().manual_seed(5)) * torch.arange(1, 2401) ** -0.7
    moment = SecondMoment(2400).update(keys)
    exact = keys.T @ keys
    small = moment.compact(100)
    assert small.root.shape == (100, 2400)
    near = small.root.T @ small.root + small.ridge * torch.eye(2400)
    values = torch.linalg.eigvalsh(exact)
    assert float(torch.linalg.eigvalsh(near - exact).abs().max()) < 1.5 * float(values[-101])


@pytest.mark.parametrize("n", [2100, 2300])
def test_large_solves_are_the_same(n, monkeypatch):
    """Beyond 2,048 rows a Cholesky factorisation with refinement stands in for the eigenvectors."""
    keys, residual = problem(n, d_in=2200, d_out=12)
    keys = keys * torch.arange(1, 2201) ** -0.5
    keys[:5] = keys[5:10]  # alike, with other residuals: a singular Gram matrix
    large = minimum_norm(keys, residual)
    monkeypatch.setattr("qf_peft.solve.least_squares._LARGE", 5000)
    assert relative(large.dense(), minimum_norm(keys, residual).dense()) < 1e-4
    assert large.rank <= 12


def test_wide_keys_are_summed_in_blocks(monkeypatch):
    keys, residual = problem(100, d_in=50)
    weights = torch.rand(100, generator=torch.Generator().manual_seed(6))
    whole = [minimum_norm(keys, residual, weights), preserving(keys, residual, SecondMoment(50), 1.0, 0.1, weights)]
    monkeypatch.setattr("qf_peft.solve.second_moment._COLUMNS", 17)
    monkeypatch.setattr("qf_peft.solve.second_moment.row_blocks.__defaults__", (13,))
    blocks = [minimum_norm(keys, residual, weights), preserving(keys, residual, SecondMoment(50), 1.0, 0.1, weights)]
    for a, b in zip(whole, blocks, strict=True):
        assert relative(b.dense(), a.dense()) < 1e-5


@pytest.mark.parametrize("kept", [6, 40], ids=["few preserved keys", "many"])
def test_alphaedit_is_its_formula(kept):
    """Of the comparison: ΔW = Rᵀ S Y Q (Q (Yᵀ S Y + B) Q + ε I)⁻¹, and what spans the preserved keys is not touched."""
    keys, residual = problem(5)
    g = torch.Generator().manual_seed(1)
    old = torch.randn(kept, 16, generator=g) @ torch.randn(16, 24, generator=g)
    earlier, weights, ridge = torch.randn(3, 24, generator=g), torch.rand(5, generator=g) + 0.5, 0.3
    bound = SecondMoment(24).update(earlier)
    bound.ridge = ridge
    stays = TaughtTokens(old, torch.zeros(kept, 10), torch.ones(kept))
    found = alphaedit(bound, TaughtTokens(keys, residual, weights), stays).dense()
    values, vectors = torch.linalg.eigh(old.double().T @ old.double())
    null = vectors[:, values <= 1e-2 * values.mean()]
    q = null @ null.T
    y, b, s = keys.double() @ q, earlier.double() @ q, weights.double()[:, None]
    expected = torch.linalg.solve((y.T @ (s * y) + b.T @ b + ridge * torch.eye(24)), y.T @ (s * residual.double())).T
    assert relative(found, expected) < 1e-4
    assert float((found.double() @ old.double().T).norm() / found.double().norm()) < 1e-3
