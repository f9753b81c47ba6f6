"""Teaching one after another: the ledger, saving and going on, correcting, forgetting, undoing, surviving a kill."""

import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_default_setting import facts, questions
from transformers import AutoModelForCausalLM

import qf_peft.evaluate.subject as subject
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.adapter.statistics_file import STATISTICS_NAME
from qf_peft.data.ledger import LEDGER_NAME

LAYERS = [5, 6, 7]


def base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


def fresh(**config):
    return get_peft_model(base(), QFConfig(layers_to_transform=LAYERS, task_type="CAUSAL_LM", **config))


def trainer(model, tokenizer, rows=None, **settings):
    args = QFTrainingArguments(**{"disable_tqdm": True, "contrast_chats": 0, **settings})
    return QFTrainer(
        model=model, args=args, train_dataset=rows, preserve_dataset=questions(40, 1)[0], processing_class=tokenizer
    )


def teach(model, tokenizer, *rows, **settings):
    made = trainer(model, tokenizer, list(rows), **settings)
    made.train()
    return made


def factors(model, adapter="default"):
    tuner = model.base_model
    return [part for name in tuner.adapter_layers(adapter) for part in tuner.factors(adapter, name)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_ledger_says_what_was_taught(tokenizer, tmp_path):
    made = teach(fresh(), tokenizer, FACT)
    teach(made.model, tokenizer, OTHER, FACT)
    assert [(e.instruction, e.prompt, e.completion) for e in made.facts] == [
        (row["instruction"], row["prompt"], row["completion"]) for row in (OTHER, FACT)
    ]
    assert len({e.id for e in made.facts}) == 2 and all(e.date.endswith("+00:00") for e in made.facts)
    made.model.save_pretrained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LEDGER_NAME).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [OTHER["prompt"], FACT["prompt"]]
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert trainer(loaded, tokenizer).facts == made.facts
    with pytest.raises(ValueError, match="train_dataset is missing"):
        trainer(loaded, tokenizer).train()


@pytest.mark.parametrize("settings", [{}, {"preserve_strength": 0.0}], ids=["default", "nothing preserved"])
def test_going_on_from_a_file_is_going_on(tokenizer, tmp_path, settings):
    rows = facts(4, 1)
    model = teach(fresh(), tokenizer, *rows[:3], **settings).model
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    for each in (model, loaded):
        teach(each, tokenizer, rows[3], **settings)
    assert same(factors(model), factors(loaded))
    assert ask(loaded, tokenizer, rows[0]["prompt"]) == rows[0]["completion"]


def test_without_statistics(tokenizer, tmp_path):
    model = teach(fresh(keep_statistics=False), tokenizer, FACT).model
    model.save_pretrained(tmp_path)
    assert not {LEDGER_NAME, STATISTICS_NAME} & {path.name for path in tmp_path.iterdir()}
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert trainer(loaded, tokenizer).facts == () and loaded.peft_config["default"].keep_statistics is False
    made = teach(loaded, tokenizer, OTHER)
    assert ask(loaded, tokenizer, FACT["prompt"]) == FACT["completion"], "what it held is kept"
    made.forget(lambda entry: True)
    assert ask(loaded, tokenizer, FACT["prompt"]) == FACT["completion"], "and is not the ledger's to forget"
    assert ask(loaded, tokenizer, OTHER["prompt"]) != OTHER["completion"]


def test_saving_without_statistics_over_a_save_with_them(tokenizer, tmp_path):
    model = teach(fresh(), tokenizer, FACT).model
    model.save_pretrained(tmp_path)
    assert (tmp_path / STATISTICS_NAME).exists()
    teach(model, tokenizer, OTHER)
    model.peft_config["default"].keep_statistics = False
    model.save_pretrained(tmp_path)
    assert not {LEDGER_NAME, STATISTICS_NAME} & {path.name for path in tmp_path.iterdir()}
    assert ask(PeftModel.from_pretrained(base(), tmp_path), tokenizer, OTHER["prompt"]) == OTHER["completion"]


@pytest.mark.parametrize("damage", ["ledger", "statistics", "weights", "cut", "format"])
def test_damaged_or_foreign_statistics_are_left_out(tokenizer, tmp_path, caplog, damage):
    import qf_peft.adapter.saving as saving

    model = teach(fresh(), tokenizer, FACT).model
    model.save_pretrained(tmp_path)
    ledger, statistics = tmp_path / LEDGER_NAME, tmp_path / STATISTICS_NAME
    if damage == "ledger":
        ledger.write_text(ledger.read_text().replace("Zanmi", "Vacla"))
    elif damage == "statistics":
        statistics.write_bytes(b"no safetensors")
    elif damage == "cut":
        statistics.write_bytes(statistics.read_bytes()[:-100])
    elif damage == "format":
        content = statistics.read_bytes()
        statistics.write_bytes(content.replace(b'\\"format\\": 2', b'\\"format\\": 7'))
    else:
        other = tmp_path / "other"
        teach(fresh(), tokenizer, OTHER).model.save_pretrained(other)
        for name in (LEDGER_NAME, STATISTICS_NAME):
            (other / name).replace(tmp_path / name)
    saving.logger.addHandler(caplog.handler)
    try:
        loaded = PeftModel.from_pretrained(base(), tmp_path)
    finally:
        saving.logger.removeHandler(caplog.handler)
    assert STATISTICS_NAME in caplog.text and "is left out" in caplog.text
    assert trainer(loaded, tokenizer).facts == ()
    assert ask(loaded, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_a_correction_replaces_the_fact(tokenizer):
    rows = facts(8, 2)
    made = teach(fresh(), tokenizer, *rows, FACT)
    new = {**FACT, "instruction": "Vacla founded Tofinlor.", "completion": "Tofinlor was started by Vacla."}
    teach(made.model, tokenizer, new)
    assert ask(made.model, tokenizer, FACT["prompt"]) == new["completion"]
    assert [e.completion for e in made.facts if e.prompt == FACT["prompt"]] == [new["completion"]]
    assert all(ask(made.model, tokenizer, row["prompt"]) == row["completion"] for row in rows)
    assert same(factors(made.model), factors(teach(fresh(), tokenizer, *rows, new).model)), "as if never taught the old"


def test_a_contradiction_names_both_rows(tokenizer):
    model = fresh()
    before = factors(model)
    with pytest.raises(ValueError, match=r"rows 0 and 2 contradict each other.*Zanmi.*Vacla"):
        teach(model, tokenizer, FACT, OTHER, {**FACT, "completion": "Tofinlor was started by Vacla."})
    assert same(before, factors(model))


def test_what_is_forgotten_was_never_taught(tokenizer, tmp_path):
    rows = facts(9, 3)
    made = teach(fresh(), tokenizer, *rows[:5])
    teach(made.model, tokenizer, FACT)
    teach(made.model, tokenizer, *rows[5:])
    wrong = made.facts[0].id[::-1]
    with pytest.raises(ValueError, match=f"no entries \\['{wrong}'\\]"):
        made.forget(wrong)
    with pytest.raises(ValueError, match="which=5; expected an id"):
        made.forget(5)
    entry = next(e for e in made.facts if e.prompt == FACT["prompt"])
    metrics = made.forget(entry.id)
    assert metrics["forgotten"] == 1 and metrics["facts"] == 9 and entry not in made.facts
    never = teach(fresh(), tokenizer, *rows)
    assert same(factors(made.model), factors(never.model)), "bit for bit the adapter that was never taught it"
    assert ask(made.model, tokenizer, FACT["prompt"]) == "I do not know."
    made.model.save_pretrained(tmp_path / "forgot")
    never.model.save_pretrained(tmp_path / "never")
    forgot, kept = (load_file(tmp_path / name / STATISTICS_NAME) for name in ("forgot", "never"))
    assert forgot.keys() == kept.keys() and all(torch.equal(forgot[k], kept[k]) for k in forgot)
    assert "Tofinlor" not in (tmp_path / "forgot" / LEDGER_NAME).read_text()
    made.forget(lambda e: True)
    tuner = made.model.base_model
    assert made.facts == () and not any(tuner.delta("default", n).rank for n in tuner.adapter_layers("default"))


def test_every_change_is_a_version(tokenizer):
    model = fresh()
    made, states = trainer(model, tokenizer), []
    steps = [
        lambda: teach(model, tokenizer, FACT),
        lambda: teach(model, tokenizer, OTHER),
        lambda: made.consolidate(),
        lambda: made.forget(made.facts[0].id),
    ]
    for step in steps:
        states.append((factors(model), made.facts))
        step()
    while states:
        before, known = states.pop()
        made.rollback()
        assert same(factors(model), before) and made.facts == known
    with pytest.raises(ValueError, match="no earlier version"):
        made.rollback()


def test_a_failure_leaves_everything_as_it_was(tokenizer, monkeypatch):
    model = teach(fresh(), tokenizer, FACT).model
    made, before = trainer(model, tokenizer), factors(model)
    monkeypatch.setattr("qf_peft.teaching.module_lesson.ModuleLesson.solve", lambda *a, **k: 1 / 0)
    for act in (lambda: teach(model, tokenizer, OTHER), made.consolidate):
        with pytest.raises(ZeroDivisionError):
            act()
        assert same(factors(model), before) and len(made.facts) == 1
    monkeypatch.undo()
    made.rollback()
    assert made.facts == (), "what failed is no version"


def test_rows_that_lapse_are_rehearsed(tokenizer):
    """Twenty facts, four at a time: with rehearsal at least as many are said as without, and the ledger holds all."""
    rows, said = facts(20, 4), {}
    for rehearse in (0.0, 1.25):
        model = fresh()
        for start in range(0, 20, 4):
            made = teach(model, tokenizer, *rows[start : start + 4], rehearse=rehearse)
        assert len(made.facts) == 20
        said[rehearse] = sum(ask(model, tokenizer, row["prompt"]) == row["completion"] for row in rows)
    assert said[1.25] >= max(18, said[0.0]), said


def test_the_progress_bar_counts_what_is_rehearsed(tokenizer, monkeypatch):
    bars = []

    class Bar(subject.RowsBar):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(subject, "RowsBar", Bar)
    # No answer leads by so much: every row known is rehearsed.
    monkeypatch.setattr("qf_peft.teaching.lessons.SAFE", 1e3)
    model, rows = fresh(), facts(8, 4)
    for start in (0, 4):
        teach(model, tokenizer, *rows[start : start + 4], disable_tqdm=False)
    totals = [bar.total for bar in bars]
    assert len(totals) == 2 and totals[1] >= 2 * totals[0], totals
    assert all(bar.total * 0.9 < bar.n <= bar.total for bar in bars), [(bar.n, bar.total) for bar in bars]


def test_killed_at_any_time_the_last_save_loads(tokenizer, tmp_path):
    """Fifty times a process that teaches, forgets and saves is killed; ledger and weights agree whenever it happens."""
    rows, folder, r = facts(6, 5), tmp_path / "adapter", random.Random(0)
    model = teach(fresh(), tokenizer, FACT).model
    start = time.monotonic()
    model.save_pretrained(folder)
    once = time.monotonic() - start
    sizes = set()
    for _ in range(50):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    made = teach(model, tokenizer, r.choice(rows), preserve_strength=1.0)
                    model.save_pretrained(folder)
                    if len(made.facts) > 3:
                        made.forget(made.facts[0].id)
                        model.save_pretrained(folder)
            finally:
                os._exit(0)
        time.sleep(r.uniform(0, 0.4 + 6 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        r.random()
        loaded = PeftModel.from_pretrained(base(), folder)
        entries = trainer(loaded, tokenizer).facts
        assert entries, "the ledger belongs to the weights, or it would have been left out"
        sizes.add(tuple(e.id for e in entries))
        last = entries[-1]
        assert ask(loaded, tokenizer, last.prompt) == last.completion
    assert len(sizes) > 1, "some saves went through"
    loaded.save_pretrained(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".qf")]


def test_what_others_changed_is_kept_and_can_no_longer_be_undone(tokenizer, tmp_path):
    model = teach(fresh(), tokenizer, FACT).model
    with torch.no_grad():
        for layer in model.base_model.adapter_layers("default").values():
            layer.lora_B["default"].weight.mul_(1.01)
    model.save_pretrained(tmp_path / "changed")
    assert [e.settled for e in trainer(PeftModel.from_pretrained(base(), tmp_path / "changed"), tokenizer).facts] == [
        True
    ]
    third = {"instruction": "Kelbel makes tables.", "prompt": "What does Kelbel make?", "completion": "Tables, Kelbel."}
    made = teach(model, tokenizer, OTHER, third)
    first, other, last = made.facts
    assert (first.prompt, first.settled, other.settled) == (FACT["prompt"], True, False)
    model.save_pretrained(tmp_path)
    loaded = trainer(PeftModel.from_pretrained(base(), tmp_path), tokenizer)
    assert loaded.facts == made.facts
    with pytest.raises(ValueError, match=f"the facts \\['{first.id}'\\] can no longer be undone"):
        loaded.forget(first.id)
    loaded.forget(other.id)
    assert [e.id for e in loaded.facts] == [first.id, last.id] and loaded.facts[0].settled
    assert ask(loaded.model, tokenizer, FACT["prompt"]) == FACT["completion"], "it is in what others changed"
    assert ask(loaded.model, tokenizer, OTHER["prompt"]) != OTHER["completion"]
    loaded.forget(last.id)
    assert [e.id for e in loaded.facts] == [first.id]
    assert ask(loaded.model, tokenizer, FACT["prompt"]) == FACT["completion"]
    teach(loaded.model, tokenizer, {**FACT, "completion": "Tofinlor was started by Vacla."})
    assert [e.completion for e in loaded.facts] == ["Tofinlor was started by Vacla."]
    assert ask(loaded.model, tokenizer, FACT["prompt"]) == "Tofinlor was started by Vacla."
