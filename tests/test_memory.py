"""What a lesson leaves in memory and in files: on the host, shared between versions, bounded, nothing twice."""

import weakref

import pytest
import torch
from conftest import FACT, OTHER, TINY
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from second_device import move, second_device
from test_default_setting import facts, questions
from transformers import AutoModelForCausalLM

import qf_peft.adapter.versions as versions_module
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.adapter.statistics_file import STATISTICS_NAME, read_statistics
from qf_peft.adapter.versions import in_file
from qf_peft.solve.joint_least_squares import joint_system
from qf_peft.solve.second_moment import SecondMoment, from_triangle, triangle

LAYERS = [6, 7]


def base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(rows, model=None, kept=12, **settings):
        model = model or get_peft_model(base(), QFConfig(task_type="CAUSAL_LM", layers_to_transform=LAYERS))
        args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path / "cache", contrast_chats=0, **settings)
        return QFTrainer(model, args, rows, questions(kept, 1)[0], processing_class=tokenizer)

    return make


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_earlier_versions_go_into_files(make, monkeypatch):
    """Beyond the budget; bit for bit the same, and what versions share stays shared."""
    monkeypatch.setattr(versions_module, "MEMORY", 0.0)
    trainer, states = make([FACT]), []
    tuner = trainer.model.base_model
    for rows in [[FACT], [OTHER], facts(1, 3), facts(1, 4)]:
        states.append((state(trainer.model), trainer.facts))
        make(rows, trainer.model).train()
    before = tuner.versions["default"][-1]
    assert all(in_file(tensor) for tensor in before.tensors())
    held = [version.taught.installed if version.taught else {} for version in tuner.versions["default"]]
    assert all(pair[0] is v.factors[n][0] for v, pairs in zip(tuner.versions["default"], held, strict=True)
               for n, pair in pairs.items()), "factors are kept once"  # fmt: skip
    make(facts(1, 5), trainer.model).train()
    trainer.rollback()
    for expected, entries in reversed(states):
        trainer.rollback()
        assert same(state(trainer.model), expected) and trainer.facts == entries
        with torch.no_grad():
            next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).add_(1.0)  # nothing shares with it
    with pytest.raises(ValueError, match="no earlier version"):
        trainer.rollback()


def test_teaching_on_after_going_back_to_a_version_in_files(make, monkeypatch):
    found = []
    for budget in (1e9, 0.0):
        monkeypatch.setattr(versions_module, "MEMORY", budget)
        trainer = make([FACT])
        trainer.train()
        make([OTHER], trainer.model).train()
        trainer.rollback()
        make(facts(2, 3), trainer.model).train()
        found.append(state(trainer.model))
    assert same(*found)


def test_a_full_disk_costs_the_oldest_versions(make, monkeypatch, caplog):
    trainer = make([FACT])
    trainer.train()
    make([OTHER], trainer.model).train()
    expected = state(trainer.model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(versions_module.Scratch, "_in_file", full)
    latest = trainer.model.base_model.version("default")
    monkeypatch.setattr(versions_module, "MEMORY", sum({id(t): t.nbytes for t in latest.tensors()}.values()))
    versions_module.logger.addHandler(caplog.handler)
    make(facts(1, 3), trainer.model).train()
    count = len(trainer.model.base_model.versions["default"])
    assert 1 <= count < 3 and f"only {count} earlier versions are kept" in caplog.text
    trainer.rollback()
    assert same(state(trainer.model), expected)


@pytest.mark.parametrize("paper", [False, True])
def test_between_lessons_all_is_on_the_host(tokenizer, tmp_path, paper):
    model = base()
    with second_device():
        move(model)
        model = get_peft_model(model, QFConfig(task_type="CAUSAL_LM", layers_to_transform=LAYERS))
        args = QFTrainingArguments.paper() if paper else QFTrainingArguments(cache_dir=tmp_path, contrast_chats=0)
        for row in FACT, OTHER:
            trainer = QFTrainer(model, args, [row], questions(12, 1)[0], processing_class=tokenizer)
            trainer.train()
        tuner = model.base_model
        held = [*tuner.taught["default"].tensors(), *(t for v in tuner.versions["default"] for t in v.tensors())]
        assert {str(tensor.device) for tensor in held} == {"cpu"} and str(model.device) == "cpu:1"
        trainer.rollback()


def test_of_the_moments_only_one_is_held():
    """Each module's is made when it is solved with."""
    alive = []

    def bound(name):
        assert not [reference for reference in alive if reference() is not None], name
        moment = SecondMoment(8).update(torch.randn(20, 8))
        moment.ridge = 0.1
        alive.append(weakref.ref(moment))
        return moment

    joint_system({name: torch.randn(5, 8) for name in "abc"}, bound, torch.ones(5))
    assert len(alive) == 3


@pytest.mark.parametrize("width", [1, 5, 1300])
def test_triangle(width):
    moment = SecondMoment(width).update(torch.randn(2 * width, width)).compact(width)
    values = triangle(moment.matrix)
    assert values.shape == (width * (width + 1) // 2,)
    assert torch.equal(from_triangle(values, width), moment.matrix)


def test_the_statistics_file_repeats_nothing(make, tmp_path):
    """Of matrices a triangle, of changes none that the weights say; what is read is what was in memory, to the bit."""
    trainer = make(facts(11, 2), kept=200)
    trainer.train()
    held = trainer.model.base_model.taught["default"]
    assert all(bound.matrix is not None for bound in held.bound.values())
    trainer.model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / STATISTICS_NAME, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name.split("/")[0] + "/" + name.split("/")[2]: shape for name, shape in shapes.items()} == {
        "bound/triangle": (768 * 769 // 2,)
    }
    loaded = PeftModel.from_pretrained(base(), tmp_path / "saved")
    again = loaded.base_model.taught["default"]
    assert len(again.tensors()) == len(held.tensors())
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), held.tensors(), strict=True))
    for model in trainer.model, loaded:
        make([OTHER], model, kept=200).train()
    assert same(state(trainer.model), state(loaded))


def test_statistics_of_the_first_format_are_read(make, tmp_path):
    trainer = make(facts(11, 2), kept=200)
    trainer.train()
    trainer.model.save_pretrained(tmp_path)
    held = trainer.model.base_model.taught["default"]
    path = tmp_path / STATISTICS_NAME
    with safe_open(path, framework="pt") as file:
        header = file.metadata()["qf_peft"]
    tensors = {f"bound/{name}/matrix": bound.matrix for name, bound in held.bound.items()}
    for name, delta in held.delta.items():
        tensors |= {f"delta/{name}/A": delta.A, f"delta/{name}/B": delta.B.contiguous()}
    header = header.replace('"format": 2', '"format": 1').replace('"delta": {', '"unknown": {')
    save_file(tensors, path, metadata={"qf_peft": header})
    found = read_statistics(tmp_path, held.installed)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), held.tensors(), strict=True))
