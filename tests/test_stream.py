"""Aiming through an RMS norm, against direct numerical minimisation."""

import pytest
import torch

from qf_peft.forward.residual_stream import aim_through_norm


def distance(gain, outputs, wanted):
    return (gain * outputs / outputs.square().mean(1, keepdim=True).sqrt() - wanted).norm(dim=1)


@pytest.mark.parametrize("gain", ["random", "equal", "with zeros"])
def test_nearest_point_behind_the_norm(gain):
    g = torch.Generator().manual_seed(0)
    gains = {"random": torch.rand(12, generator=g) + 0.1, "equal": torch.ones(12)}.get(gain)
    if gains is None:
        gains = torch.rand(12, generator=g) + 0.1
        gains[3:5] = 0
    output, wanted = torch.randn(6, 12, generator=g), 2 * torch.randn(6, 12, generator=g)
    found = aim_through_norm(gains, output, wanted)
    assert torch.allclose(found.norm(dim=1), output.norm(dim=1), rtol=1e-4), "the outputs keep their size"
    best = torch.full((6,), float("inf"))
    for start in range(8):
        point = torch.randn(6, 12, generator=torch.Generator().manual_seed(start)).requires_grad_()
        optimizer = torch.optim.LBFGS([point], max_iter=300, line_search_fn="strong_wolfe")

        def loss(point=point, optimizer=optimizer):
            optimizer.zero_grad()
            value = distance(gains, point, wanted).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        best = torch.minimum(best, distance(gains, point.detach(), wanted))
    assert bool((distance(gains, found, wanted) <= best + 1e-3).all())


def test_a_goal_within_reach_is_met():
    g = torch.Generator().manual_seed(1)
    gain, output = torch.rand(12, generator=g) + 0.1, torch.randn(5, 12, generator=g)
    wanted = gain * output / output.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(aim_through_norm(gain, output, wanted), output, atol=1e-5)
