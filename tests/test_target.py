"""Where the stream should go: the smallest steps to a lead, against brute force and autograd."""

import pytest
import torch
from conftest import random_model

from qf_peft.forward.capture import Point, forward_pass
from qf_peft.forward.unembedding import Unembedding, margins
from qf_peft.teaching.targets import ahead_of_rivals, aim, interpolated_to_margin, projected_to_margin, read_off


@pytest.fixture(params=["qwen2", "gpt2", "gemma2", "granite"])
def unembedding(request):
    model = random_model(request.param)
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    points = {"stream": Point(blocks[-1], "output"), "read": Point(model.get_output_embeddings(), "input")}
    ids = torch.randint(3, 1000, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
    found = forward_pass(model, ids, [5] * 4, points, batch_tokens=32, pad_id=0)
    return Unembedding.find(model, blocks, found["stream"], found["read"]), found["stream"], model


@torch.no_grad()
def test_logits_are_the_models(unembedding):
    unembed, stream, model = unembedding
    assert unembed is not None
    ids = torch.randint(3, 1000, (4, 9), generator=torch.Generator().manual_seed(1))
    logits = model(ids[:, :-1]).logits[:, -5:].reshape(20, -1)
    raw = unembed.logits(stream)
    assert torch.allclose(unembed.predictions(raw), logits.log_softmax(-1), atol=2e-3)


@torch.no_grad()
def test_forced_states_lead_by_the_margin(unembedding):
    unembed, stream, _ = unembedding
    gold = torch.randint(0, 1024, (20,), generator=torch.Generator().manual_seed(2))
    first = unembed.logits(stream).argmax(1)
    gold[:3] = first[:3]
    moved, logits = projected_to_margin(unembed, stream, gold, 0.5, unembed.logits(stream), steps=200)
    assert torch.allclose(logits, unembed.logits(moved), atol=1e-4)
    ahead = margins(logits, gold)[0]
    assert bool((ahead > 0.45).all())
    already = margins(unembed.logits(stream), gold)[0] >= 0.5
    assert torch.equal(moved[already], stream[already])


@torch.no_grad()
def test_ahead_of_those_that_are_first_now(unembedding):
    """As forced does, where none but the first 32 come up; with margins of each state's own."""
    unembed, stream, _ = unembedding
    logits = unembed.logits(stream)
    gold, margin = logits.topk(6, 1).indices[:, -1], torch.linspace(0.05, 0.3, 20)
    moved, _ = ahead_of_rivals(unembed, stream, gold, margin, logits, steps=50)
    for i in range(20):
        alone = projected_to_margin(
            unembed, stream[i : i + 1], gold[i : i + 1], float(margin[i]), logits[i : i + 1], steps=50
        )[0]
        if margins(unembed.logits(moved[i : i + 1]), gold[i : i + 1])[0] >= margin[i] - 1e-2:
            assert torch.allclose(moved[i], alone[0], atol=1e-3)
    assert float((margins(unembed.logits(moved), gold)[0] >= margin - 1e-2).float().mean()) > 0.8


def test_the_step_is_the_steepest(unembedding):
    """Its direction is the gradient of the lead, as autograd gives it with the norm's size held."""
    unembed, stream, _ = unembedding
    gold = torch.zeros(len(stream), dtype=torch.long)
    with torch.no_grad():
        step = projected_to_margin(unembed, stream, gold, 50.0, unembed.logits(stream), steps=1)[0] - stream
        other = margins(unembed.logits(stream), gold)[1]
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
    found = interpolated_to_margin(unembed, stream, goal, gold, 0.05, unembed.logits(stream), unembed.logits(goal))
    for i in range(len(stream)):
        path = [stream[i] + a * (goal[i] - stream[i]) for a in torch.linspace(0, 1, 400)]
        leads = margins(unembed.logits(torch.stack(path)), gold[i].expand(400))[0]
        got = margins(unembed.logits(found[i : i + 1]), gold[i : i + 1])[0]
        if leads.max() < 0.05:
            assert torch.allclose(found[i], goal[i], atol=1e-4), "all the way where it never leads"
        elif leads[0] >= 0.05:
            assert torch.equal(found[i], stream[i])
        else:
            one = found[i : i + 1]
            _, logits = projected_to_margin(unembed, one, gold[i : i + 1], 0.05, unembed.logits(one), steps=50)
            assert margins(logits, gold[i : i + 1])[0] >= 0.045, "whatever was overlooked is forced"
            if bool((leads.diff() >= 0).all()):
                assert float(got) == pytest.approx(0.05, abs=0.05), "and no farther"


@torch.no_grad()
def test_what_is_read_off_the_predictions(unembedding):
    unembed, stream, model = unembedding
    goal, gold = stream.roll(1, 0), torch.arange(20)
    cap = getattr(model.config, "final_logit_softcapping", None) or 1e9
    p, q = (cap * torch.tanh(unembed.logits(s).double() / cap) for s in (goal, stream))
    p, q = p.log_softmax(1), q.log_softmax(1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    others = q.scatter(1, gold[:, None], -torch.inf).max(1).values
    aimed, counts, before = aim(unembed, stream, goal, gold, False, None)
    assert torch.equal(aimed, goal)
    for reading in (before, read_off(unembed, goal, stream, gold)):
        assert torch.allclose(reading.divergence.double(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(reading.read, p.argmax(1))
        assert torch.allclose(reading.margins.double(), q.gather(1, gold[:, None])[:, 0] - others, atol=1e-3)
    assert torch.allclose(counts, before.divergence), "the context's state itself is aimed at"
    aimed, counts, _ = aim(unembed, stream, goal, gold, True, 0.5)
    after = read_off(unembed, aimed, stream, gold).divergence
    assert torch.allclose(counts, after, rtol=1e-3, atol=1e-4)


def test_no_unembedding_behind_a_projection():
    model = random_model("qwen2")
    stream, read = torch.randn(5, 32), torch.randn(5, 32)
    assert Unembedding.find(model, model.model.layers, stream, read) is None
