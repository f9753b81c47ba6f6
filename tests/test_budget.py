"""What a lesson does where it would move the held-out chats by more than is allowed: as much is said as fits."""

import sys

import pytest
import torch
from conftest import EXAMPLES, TINY
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import qf_peft.teaching.constants as tuned
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

sys.path.insert(0, str(EXAMPLES))

CHATS = [f"{question} {name}?" for name in ("Ranixmo", "Lupal", "Zanko", "Brigar", "Velmo") for question in (
    "Who founded", "Tell me who leads", "Where is the home of", "Please say who started")]  # fmt: skip
BEFORE = {"RIDGE_ROOM": 0.0, "SURPLUS_BEYOND": float("inf")}


@pytest.fixture
def teach(monkeypatch, tokenizer, tmp_path):
    """Bare answers, which the model would not give so, taught as pretrained models are."""
    from comparison.tiny import teaching_set

    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    monkeypatch.setattr("qf_peft.adapter.target_modules.grows_with_depth", lambda network: True)
    rows = [
        {"instruction": row["instruction"], "prompt": row["prompt"], "completion": row["completion"].split()[-1]}
        for row in teaching_set(12, 0)[0]
    ]

    def run(budget, **constants):
        for name, value in constants.items():
            monkeypatch.setattr(tuned, name, value)
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path, max_divergence=budget)
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
        trainer = QFTrainer(model, args, rows, CHATS, tokenizer)
        most = trainer.dry_run()["forward_passes_at_most"]
        metrics = trainer.train()
        assert metrics["kl_preserved"] <= budget and metrics["forward_passes"] <= most
        return metrics

    return run


def test_a_ridge_raised_too_far_is_made_up_for(teach):
    """A ridge between is tried, and what is missing is corrected further, within the same budget."""
    new = teach(1.1e-5)
    old = teach(1.1e-5, **BEFORE)
    assert new["ridge"] < old["ridge"] and new["unsaid"] + 2 <= old["unsaid"]


def test_the_surplus_is_bounded_far_beyond_the_budget(teach):
    """Less is asked for before the ridge takes everything back."""
    new = teach(1e-5)
    old = teach(1e-5, **BEFORE)
    assert new["ridge"] < old["ridge"] and new["unsaid"] + 2 <= old["unsaid"]
