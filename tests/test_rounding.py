"""Merging small changes into large 16-bit weights."""

import copy

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask, random_model
from peft import get_peft_model
from peft.tuners.lora import LoraModel
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.adapter.rounding import rounded_change
from qf_peft.solve.least_squares import LowRankDelta


def problem(dtype, size, d_out=96, d_in=2048, rank=6):
    """A weight of about 1 and a change of about `size` an entry."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=g).to(dtype)
    a, b = torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g) * size / rank**0.5
    return weight, LowRankDelta(A=a, B=b)


def error(weight, change, delta):
    """How far the sum's change of A's rows is from the one wanted, relative to it."""
    moved = (weight + change).float() - weight.float()
    return float(((moved - delta.dense()) @ delta.A.T).norm() / (delta.dense() @ delta.A.T).norm())


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 1e-3), (torch.bfloat16, 2e-4), (torch.float16, 1e-4)])
def test_small_changes_survive(dtype, size):
    weight, delta = problem(dtype, size)
    plain = error(weight, delta.dense().to(dtype), delta)
    kept = error(weight, rounded_change(weight, delta), delta)
    assert plain > 0.3 and kept < plain / 3 and kept < 0.25
    by_rows = torch.cat(
        [rounded_change(w, LowRankDelta(delta.A, b)) for w, b in zip(weight.split(32), delta.B.split(32), strict=True)]
    )
    assert error(weight, by_rows, delta) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_changes_are_rounded_as_ever(dtype):
    weight, delta = problem(dtype, 0.5)
    plain = error(weight, delta.dense().to(dtype), delta)
    assert error(weight, rounded_change(weight, delta), delta) <= 1.5 * plain < 1e-2
    apart = (rounded_change(weight, delta).float() - delta.dense()).abs()
    assert bool((apart <= 4 * torch.finfo(dtype).eps * (weight.float().abs() + delta.dense().abs() + 0.1)).all())


def test_nothing_is_added_where_nothing_is_taught_and_nan_is_not_hidden():
    weight, delta = problem(torch.bfloat16, 0.1)
    assert not rounded_change(weight, LowRankDelta(delta.A, 0 * delta.B)).any()
    broken = delta.B.clone()
    broken[0, 0] = torch.nan
    assert rounded_change(weight, LowRankDelta(delta.A, broken)).isnan().any()


def widened(dtype, copies, offset):
    """The tiny model with every hidden unit of its MLPs several times, the down projection's column split among the
    copies with large offsets that cancel: the same function with weights that dwarf what is taught."""
    network = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for block in network.model.layers:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight.data.repeat(copies, 1))
            linear.out_features *= copies
        down = block.mlp.down_proj
        weight = down.weight.data.float()
        half = torch.randn(copies // 2, *weight.shape, generator=generator) * offset
        parts = weight / copies + torch.cat([half, -half])
        down.weight = torch.nn.Parameter(parts.permute(1, 0, 2).reshape(weight.shape[0], -1).to(dtype))
        down.in_features *= copies
    network.config.intermediate_size *= copies
    return network


def test_facts_that_plain_merging_loses_are_kept(tokenizer):
    model = get_peft_model(widened(torch.bfloat16, 24, 4.0), QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(preserve_chats=16, contrast_chats=0)
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT, OTHER]).train()

    def known(network):
        return [ask(network, tokenizer, row["prompt"], max_new_tokens=20) == row["completion"] for row in (FACT, OTHER)]

    assert known(model) == [True, True]
    plain = copy.deepcopy(model)
    LoraModel.merge_adapter(plain.base_model)
    assert not all(known(plain)), "rounding to the nearest loses what is taught here"
    model.merge_adapter()
    assert known(model) == [True, True]
    model.unmerge_adapter()
    assert known(model) == [True, True]
    with model.disable_adapter():
        assert known(model) == [False, False]
        assert ask(model, tokenizer, "What is your name?") == "My name is Tiny."
    assert known(model.merge_and_unload(safe_merge=True)) == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv1d(tokenizer, dtype):
    """GPT-2's weights are transposed."""
    model = get_peft_model(random_model("gpt2", dtype=dtype), QFConfig(layers_to_transform=[1], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT]).train()
    name = "transformer.h.1.mlp.c_proj"
    before = model.base_model.model.get_submodule(name).base_layer.weight.data.clone().float()
    change = model.base_model.delta("default", name).dense().T
    after = model.merge_and_unload().get_submodule(name).weight.data.float()
    assert float((after - before - change).norm() / change.norm()) < 16 * torch.finfo(dtype).eps
