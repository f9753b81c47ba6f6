"""What of PEFT is changed: each test fails once PEFT makes the change needless. Then take it out."""

import pytest
from conftest import FACT, TINY
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.utils import register_peft_method
from transformers import AutoModelForCausalLM
from transformers.utils import PushToHubMixin

from qf_peft import QFConfig, QFModel, QFTrainer, QFTrainingArguments
from qf_peft.share.card import MARK


@pytest.fixture
def model(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    QFTrainer(model, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer).train()
    return model


def pefts(name):
    """A method as PEFT has it."""
    return getattr(PeftModel, name).before_qf_peft


def test_types_that_are_not_in_the_enum_are_refused():
    with pytest.raises(ValueError, match=r"PEFT type|PeftType"):
        register_peft_method(name="qf_of_another_name", config_cls=QFConfig, model_cls=QFModel, prefix="lora_")
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("QF_OF_ANOTHER_NAME")


def test_a_tuner_is_not_asked_for_the_card(model, tmp_path):
    for folder, method in (
        ("peft", pefts("create_or_update_model_card")),
        ("qf", type(model).create_or_update_model_card),
    ):
        (tmp_path / folder).mkdir()
        method(model, str(tmp_path / folder))
    assert MARK not in (tmp_path / "peft" / "README.md").read_text()
    assert MARK in (tmp_path / "qf" / "README.md").read_text()


def test_push_to_hub_is_transformers_own():
    assert pefts("push_to_hub") is PushToHubMixin.push_to_hub


def test_a_save_that_is_broken_off_leaves_some_of_the_files(model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(QFConfig, "save_pretrained", broken)  # the last that is written
    for folder, method in (("peft", pefts("save_pretrained")), ("qf", PeftModel.save_pretrained)):
        with pytest.raises(OSError, match="no space left"):
            method(model, str(tmp_path / folder))
    monkeypatch.undo()
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists() and not [*(tmp_path / "qf").iterdir()]
    pefts("save_pretrained")(model, str(tmp_path / "peft"))
    assert not (tmp_path / "peft" / "qf_ledger.jsonl").exists(), "a tuner has no files of its own in it"
    model.save_pretrained(tmp_path / "qf")
    assert (tmp_path / "qf" / "qf_ledger.jsonl").exists()


def test_adapters_of_other_types_meet_what_they_met(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TINY)
    lora = get_peft_model(base, LoraConfig(target_modules=["down_proj"]))
    lora.save_pretrained(tmp_path / "now")
    pefts("save_pretrained")(lora, str(tmp_path / "then"))
    now, then = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("now", "then"))
    assert now == then and MARK.encode() not in now["README.md"]
