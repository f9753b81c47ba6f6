"""What users of TRL's and transformers' trainers expect of QFTrainer, and teaching without it."""

import subprocess
import sys

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import qf_peft
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, teach

PAPER = {
    "target": "context", "margin": None, "significance": "rows", "spread": False, "preserve_strength": 0.0,
    "rank_tolerance": 0.0, "standing": False, "sweeps": 1,
}  # fmt: skip


@pytest.fixture
def model(tiny):
    return get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))


class Told(TrainerCallback):
    """Notes what it is told."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        note = super().__getattribute__("events").append

        def noted(args, state, control, **given):
            values = given.get("logs") or given.get("metrics") or {}
            note((name, state.global_step, values, given["model"], given["processing_class"], args))

        return noted


def test_callbacks_are_told_of_lessons_evaluations_and_saves(model, tokenizer, tmp_path):
    told = Told()
    args = QFTrainingArguments.paper()
    trainer = QFTrainer(model, args, [FACT], processing_class=tokenizer, callbacks=[told])
    metrics = trainer.train()
    found = trainer.evaluate()
    trainer.save_model(tmp_path)
    trainer.forget(trainer.facts[0].id)
    assert [(name, step) for name, step, *_ in told.events] == [
        ("on_init_end", 0), ("on_train_begin", 0), ("on_log", 1), ("on_train_end", 1), ("on_evaluate", 1),
        ("on_log", 1), ("on_save", 1), ("on_train_begin", 1), ("on_log", 2), ("on_train_end", 2),
    ]  # fmt: skip
    values = [values for _, _, values, *_ in told.events]
    assert values[2] == metrics and values[4]["eval_recall"] == found["recall"].value == 1
    assert all(event[3:] == (model, tokenizer, args) for event in told.events)


def test_a_lesson_that_fails_is_not_told_as_done(model, tokenizer):
    told = Told()
    trainer = QFTrainer(model, processing_class=tokenizer, callbacks=[told])
    with pytest.raises(ValueError, match="train_dataset is missing"):
        trainer.train()
    assert [name for name, *_ in told.events] == ["on_init_end", "on_train_begin"]


def test_eval_dataset_is_what_is_asked_for(model, tokenizer):
    trainer = QFTrainer(model, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer, eval_dataset=[OTHER])
    trainer.train()
    found = trainer.evaluate()
    assert found["recall"].value == 0 and found["in_context"].value == 1 and found["recall"].count == 1
    with pytest.raises(ValueError, match="no column 'prompt'"):
        QFTrainer(model, processing_class=tokenizer, eval_dataset=[{"instruction": "x"}])


def test_save_model_is_loaded_with_its_tokenizer(model, tokenizer, tmp_path):
    trainer = QFTrainer(model, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path)
    assert ask(loaded, AutoTokenizer.from_pretrained(tmp_path), FACT["prompt"]) == FACT["completion"]
    assert len(loaded.base_model.taught["default"].entries) == 1


def test_teach_does_what_the_trainer_does(model, tokenizer):
    metrics = teach(model, [FACT], tokenizer, **PAPER)
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    taught = model.base_model.version("default")
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager"),
        QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"),
    )
    trainer = QFTrainer(other, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer)
    same = trainer.train()
    assert {k: v for k, v in metrics.items() if k != "seconds"} == {k: v for k, v in same.items() if k != "seconds"}
    assert all(
        torch.equal(x, y)
        for name, pair in other.base_model.version("default").factors.items()
        for x, y in zip(pair, taught.factors[name], strict=True)
    )
    with pytest.raises(TypeError, match="no_such_setting"):
        teach(model, [FACT], tokenizer, no_such_setting=1)


def test_the_earlier_name_of_export_lora_warns(model, tmp_path):
    with pytest.warns(FutureWarning, match="export_lora"):
        report = qf_peft.save_as_lora(model, tmp_path, rank=16)
    assert report["rank"] == 16 and qf_peft.check_portable(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"target_modules": ["embed_tokens", "down_proj"]}, "model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_what_a_plain_lora_cannot_hold_is_not_left_out_in_silence(tiny, tmp_path, options, what):
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", **{"target_modules": ["down_proj"], **options}))
    with pytest.raises(ValueError, match=f"more than changes of linear modules .*{what}"):
        qf_peft.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_trainer_that_is_made_joins_no_other_processes():
    code = (
        "import os, torch\nos.environ.update(WORLD_SIZE='2', RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')\n"
        "from qf_peft import *\nfrom peft import get_peft_model\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), QFConfig(layers_to_transform=[7]))\n"
        "QFTrainer(model, processing_class=AutoTokenizer.from_pretrained(TINY_MODEL))\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
