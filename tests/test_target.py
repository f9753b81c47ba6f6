"""Where the stream should go: the smallest steps to a lead, against brute force and autograd."""

import pytest
import torch
from conftest import random_model

from qf_peft.capture import Point, forward_pass
from qf_peft.target import Unembedding, divergence, force, lead, nearest_on_the_way


@pytest.fixture(params=["qwen2", "gpt2", "gemma2", "granite"])
def unembedding(request):
    model = random_model(request.param)
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    points = {"stream": Point(blocks[-1], "output"), "read": Point(model.get_output_embeddings(), "input")}
    ids = torch.randint(3, 1000, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    found = forward_pass(model, ids, [5] * 4, points, batch_size=4, pad_id=0)
    return Unembedding.find(model, blocks, found["stream"], found["read"]), found["stream"], model


@torch.no_grad()
def test_logits_are_the_models(unembedding):
    unembed, stream, model = unembedding
    assert unembed is not None
    ids = torch.randint(3, 1000, (4, 9), generator=torch.Generator().manual_seed(1))
    logits = model(ids[:, :-1]).logits[:, -5:].reshape(20, -1)
    raw = unembed.logits(stream)
    if getattr(model.config, "final_logit_softcapping", None):
        cap = model.config.final_logit_softcapping
        raw = cap * torch.tanh(raw / cap)
    assert torch.allclose(raw, logits, atol=2e-3)


@torch.no_grad()
def test_forced_states_lead_by_the_margin(unembedding):
    unembed, stream, _ = unembedding
    gold = torch.randint(0, 1024, (20,), generator=torch.Generator().manual_seed(2))
    first = unembed.logits(stream).argmax(1)
    gold[:3] = first[:3]
    forced = force(unembed, stream, gold, 0.5, steps=200)
    ahead = lead(unembed.logits(forced), gold)[0]
    assert bool((ahead > 0.45).all())
    already = lead(unembed.logits(stream), gold)[0] >= 0.5
    assert torch.equal(forced[already], stream[already])


def test_the_step_is_the_steepest(unembedding):
    """Its direction is the gradient of the lead, as autograd gives it with the norm's size held."""
    unembed, stream, _ = unembedding
    gold = torch.zeros(len(stream), dtype=torch.long)
    with torch.no_grad():
        step = force(unembed, stream, gold, 50.0, steps=1) - stream
        other = lead(unembed.logits(stream), gold)[1]
    h = stream.clone().requires_grad_()
    centre = h.mean(1, keepdim=True) if unembed.centred else 0.0
    state = unembed.gain * (h - centre) / unembed.spread(stream)[:, None]
    (state * (unembed.rows(gold) - unembed.rows(other))).sum().backward()
    assert torch.nn.functional.cosine_similarity(step, h.grad, dim=1).min() > 0.999


@torch.no_grad()
def test_nearest_on_the_way_is_the_first_with_the_lead(unembedding):
    unembed, stream, _ = unembedding
    goal = stream.roll(1, 0)
    gold = unembed.logits(goal).argmax(1)
    found = nearest_on_the_way(unembed, stream, goal, gold, margin=0.05)
    for i in range(len(stream)):
        path = [stream[i] + a * (goal[i] - stream[i]) for a in torch.linspace(0, 1, 400)]
        leads = lead(unembed.logits(torch.stack(path)), gold[i].expand(400))[0]
        got = lead(unembed.logits(found[i : i + 1]), gold[i : i + 1])[0]
        if leads.max() < 0.05:
            assert torch.allclose(found[i], goal[i], atol=1e-4), "all the way where it never leads"
        elif leads[0] >= 0.05:
            assert torch.equal(found[i], stream[i])
        else:
            forced = force(unembed, found[i : i + 1], gold[i : i + 1], 0.05, steps=50)
            assert lead(unembed.logits(forced), gold[i : i + 1])[0] >= 0.045, "whatever was overlooked is forced"
            if bool((leads.diff() >= 0).all()):
                assert float(got) == pytest.approx(0.05, abs=0.05), "and no farther"


@torch.no_grad()
def test_divergence_is_kl(unembedding):
    unembed, stream, _ = unembedding
    p, q = unembed.logits(stream.roll(1, 0)).double(), unembed.logits(stream).double()
    expected = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(divergence(unembed, stream.roll(1, 0), stream).double(), expected, rtol=1e-3, atol=1e-4)


def test_no_unembedding_behind_a_projection():
    model = random_model("qwen2")
    stream, read = torch.randn(5, 32), torch.randn(5, 32)
    assert Unembedding.find(model, model.model.layers, stream, read) is None
