"""One model taught and asked in turns."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import FACT, OTHER, TINY, random_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qf_peft
from qf_peft import QFConfig, QFTrainingArguments, Session

BEFORE, QUESTION, ANSWER = "I do not know.", FACT["prompt"], FACT["completion"]


@pytest.fixture
def session(tiny, tokenizer):
    """On one block, by the paper's setting: quick."""
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    return Session(model, tokenizer, QFTrainingArguments.paper())


def test_teach_ask_forget_undo(session):
    assert session.ask(QUESTION) == BEFORE
    assert session.ask(QUESTION, instruction=FACT["instruction"]) == ANSWER, "in context"
    assert session.teach(**FACT)["facts"] == 1
    assert session.ask(QUESTION) == ANSWER and session.ask(QUESTION, adapter=False) == BEFORE
    assert session.compare(QUESTION) == (BEFORE, ANSWER)
    session.teach([OTHER])
    assert [e.prompt for e in session.facts] == [FACT["prompt"], OTHER["prompt"]]
    assert session.evaluate(locality=["Please say who started Brigar."])["recall"].value == 1
    session.forget(session.facts[0].id)
    assert session.ask(QUESTION) != ANSWER and session.ask(OTHER["prompt"]) == OTHER["completion"]
    session.undo()
    assert session.ask(QUESTION) == ANSWER and len(session.facts) == 2
    session.undo()
    session.undo()
    assert session.ask(QUESTION) == BEFORE and session.facts == ()
    with pytest.raises(ValueError, match="no earlier version"):
        session.undo()


def test_streaming_is_asking_piece_by_piece(session):
    session.teach(**FACT)
    pieces = list(session.stream(QUESTION))
    assert len(pieces) > 2 and "".join(pieces).strip() == ANSWER == session.ask(QUESTION)
    assert "".join(session.stream(QUESTION, adapter=False)).strip() == BEFORE
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "Please say who started Brigar."}]  # fmt: skip
    assert "".join(session.stream(talk)).strip() == session.ask(talk) != ""
    assert "".join(session.stream(QUESTION, max_new_tokens=3)).strip() in ANSWER[:20]


def test_whoever_stops_reading_stops_the_model(session):
    pieces = session.stream(QUESTION, adapter=False)
    next(pieces)
    pieces.close()
    assert not [t for t in threading.enumerate() if t.name == "qf_peft-stream"]
    session.teach(**FACT)
    assert session.ask(QUESTION) == ANSWER, "the adapter is on again"


def test_an_error_of_the_model_reaches_the_reader(session, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model.get_base_model(), "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.stream(QUESTION))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_teaching_changes_nothing(session, monkeypatch, error):
    session.teach(**FACT)
    before = {name: p.clone() for name, p in session.model.named_parameters() if "lora" in name}

    def broken(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("qf_peft.teaching.lessons.entry", broken)  # the lesson has been installed by then
        with pytest.raises(error):
            session.teach(**OTHER)
    assert all(torch.equal(p, before[name]) for name, p in session.model.named_parameters() if "lora" in name)
    assert len(session.facts) == 1 and session.ask(QUESTION) == ANSWER
    session.teach(**OTHER)
    assert session.ask(OTHER["prompt"]) == OTHER["completion"]


def test_saved_and_opened_again(session, tmp_path):
    session.teach(**FACT)
    assert session.save(tmp_path / "adapter") == tmp_path / "adapter"
    again = Session.open(adapter=tmp_path / "adapter", args=QFTrainingArguments.paper())
    assert again.ask(QUESTION) == ANSWER and again.facts == session.facts
    again.forget(again.facts[0].id)
    assert again.ask(QUESTION) == BEFORE
    named = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY), QFConfig(layers_to_transform=[7]), adapter_name="work"
    )
    other = Session(named, session.tokenizer, QFTrainingArguments.paper())
    other.teach(**FACT)
    folder = other.save(tmp_path / "named")
    assert folder == tmp_path / "named" / "work"
    assert Session.open(adapter=folder).ask(QUESTION) == ANSWER


def test_the_tiny_model_with_settings_fit_for_it():
    session = Session.tiny()
    session.teach([FACT, OTHER])
    assert session.ask("Who founded Tofinlor?") == ANSWER
    assert session.ask("Please say who started Brigar.") == "Brigar was started by Vacla."
    assert session.ask("Who founded Nobodix?") == BEFORE


def test_around_a_plain_model(tokenizer):
    model = random_model("llama", vocab_size=len(tokenizer)).train()
    session = Session(model, tokenizer, QFTrainingArguments(preserve_strength=0, standing=False))
    assert isinstance(session.model, PeftModel) and not session.model.training
    session.teach(**FACT)
    assert session.ask(QUESTION).startswith(ANSWER) and session.ask(QUESTION, adapter=False) != ANSWER


def test_without_a_chat_template(tokenizer):
    plain = type(tokenizer).from_pretrained(TINY)
    plain.chat_template = None
    model = random_model("llama", vocab_size=len(tokenizer))
    session = Session(model, plain, QFTrainingArguments(preserve_strength=0, standing=False))
    session.teach(instruction="Ann runs Ox.", prompt="Who runs Ox?", completion="Ann does.")
    assert session.ask("Who runs Ox?").startswith("Ann does.")
    with pytest.raises(ValueError, match="no chat template"):
        session.ask([{"role": "user", "content": "Who runs Ox?"}])


def test_errors_say_what_to_do(session, tiny, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="prompt is empty"):
        session.ask(" ")
    with pytest.raises(ValueError, match="shorten it"):
        session.ask("word " * 2000)
    with pytest.raises(ValueError, match="not both"):
        session.teach([FACT], prompt="Who?")
    with pytest.raises(ValueError, match="no column 'prompt'"):
        session.teach(instruction="Zanmi founded Tofinlor.")
    with pytest.raises(ValueError, match="nothing has been taught"):
        session.evaluate()
    with pytest.raises(ValueError, match="no entries"):
        session.forget("nothing")
    with pytest.raises(ValueError, match="give a model"):
        Session.open()
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="LORA adapter"):
        Session(lora, tokenizer)
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA adapter; a session teaches QF"):
        Session.open(adapter=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        session.save(tmp_path / "file")
    assert qf_peft.Session is Session
