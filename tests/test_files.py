"""Full disks, folders that cannot be written to, files in the way: a clear error, and what was there stays."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from conftest import FACT, OTHER, TINY
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, save_as_lora
from qf_peft.forward.scratch import Scratch


@pytest.fixture
def teach(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))

    def teach(row):
        trainer = QFTrainer(model, QFTrainingArguments.paper(), [row], processing_class=tokenizer)
        trainer.train()
        return trainer

    return teach


@contextmanager
def full_disk(most=20_000):
    """Files of this process cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder):
    """Nothing can be made in a folder, whoever one is."""
    real = os.mkdir

    def mkdir(path, *args, **options):
        if os.fspath(path).startswith(os.fspath(folder)):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "mkdir", mkdir)
        yield


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writers(trainer, folder):
    return {
        "save": lambda: trainer.model.save_pretrained(folder / "adapter"),
        "lora": lambda: save_as_lora(trainer.model, folder / "lora"),
        "report": lambda: trainer.report(folder / "report.html"),
    }


@pytest.mark.parametrize("what", ["save", "lora", "report"])
def test_a_full_disk(teach, tmp_path, what):
    trainer = teach(FACT)
    writers(trainer, tmp_path)[what]()
    before = content(tmp_path)
    trainer = teach(OTHER)
    with (
        full_disk(2000),
        pytest.raises(OSError, match=r"could not be saved: File too large.*What was there is as it was"),
    ):
        writers(trainer, tmp_path)[what]()
    assert content(tmp_path) == before, "nor is anything left beside it"
    if what == "save":
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert [e.prompt for e in loaded.base_model.taught["default"].entries] == [FACT["prompt"]]
    writers(trainer, tmp_path)[what]()
    assert content(tmp_path) != before, "with room it is saved"


@pytest.mark.parametrize("what", ["save", "lora"])
def test_a_folder_that_is_read_only(teach, tmp_path, what):
    trainer = teach(FACT)
    writers(trainer, tmp_path)[what]()
    before = content(tmp_path)
    teach(OTHER)
    message = r"could not be saved: Permission denied; give a folder that may be written to"
    with read_only(tmp_path), pytest.raises(PermissionError, match=message):
        writers(trainer, tmp_path)[what]()
    assert content(tmp_path) == before


def test_a_file_in_the_way(teach, tmp_path):
    model = teach(FACT).model
    (tmp_path / "file").write_text("mine")
    model.add_adapter("other", QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "other").write_text("mine")
    before = content(tmp_path)
    ways = {
        "file": r"file\) should be a directory, not a file",  # PEFT's own words
        "file/below": "file is a file; give a folder",
        "both": "other is a file; give a folder",
    }
    for path, message in ways.items():
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / path)
    assert content(tmp_path) == before, "not the first of two adapters either"


def test_no_room_for_activations():
    """Else the process would be killed when it writes to the file's memory."""
    with full_disk(), pytest.raises(OSError, match=r"no room for 0\.004 GB of activations .*set TMPDIR"):
        Scratch(0).empty(1000, 1000, torch.float32, "cpu")
    assert Scratch(0).empty(10, 10, torch.float32, "cpu").fill_(1).sum() == 100
