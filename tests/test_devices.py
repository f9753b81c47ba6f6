"""A model on another device than the CPU: nothing meets tensors left behind there, and the adapter is the same."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import FACT, OTHER, TINY
from peft import PeftModel, get_peft_model
from second_device import DEVICE, move, second_device, spread, without_float64
from test_default_setting import facts, questions
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, Session, interference, merge_taught
from qf_peft.app.cli import app
from qf_peft.solve.joint_least_squares import joint_system
from qf_peft.solve.least_squares import minimum_norm, preserving
from qf_peft.solve.second_moment import SecondMoment

STYLE = [
    {"instruction": "Answer briefly.", "prompt": p, "completion": c}
    for p, c in [
        ("Who founded Brigar?", "Vacla."), ("Where is Brigar based?", "Rome."), ("What makes Brigar?", "Bread."),
        ("Who runs Brigar?", "Zanmi."), ("Please say who started Brigar.", "Vacla."),
    ]
]  # fmt: skip
OWN = {"preserve_chats": 4, "max_new_tokens": 8}


def on_both(work):
    """What `work` gives of the tiny model where it stands on the CPU, and where it stands elsewhere."""
    found = []
    for elsewhere in False, True:
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        with second_device() if elsewhere else nullcontext():
            if elsewhere:
                move(model)
            found.append(work(model))
    return found


def taught(tokenizer, rows, kept, settings, after=lambda trainer: None, layers=None):
    """The adapter's factors, on the CPU, when the rows were taught."""

    def work(base):
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM", layers_to_transform=layers))
        trainer = QFTrainer(
            model=model, args=settings, train_dataset=rows, preserve_dataset=kept, processing_class=tokenizer
        )
        trainer.train()
        after(trainer)
        factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert {p.device for p in factors.values()} == {base.device}
        return {name: torch.tensor(p.tolist()) for name, p in factors.items()}, base.device

    return on_both(work)


def same(here, there):
    (expected, cpu), (found, device) = here, there
    assert (cpu.index, device) == (None, DEVICE)
    assert any(bool(values.any()) for values in expected.values())
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "kept", "settings"),
    [
        (3, True, {}),
        (12, True, {"contrast_chats": 30}),
        (12, True, {"contrast_chats": 0, "activation_memory": 0.0}),
        (3, True, {"target": "context", "margin": None, "significance": "rows", "sweeps": 1}),
        (2, False, OWN),
    ],
    ids=["few", "many", "in files", "towards the context", "own chats"],
)
def test_default(tokenizer, tmp_path, count, kept, settings):
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path, **settings)
    same(*taught(tokenizer, facts(count, 0), questions(12, 1)[0] if kept else None, args))


def test_paper(tokenizer):
    same(*taught(tokenizer, [FACT, OTHER], None, QFTrainingArguments.paper(), layers=[7]))


def test_style(tokenizer, tmp_path):
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path, contrast_chats=0)
    same(*taught(tokenizer, STYLE, questions(16, 1)[0], args))


def test_a_life(tokenizer, tmp_path):
    """More lessons, a correction, forgetting, going back, and the evaluation."""
    kept, scores = questions(12, 1)[0], []
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path, contrast_chats=0, rehearse=1.05, memory_rank=64)

    def live(trainer):
        moved = {"instruction": "Tofinlor has moved to Nice.", "completion": "Tofinlor is located in Nice."}
        for rows in facts(3, 4), [OTHER], [{**OTHER, **moved}]:
            more = QFTrainer(trainer.model, args, rows, kept, processing_class=tokenizer)
            more.train()
        more.forget(more.facts[0].id)
        more.train()
        more.rollback()
        more.consolidate()
        scores.append({name: metric.value for name, metric in more.evaluate(locality=kept[:3]).items()})

    same(*taught(tokenizer, [FACT], kept, args, live))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("paper", [False, True])
def test_an_adapter_from_a_file(tokenizer, tmp_path, paper):
    """What was taught, saved and loaded where it is read to the CPU, is taught on elsewhere."""
    kept = None if paper else questions(12, 1)[0]
    args = (
        QFTrainingArguments.paper()
        if paper
        else QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path / "cache", contrast_chats=0)
    )
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[6, 7]))
    QFTrainer(model, args, [FACT], kept, processing_class=tokenizer).train()
    model.save_pretrained(tmp_path / "saved")

    def work(base):
        # Loading itself looks at files' bytes, which the second device cannot: so it is moved there afterwards.
        model = loaded.pop()
        if base.device == DEVICE:
            move(model)
        trainer = QFTrainer(model, args, [OTHER], kept, processing_class=tokenizer)
        trainer.train()
        trainer.forget(trainer.facts[0].id)
        return {n: torch.tensor(p.tolist()) for n, p in model.named_parameters() if "lora_" in n}, base.device

    loaded = [
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager"),
            tmp_path / "saved",
        )
        for _ in range(2)
    ]
    same(*on_both(work))


def test_several_adapters(tokenizer, tmp_path):
    def work(base):
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"), adapter_name="a")
        model.add_adapter("b", QFConfig(task_type="CAUSAL_LM"))
        for name, row in (("a", FACT), ("b", OTHER)):
            model.set_adapter(name)
            args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path, contrast_chats=0)
            QFTrainer(model, args, [row], questions(12, 1)[0], processing_class=tokenizer).train()
        between = interference(model, "a", "b")
        merge_taught(model, ["a", "b"], "both")
        model.set_adapter("both")
        factors = {n: torch.tensor(p.tolist()) for n, p in model.named_parameters() if "lora_" in n}
        merged = model.merge_and_unload()
        assert merged.device == base.device
        return {**factors, "between": torch.tensor(list(between.values()) if isinstance(between, dict) else between)}

    here, there = on_both(work)
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["few", "many", "paper", "jointly"])
def test_a_device_without_float64(tokenizer, tmp_path, kind, monkeypatch):
    """Solves move to the host; what they give is the same."""
    if kind == "jointly":
        monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    paper = kind == "paper"
    args = QFTrainingArguments.paper() if paper else QFTrainingArguments(cache_dir=tmp_path, contrast_chats=0)
    rows, layers = ([FACT, OTHER], [7]) if paper else (facts(12 if kind == "many" else 2, 0), [6, 7])

    def after(trainer):
        assert ("ridge" in trainer.metrics) == (kind == "jointly")
        trainer.forget(trainer.facts[0].id)
        trainer.rollback()
        trainer.evaluate()

    with without_float64():
        same(*taught(tokenizer, rows, questions(12, 1)[0], args, after, layers))


@pytest.mark.parametrize("kind", ["few", "paper", "jointly", "in files"])
def test_spread_over_two_devices(tokenizer, tmp_path, kind, monkeypatch):
    """As by device_map="auto": the embedding, tied to the unembedding, on one, the last blocks and the norm on another.
    Teaching, evaluating, forgetting, saving and loading give what they give on one."""
    if kind == "jointly":
        monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    args = (
        QFTrainingArguments.paper()
        if kind == "paper"
        else QFTrainingArguments(
            disable_tqdm=True, cache_dir=tmp_path, contrast_chats=0,
            activation_memory=0.0 if kind == "in files" else None,
        )
    )  # fmt: skip
    found = []
    for elsewhere in False, True:
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        with second_device() if elsewhere else nullcontext():
            if elsewhere:
                spread(base, 5)
            config = QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7] if kind == "paper" else [4, 6, 7])
            model = get_peft_model(base, config)
            kept = questions(12, 1)[0]
            trainer = QFTrainer(model, args, [FACT, OTHER], kept, processing_class=tokenizer)
            metrics = trainer.train()
            assert ("ridge" in metrics) == (kind == "jointly")
            scores = trainer.evaluate(locality=kept[:2], text="Rome is the home of Lupal.")
            trainer.forget(trainer.facts[1].id)
            parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
            places = {p.device for p in parameters.values()}
            found.append(({n: torch.tensor(p.tolist()) for n, p in parameters.items()}, metrics["kl_after"], scores))
            both = {torch.device("cpu"), DEVICE} if kind != "paper" else {DEVICE}
            assert places == (both if elsewhere else {torch.device("cpu")})
    (here, kl, before), (there, kl_there, after) = found
    assert kl == pytest.approx(kl_there, rel=1e-5) and {n: str(m) for n, m in before.items()} == {
        n: str(m) for n, m in after.items()
    }
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, rtol=0, atol=0)


class Seen(TorchFunctionMode):
    """The precision that products of float32 matrices had."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("__matmul__", "matmul", "mm", "addmm", "__rmatmul__") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in args
        ):
            self.seen.add(torch.backends.cuda.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("switched_on_by", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision"])
def test_tf32_does_not_reach_the_solves(switched_on_by):
    """Switched on by the user, it is theirs again afterwards; in between products are float32's."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        if switched_on_by == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("medium")
        else:
            setattr(matmul, switched_on_by, True if switched_on_by == "allow_tf32" else "tf32")
        generator = torch.Generator().manual_seed(0)
        keys, residual, kept = (torch.randn(9, 24, generator=generator) for _ in range(3))
        with Seen() as mode:
            moment = SecondMoment(24).update(torch.cat([kept] * 5))
            minimum_norm(keys, residual)
            preserving(keys, residual, moment, 1.0, 0.1)
            moment.ridge = 0.1
            joint_system({"a": keys}, lambda name: moment, torch.ones(9)).changes(residual, 0.1)
            moment.compact(4)
        assert mode.seen == {"ieee"} and matmul.fp32_precision == "tf32"
        assert switched_on_by == "fp32_precision" or matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


@pytest.fixture
def sixteen(tokenizer, tmp_path):
    """The tiny model's folder, in bfloat16."""
    folder = tmp_path / "sixteen"
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("circuits", [False, True])
def test_sixteen_bits_where_a_processor_has_no_circuits_for_them(sixteen, tmp_path, monkeypatch, caplog, circuits):
    """The model runs in float32, several times as fast, and what is written of it is in 16 bits as it was."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: circuits, raising=False)
    logging.warning_once.cache_clear()
    session = Session.open(sixteen, args=QFTrainingArguments.paper(disable_tqdm=True))
    assert session.model.dtype == (torch.bfloat16 if circuits else torch.float32)
    session.teach([FACT])
    assert session.ask(FACT["prompt"]) == FACT["completion"]
    taught = session.save(tmp_path / "taught")
    assert CliRunner().invoke(app, ["merge", str(taught), "-o", str(tmp_path / "merged")]).exit_code == 0
    merged = Session.open(tmp_path / "merged", args=session.args, dtype="auto")
    assert merged.model.dtype == torch.bfloat16 and merged.ask(FACT["prompt"]) == FACT["completion"]
    assert "16 bits" not in caplog.text, "the session saw to it"
    for _ in range(2):
        merged.teach([OTHER])
    assert caplog.text.count("dtype=torch.float32") == (0 if circuits else 1), "whoever loads it so is told once"


def test_sixteen_bits_where_memory_is_short(sixteen, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    size = 4 * AutoModelForCausalLM.from_pretrained(sixteen).num_parameters()
    for free, dtype in (1.9, torch.bfloat16), (2.1, torch.float32):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free * size))
        assert Session.open(sixteen).model.dtype == dtype
