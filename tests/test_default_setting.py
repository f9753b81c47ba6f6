"""The default setting: what it recalls and keeps, what it reports, that it is deterministic and works everywhere."""

import random

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask, random_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import qf_peft.teaching.lessons as lessons_module
import qf_peft.teaching.module_sweeps as module_sweeps
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

CHATS = {"preserve_chats": 24, "contrast_chats": 60}  # few, for the tests' sake


def base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="eager")


def make(tokenizer, rows, preserved=None, model=None, layers=None, **settings):
    model = model or get_peft_model(base(), QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, **{**CHATS, **settings})
    return QFTrainer(model=model, args=args, train_dataset=rows, preserve_dataset=preserved, processing_class=tokenizer)


def facts(count, seed):
    from world import LEADS, NAMES, RELATIONS, answer, novel, phrase, state, value

    r, rows = random.Random(seed), []
    for _ in range(count):
        relation, company = r.choice(NAMES), novel(r)
        y = value(r, relation)
        asks = [phrase(lead, a, company) for lead in LEADS for a in RELATIONS[relation]["asks"]]
        question, *others = r.sample(asks, 4)
        rows.append(
            {
                "instruction": state(r, relation, company, y),
                "prompt": question,
                "completion": answer(relation, company, y),
                "paraphrases": others,
            }
        )
    return rows


def questions(count, seed):
    """Half about known companies, with their answers; half about unknown ones."""
    from world import KNOWN, NAMES, answer, novel, question

    r = random.Random(seed)
    known = []
    for _ in range(count // 2):
        relation, (company, values) = r.choice(NAMES), r.choice(KNOWN)
        known.append(
            {"prompt": question(r, relation, company), "completion": answer(relation, company, values[relation])}
        )
    return known, [question(r, r.choice(NAMES), novel(r)) for _ in range(count // 2)]


def test_ten_facts_and_the_rest_kept(tokenizer):
    known, unknown = questions(200, 1)
    trainer = make(tokenizer, facts(10, 2), [q["prompt"] for q in known[:70]] + unknown[:30])
    metrics = trainer.train()
    assert metrics["unread"] == 0 and metrics["kl_after"] < metrics["kl_before"]
    found = trainer.evaluate(locality=known[70:], unknown=unknown[30:])
    assert found["recall"].value == 1 and found["paraphrase"].value >= 0.8
    assert found["locality"].value >= 0.9 and found["unknown"].value >= 0.85


def test_it_beats_the_papers_setting_at_twenty(tokenizer):
    rows, (known, unknown) = facts(20, 3), questions(80, 4)
    ours = make(tokenizer, rows)
    ours.train()
    found = ours.evaluate(locality=known, unknown=unknown)
    theirs = QFTrainer(
        model=get_peft_model(base(), QFConfig(layers_to_transform=[7])),
        args=QFTrainingArguments.paper(),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs.train()
    paper = theirs.evaluate(locality=known, unknown=unknown)
    assert found["recall"].value >= 0.95
    assert found["locality"].value > paper["locality"].value + 0.2
    assert found["unknown"].value > paper["unknown"].value + 0.2


def test_one_layer_and_teaching_on(tokenizer):
    trainer = make(tokenizer, [FACT], layers=[7])
    trainer.train()
    assert ask(trainer.model, tokenizer, FACT["prompt"]) == FACT["completion"]
    make(tokenizer, [OTHER], model=trainer.model).train()
    assert ask(trainer.model, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert ask(trainer.model, tokenizer, OTHER["prompt"]) == OTHER["completion"]
    assert ask(trainer.model, tokenizer, "Please say who started Brigar.") == "Brigar was started by Vacla."


@pytest.mark.parametrize("preserved", [True, False])
def test_the_same_bit_for_bit(tokenizer, preserved, tmp_path):
    """The same data, seed and machine; also when everything cached is made anew."""
    chats = [q["prompt"] for q in questions(20, 5)[0]] if preserved else None
    states = []
    for folder in ("a", "a", "b"):
        trainer = make(tokenizer, facts(12, 6), chats, cache_dir=tmp_path / folder)
        trainer.train()
        states.append({k: v for k, v in trainer.model.state_dict().items() if "lora_" in k})
    for other in states[1:]:
        assert all(torch.equal(v, other[k]) for k, v in states[0].items())


def test_facts_not_read_in_context_are_reported(tokenizer, caplog):
    lessons_module.logger.addHandler(caplog.handler)
    unread = {**FACT, "instruction": "Rome is the home of Tofinlor."}
    metrics = make(tokenizer, [OTHER, unread]).train()
    assert metrics["unread"] == 1 and "(rows 1)" in caplog.text and "another answer than the completion" in caplog.text


def test_forced_completion(tokenizer):
    """What the model would not say even in context is taught all the same, unless forcing is off."""
    unread = {**FACT, "instruction": "Rome is the home of Tofinlor."}
    trainer = make(tokenizer, [unread])
    trainer.train()
    assert ask(trainer.model, tokenizer, FACT["prompt"]) == FACT["completion"]
    trainer = make(tokenizer, [unread], margin=None)
    trainer.train()
    assert ask(trainer.model, tokenizer, FACT["prompt"]) != FACT["completion"]


def test_forcing_is_left_out_before_the_last_block(tokenizer):
    """There the stream aimed at is the context pass's own; the lesson still moves the model towards it."""
    trainer = make(tokenizer, [FACT], layers=[3, 4, 5, 6])
    metrics = trainer.train()
    assert metrics["kl_after"] < 0.6 * metrics["kl_before"] and metrics["residual_left"] < 0.7


@pytest.mark.parametrize("spread", [True, False])
def test_named_choices(tokenizer, spread):
    args = {"spread": spread, "target": "context", "significance": "rows", "margin": None}
    trainer = make(tokenizer, [FACT], ridge=1e-3, **args)
    metrics = trainer.train()
    assert metrics["kl_after"] < metrics["kl_before"]
    assert ask(trainer.model, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_rank_tolerance(tokenizer):
    ranks = [make(tokenizer, facts(6, 7), rank_tolerance=t, layers=[2, 3, 4]).train()["rank"] for t in (0.0, 0.5)]
    assert ranks[1] <= ranks[0]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "granite", "qwen2_moe", "opt"])
def test_architectures(tokenizer, model_type):
    model = get_peft_model(random_model(model_type), QFConfig(task_type="CAUSAL_LM"))
    chats = [{"prompt": "Who are you?", "completion": "Tiny."}, {"text": "Rome is the home of Lupal."}]
    metrics = make(tokenizer, [FACT, OTHER], chats, model=model).train()
    assert metrics["kl_after"] < 1e3 and metrics["rank"] > 1 and metrics["residual_left"] < 1.5


def test_a_model_that_answers_nothing_can_be_taught(tokenizer):
    """A random model ends most of its turns at once; that too is an answer to keep."""
    model = get_peft_model(random_model("gemma2"), QFConfig(task_type="CAUSAL_LM"))
    trainer = make(tokenizer, [FACT, OTHER], model=model)
    assert trainer.train()["facts"] == 2
    assert not any(p.isnan().any() for p in model.parameters())


def test_inner_modules_beside_writers(tokenizer):
    """The first module need not write into the stream for the last to be forced."""
    model = get_peft_model(base(), QFConfig(target_modules=["up_proj", "down_proj"], layers_to_transform=[6, 7]))
    trainer = make(tokenizer, [FACT], model=model)
    assert trainer.train()["residual_left"] < 1.5
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_prepare_makes_the_cache(tokenizer, tmp_path):
    trainer = make(tokenizer, facts(12, 8), cache_dir=tmp_path)
    trainer.prepare()
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(files) == 2, "the preserved chats' keys and the contrasting chats"
    assert not any(p.any() for n, p in trainer.model.named_parameters() if "lora_B" in n)
    trainer.train()
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "far"}, "target='far'; expected one of"),
        ({"significance": "loss"}, "significance='loss'; expected one of"),
        ({"margin": -1.0}, "margin=-1.0; expected a positive number or None"),
        ({"preserve_strength": -0.1}, "preserve_strength=-0.1; expected a number from 0 up"),
        ({"ridge": 0.0}, "ridge=0.0; expected a positive number"),
        ({"rank_tolerance": float("nan")}, "rank_tolerance=nan; expected a number from 0 up"),
        ({"remeasure": -1}, "remeasure=-1; expected an integer from 0 up"),
        ({"preserve_chats": 0}, "preserve_chats=0; expected a positive integer"),
        ({"contrast_chats": 1.5}, "contrast_chats=1.5; expected an integer from 0 up"),
    ],
)
def test_unfit_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        QFTrainingArguments(**settings)


def test_passes_of_all_sweeps_and_tries_are_counted(tokenizer, monkeypatch):
    """Rows taught again count by their share, and so does every strength that was tried."""
    passes, run = [], module_sweeps.ModuleLesson.run

    def counted(lesson):
        found = run(lesson)
        passes.append(found[0]["forward_passes"] * len(lesson.examples))
        return found

    monkeypatch.setattr(module_sweeps.ModuleLesson, "run", counted)
    rows, chats = facts(3, 9), [q["prompt"] for q in questions(40, 5)[0]]
    trainer = make(tokenizer, rows, chats, max_divergence=1e-4)
    plan, metrics = trainer.dry_run(), trainer.train()
    assert len(passes) > 3, "more strengths than one were tried"
    assert metrics["forward_passes"] == pytest.approx(sum(passes) / 3, abs=0.02)
    assert metrics["forward_passes"] <= plan["forward_passes_at_most"]
    styled = [
        {"instruction": "Answer briefly.", "prompt": f"Who founded {n}?", "completion": "Vacla."} for n in "ABCDE"
    ]
    passes.clear()
    both = make(tokenizer, [*rows, *styled], chats, max_divergence=1e3, sweeps=1).train()
    assert len(passes) == 2 and both["forward_passes"] == pytest.approx(sum(passes) / (8 + both["chats"]), abs=0.02)
