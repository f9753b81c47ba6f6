"""What a model preserves, saved and given to others: small, of one model only, and as good as the chats themselves."""

import json

import pytest
import torch
from conftest import FACT, OTHER, TINY
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qf_peft import PreservedStatistics, QFConfig, QFTrainer, QFTrainingArguments, Session
from qf_peft.app.cli import app

CHATS = [f"{question} {name}?" for name in ("Ranixmo", "Lupal", "Zanko", "Brigar", "Velmo") for question in (
    "Who founded", "Tell me who leads", "Where is the home of", "Please say who started")]  # fmt: skip
NAME = "qf_preserved.safetensors"


@pytest.fixture(autouse=True)
def joint(monkeypatch):
    """The tiny model is taught as pretrained ones are, whose stream grows with depth."""
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)


@pytest.fixture
def make(tokenizer, tmp_path):
    def trainer(preserved, rows=(FACT, OTHER), model=None, config=None, words=None, **settings):
        base = model or AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path / "cache", **settings)
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM", **(config or {})))
        return QFTrainer(model, args, list(rows) or None, preserved, words or tokenizer)

    return trainer


@pytest.fixture
def saved(make, tmp_path):
    statistics = make(CHATS, rows=()).prepare()
    assert statistics.save_pretrained(tmp_path / "preserved") == tmp_path / "preserved" / NAME
    return tmp_path / "preserved"


def test_a_lesson_beside_the_file_is_the_lesson_beside_the_chats(make, saved):
    with_chats, with_file = make(CHATS), make(PreservedStatistics.from_pretrained(saved))
    one, other = with_chats.train(), with_file.train()
    assert other["kl_preserved"] == pytest.approx(one["kl_preserved"], rel=0.05, abs=1e-4)
    for name in with_chats.tuner.adapter_layers("default"):
        a, b = (t.tuner.delta("default", name).dense() for t in (with_chats, with_file))
        assert torch.linalg.norm(a - b) <= 0.02 * torch.linalg.norm(a)
    assert other["kl_after"] == pytest.approx(one["kl_after"], rel=0.05) and one["kl_after"] < 0.5 * one["kl_before"]


@pytest.mark.parametrize("rank", [8, 10_000])
def test_the_largest_directions_are_kept_and_the_rest_is_bounded(make, tmp_path, rank):
    measured = make(CHATS, rows=()).prepare()
    measured.save_pretrained(tmp_path, rank=rank)
    loaded = PreservedStatistics.from_pretrained(tmp_path)
    assert set(loaded.measured.moments) == set(measured.measured.moments)
    for name, moment in loaded.measured.moments.items():
        whole = measured.measured.moments[name]
        matrix = whole.matrix if whole.matrix is not None else whole.root.T @ whole.root
        found = moment.root.T @ moment.root + moment.ridge * torch.eye(moment.width)
        values = torch.linalg.eigvalsh(matrix.double())
        rest = float(values[-rank - 1]) if rank < moment.width else 0.0
        error = torch.linalg.matrix_norm(found.double() - matrix.double(), 2)
        assert len(moment.root) <= rank and error <= 0.55 * rest + 1e-3 * float(values[-1])


def test_it_is_small_and_holds_nothing_that_was_taught(make, saved):
    trainer = make(PreservedStatistics.from_pretrained(saved))
    trainer.train()
    trainer.prepare().save_pretrained(saved)
    content = (saved / NAME).read_bytes()
    with safe_open(saved / NAME, framework="pt") as file:
        header = json.loads(file.metadata()["qf_preserved"])
    texts = [trainer.encoder.tokenizer.decode(ids) for ids in header["held_out"]]
    assert len(texts) == len(CHATS) // 10 and not any("Tofinlor" in text for text in texts)
    assert b"Tofinlor" not in content and str(TINY).encode() not in content and len(content) < 3e6


def test_in_16_bits_too(make, saved):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16, attn_implementation="eager")
    metrics = make(PreservedStatistics.from_pretrained(saved), model=model).train()
    assert metrics["kl_after"] < 0.5 * metrics["kl_before"] and metrics["kl_preserved"] <= 0.1


def test_another_model_is_refused(make, saved, tokenizer):
    preserved = PreservedStatistics.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1 + torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"statistics are of .*log likelihoods that lie .* nats away: prepare\(\)"):
        make(preserved, model=model).train()
    words = AutoTokenizer.from_pretrained(TINY)
    words.chat_template = words.chat_template.replace("im_end", "end")
    with pytest.raises(ValueError, match="whose tokenizer or chat template is another"):
        make(preserved, words=words).train()
    trainer = make(preserved, config={"target_modules": ["o_proj", "down_proj"]})
    missing = {*trainer.tuner.adapter_layers("default")} - {*preserved.measured.moments}
    if missing:
        with pytest.raises(ValueError, match="hold nothing of the module"):
            trainer.train()
    assert trainer.facts == ()


def test_lessons_module_by_module_need_the_chats(make, saved, monkeypatch):
    preserved = PreservedStatistics.from_pretrained(saved)
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: False)
    with pytest.raises(ValueError, match="preserve_dataset holds statistics, which serve joint lessons alone"):
        make(preserved).train()
    assert make(CHATS).prepare() is None


def damaged(change):
    def apply(file):
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["qf_preserved"])
        change(header, tensors)
        save_file(tensors, file, metadata={"qf_preserved": json.dumps(header)})

    return apply


def first(tensors, kind):
    return min(name for name in tensors if name.startswith(kind))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_text("nothing"),
        lambda file: save_file({"a": torch.zeros(1)}, file),
        damaged(lambda header, tensors: header.update(format=7)),
        damaged(lambda header, tensors: header.pop("answers")),
        damaged(lambda header, tensors: header.update(held_out=[[1, 2]] * len(header["held_out"]))),
        damaged(lambda header, tensors: header["likelihoods"].pop()),
        damaged(lambda header, tensors: tensors.pop(first(tensors, "root"))),
        damaged(lambda header, tensors: tensors[first(tensors, "root")].fill_(float("nan"))),
        damaged(lambda header, tensors: tensors.update({first(tensors, "scale"): torch.ones(2, 2, 2)})),
        damaged(lambda header, tensors: header.update(ridges=[1, 2])),
        damaged(lambda header, tensors: header.update(tokenizer=7)),
    ],
)
def test_damaged_files(saved, damage):
    damage(saved / NAME)
    with pytest.raises(ValueError, match=f"{NAME} does not hold preserved statistics: .*; make the file anew"):
        PreservedStatistics.from_pretrained(saved)


def test_wrong_places(make, saved, tmp_path):
    statistics = PreservedStatistics.from_pretrained(saved)
    with pytest.raises(OSError, match=NAME):
        PreservedStatistics.from_pretrained(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="nothing: it is neither a folder nor an id on the Hub"):
        PreservedStatistics.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        statistics.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="rank=0; expected a positive integer"):
        statistics.save_pretrained(tmp_path / "new", rank=0)
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "mine"


def test_the_command_line(tmp_path, monkeypatch):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in CHATS))
    run, folder = CliRunner().invoke, tmp_path / "preserved"
    given = ["--tiny", "--set", f"cache_dir={tmp_path}"]
    done = run(app, ["prepare", *given, "--preserve", str(chats), "-o", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output"] == str(folder / NAME)
    assert "a tenth of the chats given" in done.stderr
    fact = [part for name in ("instruction", "prompt", "completion") for part in (f"--{name}", FACT[name])]
    done = run(app, ["teach", *given, *fact, "--statistics", str(folder), "-o", str(tmp_path / "taught"), "--json"])
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["kl_after"] < metrics["kl_before"] and metrics["kl_preserved"] <= 0.1
    done = run(app, ["teach", *given, *fact, "--statistics", str(folder), "--preserve", str(chats), "-o", "x"])
    assert done.exit_code == 2 and "give --preserve or --statistics, not both" in done.stderr
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: False)
    done = run(app, ["prepare", *given, "--preserve", str(chats), "-o", str(folder)])
    assert done.exit_code == 1 and "only what the default lesson of pretrained models preserves" in done.stderr


def test_a_session(saved, tmp_path):
    session = Session.open(TINY, preserve_dataset=PreservedStatistics.from_pretrained(saved))
    assert session.dry_run([FACT, OTHER])["chats_to_write"] == 0
    session.teach([FACT])
    again = session.teach([OTHER])
    assert len(session.facts) == 2 and again["kl_preserved"] <= 0.1
