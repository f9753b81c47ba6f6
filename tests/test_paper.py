"""The paper's setting against the reference's formula, from W, X, Y and B taken by hooks of the test's own."""

import pytest
import torch
from conftest import FACT, OTHER, random_model
from peft import get_peft_model

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows

LAYER = 1


def observe(model, ids, taught):
    """Keys of the down projection and the stream before the MLP, at the taught positions."""
    block, kept = model.model.layers[LAYER], {}
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.update(key=args[0])),
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: kept.update(stream=args[0])),
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids[:-1]]))
    for handle in handles:
        handle.remove()
    return kept["key"][0, -taught:].double(), kept["stream"][0, -taught:].double()


def reference(model, tokenizer, rows):
    """W' = W − [W(Y−X) − B](YᵀY)⁻¹Yᵀ with keys as columns, B = v − v', each column repeated as it is significant."""
    columns = []
    for row in read_rows(rows):
        example = Encoder(tokenizer).encode(row)
        x, v = observe(model, example.context_ids, example.taught)
        y, v_bare = observe(model, example.bare_ids, example.taught)
        times = torch.tensor([int(s) for s in example.significance])
        columns.append([t.repeat_interleave(times, dim=0) for t in (x, y, v - v_bare)])
    x, y, b = (torch.cat(parts).T for parts in zip(*columns, strict=True))
    w = model.model.layers[LAYER].mlp.down_proj.weight.detach().double()
    return w, w - (w @ (y - x) - b) @ torch.linalg.pinv(y.T @ y, rtol=1e-12) @ y.T


def taught_weight(model, w):
    delta = model.base_model.delta("default", f"model.layers.{LAYER}.mlp.down_proj")
    return w + delta.dense().double()


def check(model, w, expected):
    got = taught_weight(model, w)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (got - expected).norm() < 1e-5 * (expected - w).norm(), "relative to the change itself"


def teach(model, tokenizer, rows):
    args = QFTrainingArguments.paper(disable_tqdm=True)
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows).train()


def qf(base):
    return get_peft_model(base, QFConfig(layers_to_transform=[LAYER], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("significance", [1, [0, 1, 2, 3, 1], [0, 0, 1, 0, 1]])
def test_one_fact(tokenizer, significance):
    base = random_model("qwen2")
    row = {**FACT, "significance": significance}
    w, expected = reference(base, tokenizer, [row])
    model = qf(base)
    teach(model, tokenizer, [row])
    check(model, w, expected)


@pytest.mark.parametrize("new_trainer", [True, False])
def test_second_fact_after_the_first_is_the_joint_solve(tokenizer, new_trainer):
    base = random_model("qwen2")
    w, first = reference(base, tokenizer, [FACT])
    _, both = reference(base, tokenizer, [FACT, OTHER])
    model = qf(base)
    trainer = QFTrainer(model=model, args=QFTrainingArguments.paper(), processing_class=tokenizer, train_dataset=[FACT])
    trainer.train()
    check(model, w, first)
    if new_trainer:
        teach(model, tokenizer, [OTHER])
    else:
        trainer.rows = read_rows([OTHER])
        trainer.train()
    check(model, w, both)


def test_both_facts_in_one_batch_equal_one_after_another(tokenizer):
    base = random_model("qwen2")
    w, both = reference(base, tokenizer, [FACT, OTHER])
    model = qf(base)
    teach(model, tokenizer, [FACT, OTHER])
    check(model, w, both)


def test_taught_positions_are_the_references(tokenizer):
    """Header after its first token, completion, end of turn: the keys of all but the last of those tokens."""
    example = Encoder(tokenizer).encode(read_rows([{**FACT, "significance": [0, 1, 2, 3, 4]}])[0])
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    words = [
        tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("Tofinlor", " was", " started", " by", " Zanmi.")
    ]
    end = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert example.targets == header[1:] + [t for word in words for t in word] + end
    weights = [1.0] * (len(header) - 1) + [float(k) for k, word in enumerate(words) for _ in word] + [1.0]
    assert example.significance == weights
    assert example.bare_ids[-len(example.targets) - 1] == header[0], "the first key is the header's first token's"
