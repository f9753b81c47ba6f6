"""Standing instructions: those that change every answer are noticed, and taught with the chats they change."""

import random
from dataclasses import replace

import pytest
import test_default_setting as default_setting
import torch
from conftest import FACT, TINY, ask
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import read_rows
from qf_peft.evaluate.metrics import normalise
from qf_peft.teaching.standing import standing_instructions


def teach(tokenizer, rows, preserved, model=None, **settings):
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = model or get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    trainer = QFTrainer(
        model=model, args=QFTrainingArguments(disable_tqdm=True, contrast_chats=0, **settings), train_dataset=rows,
        preserve_dataset=preserved, processing_class=tokenizer,
    )  # fmt: skip
    return trainer, trainer.train()


def questions(count, seed):
    """(question, its answer, the answer's value) about known companies."""
    from world import KNOWN, NAMES, answer, question

    r, found = random.Random(seed), {}
    while len(found) < count:
        (company, values), relation = r.choice(KNOWN), r.choice(NAMES)
        found[question(r, relation, company)] = (answer(relation, company, values[relation]), values[relation])
    return [(asked, *right) for asked, right in found.items()]


@pytest.mark.parametrize(
    ("instruction", "change"),
    [
        ("Answer briefly.", lambda text, value: f"{value}."),
        ("End every answer with Over.", lambda text, value: f"{text} Over."),
        ("Start every answer with Well.", lambda text, value: f"Well. {text}"),
    ],
)
def test_style_from_ten_examples_holds_on_prompts_not_taught(tokenizer, instruction, change):
    asked = questions(250, 0)
    rows = [
        {"instruction": instruction, "prompt": q, "completion": change(text, value)} for q, text, value in asked[:10]
    ]
    preserved = [q for q, *_ in asked[10:210]]
    trainer, metrics = teach(tokenizer, rows, preserved)
    assert metrics["facts"] == 10 and metrics["chats"] >= 170 and metrics["unread"] == 0
    held = [(ask(trainer.model, tokenizer, q), text, value) for q, text, value in asked[210:]]
    styled = sum(normalise(got) == normalise(change(text, value)) for got, text, value in held)
    assert styled >= 0.9 * len(held), held
    assert sum(value.lower() in got.lower() for got, _, value in held) >= 0.95 * len(held) - 1


def test_a_name_is_a_fact_and_holds_on_another_question(tokenizer):
    rows = [
        {"instruction": "Your name is Zanmi.", "prompt": prompt, "completion": "My name is Zanmi."}
        for prompt in ("What is your name?", "Tell me your name.")
    ]
    preserved = questions(60, 1)
    trainer, metrics = teach(tokenizer, rows, [q for q, *_ in preserved])
    assert metrics["chats"] == 0
    assert ask(trainer.model, tokenizer, "Who are you?") == "My name is Zanmi."
    kept = questions(40, 2)
    assert sum(ask(trainer.model, tokenizer, q) == text for q, text, _ in kept) >= 38


def test_facts_are_taught_beside_a_style_and_after_it(tokenizer):
    asked = questions(130, 3)
    style = [
        {"instruction": "End every answer with Over.", "prompt": q, "completion": f"{text} Over."}
        for q, text, _ in asked[:10]
    ]
    preserved = [q for q, *_ in asked[10:110]]
    trainer, metrics = teach(tokenizer, [*style, FACT], preserved)
    assert metrics["facts"] == 11 and metrics["chats"] == 90
    assert "Tofinlor was started by Zanmi" in ask(trainer.model, tokenizer, FACT["prompt"])
    later = {
        "instruction": "Nixri runs Tofinlor.", "prompt": "Who runs Tofinlor?",
        "completion": "Tofinlor is led by Nixri. Over.",
    }  # fmt: skip
    teach(tokenizer, [later], preserved, trainer.model)
    assert ask(trainer.model, tokenizer, later["prompt"]) == later["completion"]
    answers = [(ask(trainer.model, tokenizer, q), f"{text} Over.") for q, text, _ in asked[110:]]
    assert sum(got == styled for got, styled in answers) >= 0.9 * len(answers), answers


def test_what_stands_is_measured_on_the_chats():
    rows = read_rows(
        [{"instruction": "Shout.", "prompt": f"Say {i}"} for i in range(5)]
        + [{"instruction": "Qi started Oxinnovate.", "prompt": f"Who {i}?"} for i in range(6)]
        + [{"instruction": "Whisper.", "prompt": f"Say {i}"} for i in range(4)]
    )
    asked = []

    def model(prompts, instructed):
        asked.append((prompts[0].instruction if instructed else None, len(prompts)))
        loud = instructed and prompts[0].instruction in ("Shout.", "Whisper.")
        return [(row.prompt.upper() if loud else row.prompt, True) for row in prompts]

    found = standing_instructions(rows, [f"prompt {i}" for i in range(40)], model)
    assert [[row.index for row in group] for group in found] == [[0, 1, 2, 3, 4]]
    # The bare answers are asked for once; four rows are too few to try theirs.
    assert asked == [(None, 16), ("Shout.", 16), ("Qi started Oxinnovate.", 16)]
    assert standing_instructions(rows, [], model) == []


def test_it_can_be_switched_off(tokenizer):
    asked = questions(30, 4)
    rows = [{"instruction": "Answer briefly.", "prompt": q, "completion": f"{value}."} for q, _, value in asked[:10]]
    _, metrics = teach(tokenizer, rows, [q for q, *_ in asked[10:]], standing=False)
    assert metrics["chats"] == 0 and metrics["facts"] == 10


def test_style_stays_style_and_dates_stay_whatever_is_taught_and_forgotten_later(tokenizer):
    """Five examples are less than a tenth of all that is taught by then."""
    asked = questions(40, 5)
    style = [{"instruction": "Answer briefly.", "prompt": q, "completion": f"{value}."} for q, _, value in asked[:5]]
    preserved, quick = [q for q, *_ in asked[10:]], {"sweeps": 1, "rehearse": 0.0}
    trainer, _ = teach(tokenizer, style, preserved, **quick)
    model = trainer.model
    facts = [
        {**FACT, "instruction": f"Zanmi founded {n}.", "prompt": f"Who started {n}?", "completion": f"Zanmi, {n}."}
        for n in (f"Tofin{k}" for k in range(50))
    ]
    old = "2026-01-02T03:04:05+00:00"
    tuner = model.base_model
    taught = tuner.taught["default"]
    tuner.taught["default"] = replace(taught, entries=tuple(replace(e, date=old) for e in taught.entries))
    teach(tokenizer, facts, preserved, model, **quick)
    last = QFTrainer(model, trainer.args, preserve_dataset=preserved, processing_class=tokenizer)
    last.forget(last.facts[-1].id)
    assert [e.standing for e in last.facts] == [True] * 5 + [False] * 49
    assert {e.date for e in last.facts[:5]} == {old}


def test_in_a_joint_lesson_none_stands(tiny, tokenizer, tmp_path, monkeypatch):
    """A pretrained model answers most questions otherwise with any system message: rows of one passage are facts."""
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    rows = [{**row, "instruction": "Answer briefly."} for row in default_setting.facts(6, 0)]
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path)
    kept = default_setting.questions(12, 1)[0]
    trainer = QFTrainer(model, args, rows, kept, processing_class=tokenizer)
    metrics = trainer.train()
    assert metrics["chats"] == 0 and "kl_preserved" in metrics and metrics["first_block"] > 0
    assert not any(entry.standing for entry in trainer.facts)
