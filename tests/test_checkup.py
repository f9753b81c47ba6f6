"""What is said of each fact, and of other questions, at a glance."""

import pytest
import torch
from conftest import FACT, OTHER

from qf_peft import Session
from qf_peft.evaluate.checkup import Other

KNOWN, TALK = "Please say who started Brigar.", "What is your name?"


@pytest.fixture(scope="module")
def session():
    session = Session.tiny()
    session.teach([FACT, OTHER])
    return session


def test_every_fact_has_its_state(session, monkeypatch):
    found = session.checkup([KNOWN, TALK])
    assert [(f.entry.prompt, f.state) for f in found.facts] == [(FACT["prompt"], "said"), (OTHER["prompt"], "said")]
    assert found.facts[0].answer == FACT["completion"]
    assert [(o.prompt, o.now, o.kept) for o in found.others] == [(q, session.ask(q), True) for q in (KNOWN, TALK)]
    assert [o.before for o in found.others] == [session.ask(q, adapter=False) for q in (KNOWN, TALK)]
    tuner, name = session.model.base_model, session.trainer.adapter_name
    kept = tuner.version(name)
    tuner.clear(name)
    gone = session.checkup()
    tuner.restore(name, kept)
    assert [fact.state for fact in gone.facts] == ["not said"] * 2 and gone.others == ()


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("Tofinlor was started by Zanmi", "said"),
        ("It was Zanmi who founded it, and so on.", "in other words"),
        ("It was Zanmira.", "not said"),
        ("I do not know.", "not said"),
    ],
)
def test_in_other_words(session, monkeypatch, answer, state):
    import qf_peft.evaluate.metrics as metrics

    monkeypatch.setattr(metrics, "generate", lambda model, tokenizer, prompts, **_: [(answer, True)] * len(prompts))
    assert session.checkup().facts[0].state == state


@pytest.mark.parametrize(
    ("before", "now", "overlap"),
    [
        ("Rome is the capital.", "rome is the capital", 1),
        ("Rome is the capital.", "The capital is Oslo", 0.75),
        ("no no no", "no", 0.5),
        ("Rome", "Oslo", 0),
        ("", "", 1),
        ("?", "!", 1),
    ],
)
def test_words_in_common(before, now, overlap):
    assert Other("x", before, now).overlap == overlap


def test_other_questions_are_answered_briefly(session, monkeypatch):
    import qf_peft.evaluate.metrics as metrics

    most = []

    def generate(model, tokenizer, prompts, *, max_new_tokens, **_):
        most.append(max_new_tokens)
        return [("x", True)] * len(prompts)

    monkeypatch.setattr(metrics, "generate", generate)
    session.checkup([KNOWN])
    assert most == [session.args.max_new_tokens, 32, 32] and most[0] > 32


def test_the_divergence_is_remembered(tmp_path):
    session = Session.tiny()
    assert session.checkup().divergence is None
    first = session.teach([FACT])["kl_preserved"]
    second = session.teach([OTHER])["kl_preserved"]
    assert first >= 0 and session.checkup().divergence == second != first
    again = Session.open(adapter=session.save(tmp_path), args=session.args)
    assert again.checkup().divergence == second
    session.undo()
    assert session.checkup().divergence == first
    session.forget(lambda entry: True)
    assert session.checkup().divergence is None


def test_nothing_asked_of_nothing(session):
    with pytest.raises(ValueError, match="expected a prompt"):
        session.checkup([""])
    rng = torch.get_rng_state()
    session.checkup([KNOWN])
    assert torch.equal(torch.get_rng_state(), rng), "asking is greedy"
