"""Lessons of more tokens than attention's projections hold: the MLPs' are taken in, and let go of by going back."""

import pytest
import torch
from conftest import FACT, OTHER, TINY
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qf_peft.teaching.lessons as lessons_module
from qf_peft import PreservedStatistics, QFConfig, QFTrainer, QFTrainingArguments, Session

CHATS = [f"{question} {name}?" for name in ("Ranixmo", "Lupal", "Zanko", "Brigar", "Velmo") for question in (
    "Who founded", "Tell me who leads", "Where is the home of", "Please say who started")]  # fmt: skip
THIRD = {
    "instruction": "Nixri runs Tofinlor.", "prompt": "Who runs Tofinlor?", "completion": "Tofinlor is led by Nixri.",
}  # fmt: skip


@pytest.fixture(autouse=True)
def joint(monkeypatch):
    """The tiny model is taught as pretrained ones are, and is crowded by two facts, but not by one."""
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    monkeypatch.setattr("qf_peft.adapter.target_modules.grows_with_depth", lambda network: True)
    columns = 4 * AutoModelForCausalLM.from_pretrained(TINY).config.hidden_size
    monkeypatch.setattr("qf_peft.teaching.lessons.CROWDED", 5 * 30 / columns)


def base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def make(tokenizer, tmp_path):
    def trainer(*rows, model=None, preserved=CHATS, **config):
        model = model or get_peft_model(base(), QFConfig(task_type="CAUSAL_LM", **config))
        args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path / "cache")
        return QFTrainer(model, args, list(rows) or None, preserved, tokenizer)

    return trainer


def written(trainer):
    """The kinds of modules that hold something, and those that the adapter has."""
    layers = trainer.tuner.adapter_layers("default")
    kinds = [
        {name.rsplit(".", 1)[1] for name, layer in layers.items() if whole or layer.lora_B["default"].weight.any()}
        for whole in (False, True)
    ]
    return kinds


def changes(trainer):
    return {n: trainer.tuner.delta("default", n).dense() for n in trainer.tuner.adapter_layers("default")}


def test_many_tokens_take_in_the_mlps(make, tokenizer, tmp_path):
    few = make(FACT)
    few.train()
    assert written(few) == [{"o_proj"}, {"o_proj"}]
    many = make(FACT, OTHER, THIRD)
    plan = many.dry_run()["modules"]
    assert {name.rsplit(".", 1)[1] for name in plan} == {"o_proj", "down_proj"} and written(many)[1] == {"o_proj"}
    many.train()
    assert written(many) == [{"o_proj", "down_proj"}] * 2
    assert {name for name, change in changes(many).items() if change.any()} <= set(plan)
    many.model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(base(), tmp_path / "saved")
    ids = tokenizer(FACT["prompt"], return_tensors="pt")
    assert torch.equal(again(**ids).logits, many.model(**ids).logits)
    both = make(FACT, OTHER, THIRD, target_modules=["o_proj", "down_proj"])
    both.train()
    named = changes(both)
    assert all(torch.equal(change, named[name]) for name, change in changes(many).items()), "as if named from the first"


def test_going_back_and_forgetting(make):
    trainer = make(FACT, OTHER, THIRD)
    trainer.train()
    trainer.rollback()
    assert written(trainer) == [set(), {"o_proj", "down_proj"}] and trainer.facts == ()
    trainer.train()
    kept = [entry.id for entry in trainer.facts if entry.prompt != FACT["prompt"]]
    trainer.forget(kept)
    assert written(trainer)[0] == {"o_proj"} and [entry.prompt for entry in trainer.facts] == [FACT["prompt"]]
    alone = make(FACT)
    alone.train()
    ours = changes(trainer)
    assert all(torch.equal(change, ours[name]) for name, change in changes(alone).items())


def test_forgetting_after_loading(make, tmp_path):
    trainer = make(FACT, OTHER, THIRD)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded = make(model=PeftModel.from_pretrained(base(), tmp_path / "saved"))
    for each in (trainer, loaded):
        each.forget([entry.id for entry in each.facts if entry.prompt != FACT["prompt"]])
    ours = changes(trainer)
    assert written(loaded) == [{"o_proj"}, {"o_proj", "down_proj"}] == written(trainer)
    assert all(torch.equal(change, ours[name]) for name, change in changes(loaded).items())


def test_what_was_taught_before_stays_where_it_is(make):
    trainer = make(FACT)
    trainer.train()
    more = make(OTHER, THIRD, {**FACT, "prompt": "Who started Tofinlor?"}, model=trainer.model)
    more.train()
    assert written(more) == [{"o_proj"}, {"o_proj"}]


def test_a_failed_lesson_leaves_nothing(make, monkeypatch):
    def fail(*_):
        raise RuntimeError("no more memory")

    trainer = make(FACT, OTHER, THIRD)
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.JointLesson._finish", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.train()
    assert written(trainer)[0] == set()


def test_modules_named_by_the_user_and_statistics_without_the_mlps(make, tmp_path):
    named = make(FACT, OTHER, THIRD, target_modules=["o_proj"])
    named.train()
    assert written(named)[1] == {"o_proj"}
    both = make(FACT, target_modules=["o_proj", "down_proj"])
    both.train()
    assert written(both) == [{"o_proj", "down_proj"}] * 2, "however few the rows, what was named is written into"
    make(FACT).prepare().save_pretrained(tmp_path / "few")
    given = make(FACT, OTHER, THIRD, preserved=PreservedStatistics.from_pretrained(tmp_path / "few"))
    given.train()
    assert written(given)[1] == {"o_proj"}
    few = PreservedStatistics.from_pretrained(tmp_path / "few")
    for modules in ["o_proj", "down_proj"], ["down_proj"]:
        with pytest.raises(ValueError, match=r"hold nothing of the module .*down_proj; prepare"):
            make(FACT, preserved=few, target_modules=modules).train()
    make(FACT, OTHER, THIRD).prepare().save_pretrained(tmp_path / "many")
    given = make(FACT, OTHER, THIRD, preserved=PreservedStatistics.from_pretrained(tmp_path / "many"))
    given.train()
    assert written(given)[1] == {"o_proj", "down_proj"}


def test_too_little_memory(make, monkeypatch, caplog):
    class Full:
        available = 1e6

    monkeypatch.setattr(lessons_module.psutil, "virtual_memory", Full)
    lessons_module.logger.addHandler(caplog.handler)
    trainer = make(FACT, OTHER, THIRD)
    try:
        trainer.train()
    finally:
        lessons_module.logger.removeHandler(caplog.handler)
    assert written(trainer)[1] == {"o_proj"} and "the MLPs' are left as they are: what must stay" in caplog.text


def test_answers_after_a_crowded_lesson(make, tokenizer):
    trainer = make(FACT, OTHER, THIRD)
    trainer.train()
    session = Session(trainer.model, tokenizer)
    assert session.ask(OTHER["prompt"]) == OTHER["completion"]
