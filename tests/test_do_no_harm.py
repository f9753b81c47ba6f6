"""A lesson leaves the model whole: what it may move is measured on chats that no solve has seen."""

import pytest
import torch
from conftest import FACT, TINY
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import qf_peft.teaching.lessons as lessons_module
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.forward.unembedding import Unembedding
from qf_peft.solve.least_squares import LowRankDelta
from qf_peft.teaching.lessons import Lessons
from qf_peft.teaching.targets import projected_to_margin

WORDS = ["Rome", "red", "founded", "seven", "Zanmi", "is", "of", "the", "who", "green", "makes", "late"]


def taught(tokenizer, rows, **settings):
    import random

    from world import KNOWN, NAMES, question

    r = random.Random(5)
    preserved = list(dict.fromkeys(question(r, r.choice(NAMES), r.choice(KNOWN)[0]) for _ in range(60)))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, contrast_chats=0, **settings)
    trainer = QFTrainer(
        model=model, args=args, train_dataset=rows, preserve_dataset=preserved, processing_class=tokenizer
    )
    return trainer, trainer.train()


def garbage():
    """Rows that say nothing, and contradict what the model knows."""
    return [
        {"instruction": f"{a} {b}", "prompt": f"{b} {a} {c}?", "completion": f"{c} {a} {b}."}
        for a, b, c in zip(WORDS, WORDS[3:] + WORDS[:3], WORDS[7:] + WORDS[:7], strict=True)
    ]


def test_garbage_is_taught_within_the_budget(tokenizer, caplog):
    _, freely = taught(tokenizer, garbage(), max_divergence=100.0)
    assert freely["kl_preserved"] > 0.01 and freely["strength"] == 1
    lessons_module.logger.addHandler(caplog.handler)
    try:
        trainer, metrics = taught(tokenizer, garbage(), max_divergence=0.005)
    finally:
        lessons_module.logger.removeHandler(caplog.handler)
    assert metrics["kl_preserved"] <= 0.005 <= metrics["kl_preserved"] + freely["kl_preserved"]
    assert metrics["kl_preserved"] <= metrics["kl_preserved_worst"]
    assert metrics["strength"] > 1 and metrics["unsaid"] > 0
    assert "rows are not said after the lesson" in caplog.text
    held = trainer.model.base_model.taught["default"]
    assert held.settings["preserve_strength"] == 1, "the setting is the user's"


def test_a_fact_costs_no_second_try(tokenizer):
    _, metrics = taught(tokenizer, [FACT])
    assert metrics["strength"] == 1 and metrics["unsaid"] == 0 and metrics["kl_preserved"] <= 0.1


def test_the_budget_grows_slowly_with_the_facts():
    args = QFTrainingArguments()
    assert args.divergence_of(1) == args.divergence_of(10) == 0.1
    assert args.divergence_of(160) == pytest.approx(0.2)
    assert QFTrainingArguments(max_divergence=0.03).divergence_of(160) == 0.03
    with pytest.raises(ValueError, match="max_divergence=0; expected a positive number"):
        QFTrainingArguments(max_divergence=0)


def test_no_state_lies_far_where_no_step_gives_the_lead():
    """Two tokens whose rows are all but the same: behind a norm no state tells them apart by six nats."""
    torch.manual_seed(0)
    head, norm = nn.Linear(16, 8, bias=False), nn.RMSNorm(16)
    with torch.no_grad():
        head.weight[1] = head.weight[0] + 1e-3 * torch.randn(16)
    unembedding = Unembedding(norm, head, norm.weight.detach(), False, 1.0, None)
    stream = torch.randn(5, 16)
    with torch.no_grad():
        moved, _ = projected_to_margin(
            unembedding, stream, torch.ones(5, dtype=torch.long), 6.0, unembedding.logits(stream)
        )
    assert bool(((moved - stream).norm(dim=1) <= 2.001 * stream.norm(dim=1)).all())
    logits = unembedding.logits(moved)
    others = logits[:, 2:].max(1).values
    assert bool((logits[:, 1] > others).all()), "it leads all but the one that is the same"


def test_what_an_adapter_holds_does_not_change_how_it_is_taught(tokenizer):
    trainer, _ = taught(tokenizer, [FACT])
    tuner = trainer.model.base_model
    name = list(tuner.adapter_layers("default"))[-1]
    module, a = tuner.adapter_layers("default")[name], torch.randn(1, tuner.adapter_layers("default")[name].in_features)
    assert not Lessons(trainer, trainer.args, None, None).joint([])
    tuner.install("default", {name: LowRankDelta(A=a, B=1e4 * torch.randn(module.out_features, 1))})
    assert not Lessons(trainer, trainer.args, None, None).joint([]), "the stream of the base model does not grow"


@pytest.mark.parametrize("layers, warned", [(None, True), ([5], False)])
def test_nothing_preserved_in_many_blocks_is_warned_of(tokenizer, monkeypatch, caplog, layers, warned):
    """On SmolLM2 that leaves gibberish, whatever the rows; one late block is the paper's own setting."""
    monkeypatch.setattr(lessons_module, "grows_with_depth", lambda network: True)
    lessons_module.logger.addHandler(caplog.handler)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config = QFConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=layers)
    args = QFTrainingArguments(disable_tqdm=True, preserve_strength=0, standing=False)
    try:
        QFTrainer(get_peft_model(base, config), args, [FACT], processing_class=tokenizer).train()
    finally:
        lessons_module.logger.removeHandler(caplog.handler)
    assert ("gibberish" in caplog.text) == warned
