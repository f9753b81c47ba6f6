"""Which taught facts acted on an answer."""

import json

import pytest
import torch
from peft import get_peft_model
from test_default_setting import facts

from qf_peft import Attribution, QFConfig, QFTrainer, QFTrainingArguments, Session
from qf_peft.data.rows import Row

UNTAUGHT = [
    "Please say who started Brigar.",
    "Where is Brigar based?",
    "What is your name?",
    "Tell me what Brigar makes.",
]


@pytest.fixture(scope="module")
def taught():
    session = Session.tiny()
    rows = facts(12, 0)
    session.teach(rows)
    return session, rows


def test_the_asked_fact_comes_first(taught):
    session, rows = taught
    found = Attribution(session.trainer).explain([row["prompt"] for row in rows])
    assert [e.influences[0].entry.prompt for e in found] == [row["prompt"] for row in rows]
    assert all(e.answer == session.ask(e.prompt) for e in found)
    for explanation in found:
        assert explanation.acting[0].entry.prompt == explanation.prompt
        shares = [influence.share for influence in explanation.influences]
        assert shares == sorted(shares, reverse=True) and len(shares) == len(rows)
        assert explanation.influences[0].share > 0.5 > 5 * sum(shares[1:]), "and it nearly alone"
        assert sum(shares) <= explanation.strength + 1e-6 <= 1 + 2e-6


def test_other_answers_are_no_facts(taught):
    session, _ = taught
    for explanation in Attribution(session.trainer).explain(UNTAUGHT):
        total = sum(influence.share for influence in explanation.influences)
        assert total < 0.3, (explanation.prompt, explanation.answer, total)


def test_the_formula(tiny, tokenizer):
    """On one module, with the dense change and plain forward passes."""
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    rows = facts(3, 4)
    trainer = QFTrainer(model, QFTrainingArguments.paper(), rows, processing_class=tokenizer)
    trainer.train()
    question = rows[1]["paraphrases"][0]
    (found,) = Attribution(trainer).explain([question])
    ((name, layer),) = model.base_model.adapter_layers("default").items()
    change = layer.get_delta_weight("default").detach()

    def run(ids, count):
        """The module's inputs and the said tokens' probabilities at the last steps."""
        keys = []
        handle = model.base_model.model.get_submodule(name).register_forward_hook(
            lambda _, args, __: keys.append(args[0])
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -count:]
        handle.remove()
        said = logits.softmax(-1).gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]
        return keys[0][0, -count:].double(), said.double()

    encoder = trainer.encoder
    taught = [encoder.encode(entry.row()) for entry in trainer.facts]
    writes = [run(e.bare_ids, e.taught)[0] @ change.double().T for e in taught]
    of = torch.tensor([k for k, write in enumerate(writes) for _ in write])
    writes = torch.cat(writes)
    strongest = torch.stack([writes[of == k].norm(dim=1).max() for k in range(3)]).median()
    kept = writes.norm(dim=1) >= 0.1 * strongest
    writes, of = writes[kept], of[kept]
    ids, count = encoder.answer_ids(Row(0, "", question, found.answer), True)
    keys, now = run(ids, count)
    with model.disable_adapter():
        _, before = run(ids, count)
    gain = (1 - before / now).clamp(min=0)
    written = keys @ change.double().T
    ridge = 1e-3 * writes.square().sum(1).mean()
    there = torch.linalg.inv(writes @ writes.T + ridge * torch.eye(len(writes))) @ writes @ written.T
    part = there.abs().clamp(max=1) * there * (writes @ written.T) / written.square().sum(1)
    shares = [float((part[of == k].sum(0) * gain).sum() / gain.sum() * gain.max()) for k in range(3)]
    order = {entry.id: share for entry, share in zip(trainer.facts, shares, strict=True)}
    assert found.strength == pytest.approx(float(gain.max()), abs=1e-4)
    for influence in found.influences:
        assert influence.share == pytest.approx(order[influence.entry.id], abs=1e-3)
    assert found.influences[0].entry.prompt == rows[1]["prompt"]


def test_forgotten_and_nothing(taught, tmp_path):
    session = Session.tiny()
    with pytest.raises(ValueError, match="ledger is empty"):
        session.explain("Who founded Tofinlor?")
    other, rows = taught
    again = Session.open(adapter=other.save(tmp_path / "kept"), args=other.args)
    question = rows[3]["prompt"]
    assert again.explain(question).influences[0].entry.prompt == question
    again.forget(again.facts[3].id)
    assert question not in [i.entry.prompt for i in again.explain(question).influences]
    with pytest.raises(ValueError, match="prompt is empty"):
        again.explain(" ")


def test_a_zero_adapter_did_nothing(taught):
    session, rows = taught
    model, name = session.model.base_model, session.trainer.adapter_name
    kept = model.version(name)
    model.clear(name)
    try:
        explanation = session.explain(rows[0]["prompt"])
    finally:
        model.restore(name, kept)
    assert explanation.strength == 0 and not explanation.acting
    assert "no taught fact acted" in str(explanation)


def test_in_the_report(taught, tmp_path):
    session, rows = taught
    question = f"{rows[0]['prompt']} Please."
    path = tmp_path / "report.html"
    session.trainer.report(path, locality=[{"prompt": rows[0]["prompt"]}, UNTAUGHT[0], question])
    page = path.read_text()
    assert "Taught facts that acted on it" in page
    assert session.explain(rows[0]["prompt"]).acting[0].entry.id
    row = next(line for line in page.splitlines() if "✗ not kept" in line and rows[0]["prompt"] in line)
    share = row.rpartition("<td>")[2]
    assert rows[0]["prompt"] in share and float(share.split()[0]) > 0.5


def test_from_the_shell(taught, tmp_path):
    from typer.testing import CliRunner

    from qf_peft.app.cli import app

    session, rows = taught
    folder = session.save(tmp_path / "taught")
    run = CliRunner().invoke(app, ["explain", rows[1]["prompt"], "--adapter", str(folder), "--tiny", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["answer"] == rows[1]["completion"] and found["facts"][0]["prompt"] == rows[1]["prompt"]
    assert found["facts"][0]["id"] == session.facts[1].id and found["strength"] > 0.9
    run = CliRunner().invoke(app, ["explain", "x", "--adapter", str(tmp_path / "nowhere"), "--tiny"])
    assert run.exit_code == 1 and "no adapter" in run.stderr
