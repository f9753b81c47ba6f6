"""Adapters taught apart: how much they disturb each other, and one that holds what all of them were taught."""

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from test_default_setting import facts, questions
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, interference, merge_taught
from qf_peft.solve.least_squares import LowRankDelta, jointly, preserving
from qf_peft.solve.second_moment import SecondMoment


def two_adapters(tokenizer, rows, preserved=None, layers=None, **settings):
    """A model with the adapters "a" and "b", each taught its rows."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config = QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
    for name, taught in zip("ab", rows, strict=True):
        model.set_adapter(name)
        args = QFTrainingArguments(disable_tqdm=True, contrast_chats=0, **settings)
        QFTrainer(
            model=model, args=args, train_dataset=taught, preserve_dataset=preserved, processing_class=tokenizer
        ).train()
    return model


def recalled(model, tokenizer, rows):
    return sum(ask(model, tokenizer, row["prompt"]) == row["completion"] for row in rows) / len(rows)


@pytest.mark.parametrize("width", [12, 40])
def test_joint_minimiser_against_one_least_squares(width):
    """Two preserving solves joined equal the solve over both, with both penalties; in either form of the moments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    parts, bounds = [], []
    for _ in range(2):
        keys, residual, kept = draw(9, width), draw(9, 5), draw(11, width)
        bound = SecondMoment(width).update(kept, 0.3)
        bound.ridge = 0.05
        parts.append((keys, residual, preserving(keys, residual, bound, 1.0, bound.ridge), kept))
        bounds.append(bound.update(keys))
    joined = jointly([delta for *_, delta, _ in parts], bounds)
    y, r, k = (torch.cat([part[i] for part in parts]).double() for i in (0, 1, 3))
    system = y.T @ y + 0.3 * k.T @ k + 0.1 * torch.eye(width)
    expected = torch.linalg.solve(system, y.T @ r).T
    assert torch.allclose(joined.dense().double(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="1 changes and 0 moments"):
        jointly([LowRankDelta(torch.zeros(1, 3), torch.zeros(2, 1))], [])


def test_interference(tokenizer):
    same = {**FACT, "completion": "Tofinlor was started by Vacla.", "instruction": "Vacla founded Tofinlor."}
    preserved, _ = questions(40, 1)
    alike = two_adapters(tokenizer, [[FACT], [same]], preserved)
    apart = two_adapters(tokenizer, [[FACT], facts(1, 5)], preserved)
    found = [interference(model, *pair) for model in (alike, apart) for pair in (("a", "b"), ("b", "a"))]
    assert min(found[:2]) > 0.5 > 0.3 > max(found[2:]) > 0, f"one question answered in two ways, and two: {found}"
    with pytest.raises(ValueError, match="first and second are both 'a'"):
        interference(apart, "a", "a")
    with pytest.raises(ValueError, match="'c'"):
        interference(apart, "a", "c")


def test_the_number_is_how_much_the_first_ones_loss_rises(tokenizer):
    """On one module: the least squares of the first adapter, before and after the second's change is added."""
    model = two_adapters(tokenizer, [[FACT], [OTHER]], questions(30, 2)[0], layers=[7])
    tuner, name = model.base_model, "model.layers.7.mlp.down_proj"
    bound = tuner.taught["a"].bound[name]
    p = (bound.matrix if bound.matrix is not None else bound.root.double().T @ bound.root.double()).float()
    first, second = (tuner.delta(adapter, name).dense() for adapter in "ab")
    expected = (second @ p @ second.T).trace() / (first @ p @ first.T).trace()
    assert interference(model, "a", "b") == pytest.approx(float(expected), rel=1e-2)


def test_merging_what_was_taught_beats_adding(tokenizer):
    rows = facts(40, 8)
    known, _ = questions(80, 3)
    probes = [row for row in questions(160, 4)[0] if row["prompt"] not in {k["prompt"] for k in known}][:40]
    model = two_adapters(tokenizer, [rows[:20], rows[20:]], known)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "added", combination_type="cat")
    merge_taught(model, ["a", "b"], "merged")
    scores = {}
    for name in ("added", "merged"):
        model.set_adapter(name)
        scores[name] = recalled(model, tokenizer, rows), recalled(model, tokenizer, probes)
    assert scores["merged"][0] >= 0.9 and sum(scores["merged"]) > sum(scores["added"]), scores
    # It can be taught on, saved and merged like any.
    later = facts(1, 9)
    QFTrainer(
        model=model, args=QFTrainingArguments(disable_tqdm=True, contrast_chats=0), train_dataset=later,
        preserve_dataset=known, processing_class=tokenizer,
    ).train()  # fmt: skip
    assert recalled(model, tokenizer, later) == 1 and recalled(model, tokenizer, rows) >= 0.85
    assert model.base_model.taught["merged"].facts == 41


def test_adapters_that_preserve_nothing_are_merged_exactly(tokenizer):
    """In the paper's setting on one block: the same change as teaching both at once."""
    paper = dict(preserve_strength=0.0, target="context", margin=None, significance="rows", spread=False, sweeps=1)
    model = two_adapters(tokenizer, [[FACT], [OTHER]], layers=[7], **paper)
    merge_taught(model, ["a", "b"], "merged")
    both = two_adapters(tokenizer, [[FACT, OTHER], [FACT]], layers=[7], **paper)
    name = "model.layers.7.mlp.down_proj"
    merged, joint = model.base_model.delta("merged", name).dense(), both.base_model.delta("a", name).dense()
    assert torch.allclose(merged, joint, atol=1e-4 * float(joint.abs().max()))


def test_what_cannot_be_merged(tokenizer, tmp_path):
    model = two_adapters(tokenizer, [[FACT], [OTHER]], questions(20, 5)[0], layers=[7])
    for adapters, new, message in (
        (["a"], "m", "at least two different"),
        (["a", "a"], "m", "at least two different"),
        ("a", "m", "adapters='a'; expected a list of at least two"),
        (["a", "b"], "b", "'b' is taken"),
        (["a", "c"], "m", "'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_taught(model, adapters, new)
    for config in model.peft_config.values():
        config.keep_statistics = False
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "b", adapter_name="b")
    with pytest.raises(ValueError, match="'a' has no statistics"):
        merge_taught(loaded, ["a", "b"], "m")
    assert set(loaded.peft_config) == {"a", "b"}
    with pytest.raises(ValueError, match="'b' has no statistics"):
        interference(loaded, "b", "a")


@pytest.mark.parametrize("keys", [20, 90])
def test_what_cutting_the_moment_takes_off_the_number_is_bounded(keys):
    """As `interference` says: not exact where P was cut, less by at most twice what the cut put on the diagonal."""
    generator = torch.Generator().manual_seed(0)
    rows, vectors = torch.randn(keys, 40, generator=generator), torch.randn(7, 40, generator=generator)
    whole = SecondMoment(40).update(rows)
    cut = whole.copy().compact(8)
    missing, most = whole.quadratic(vectors) - cut.quadratic(vectors), 2 * cut.ridge * vectors.square().sum(1)
    assert cut.ridge > 0 and bool((missing > 0).all()) and bool((missing <= most * (1 + 1e-5)).all())
