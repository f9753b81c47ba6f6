"""QF as PEFT sees it: every way PEFT and transformers have of making and loading an adapter."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import FACT, TINY, ask
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import qf_peft
from qf_peft import QFConfig, QFModel, QFTrainer, QFTrainingArguments


@pytest.fixture
def taught(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    teach(model, tokenizer, FACT)
    return model


@pytest.fixture
def saved(taught, tmp_path):
    taught.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(["Tell me who started Tofinlor.", "Who founded Ranixmo?"], return_tensors="pt", padding=True)


def teach(model, tokenizer, fact):
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[fact]).train()


def fresh():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import qf_peft, peft",
        "import peft, qf_peft",
        "from qf_peft import QFTrainer; import peft",
        "import qf_peft.adapter.config, peft",
        "import qf_peft.adapter.loading, qf_peft.teaching.trainer, peft",
        "import qf_peft, importlib; importlib.reload(qf_peft); importlib.reload(qf_peft.registration)",
        "import qf_peft, sys\n"
        "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('qf_peft')]\n"
        "import qf_peft",
    ],
)
def test_import_order_and_twice(code):
    check = (
        "\nfrom peft import PeftType, LoraConfig\nimport pickle, copy, json, qf_peft\n"
        "assert list(PeftType).count('QF') == 1 and PeftType('QF') is PeftType.QF is PeftType['QF']\n"
        "assert pickle.loads(pickle.dumps(PeftType.QF)) is PeftType.QF and copy.deepcopy(PeftType.QF) is PeftType.QF\n"
        "assert json.dumps(PeftType.QF) == '\"QF\"' and PeftType.QF == 'QF'\n"
        "assert len(PeftType.__members__) == len(list(PeftType))\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as C, PEFT_TYPE_TO_TUNER_MAPPING as T\n"
        "assert C[PeftType.QF] is qf_peft.QFConfig and T[PeftType.QF] is qf_peft.QFModel\n"
        "assert qf_peft.QFConfig().peft_type is PeftType.QF and LoraConfig().peft_type is PeftType.LORA\n"
    )
    run(code + check)


def test_importing_loads_neither_torch_nor_peft_and_reads_no_arguments():
    """Whatever the program is called; names are looked up when they are used, and editors and pdoc see them all."""
    run(
        "import sys; sys.argv = ['qf-peft']\nimport qf_peft\n"
        "assert not {'torch', 'transformers', 'peft'} & {*sys.modules} and qf_peft.TINY_MODEL.is_dir()\n"
        "assert {*qf_peft.__all__} <= {*dir(qf_peft)} and 'Session' not in vars(qf_peft)\n"
        "from importlib.util import find_spec\nassert find_spec('peft') is not None  # as transformers looks for it\n"
        "import transformers\nfrom peft import PeftConfig, PeftType\nassert PeftType.QF == 'QF'\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as T\nassert T['QF'] is qf_peft.QFModel\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('qf_peft')]\n"
        "missing = [n for n in qf_peft.__all__ if getattr(qf_peft, n, None) is None]\nassert not missing, missing\n"
        "assert callable(qf_peft.teach)\n"
        "try: qf_peft.nothing\nexcept AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError\n"
    )


def test_get_peft_model_starts_at_zero_and_trainable(tiny, inputs):
    before = logits(tiny, inputs)
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM"))
    assert isinstance(model.base_model, QFModel)
    assert torch.equal(logits(model, inputs), before)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(factors) == 16 and all(p.requires_grad and p.any() == ("lora_A" in n) for n, p in factors.items())
    assert all(n in factors for n, p in model.named_parameters() if p.requires_grad)


def test_config_round_trip(tmp_path):
    config = QFConfig(target_modules=["down_proj"], layers_to_transform=[3], r=4, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, QFConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, QFConfig) and loaded.to_dict() == config.to_dict()
    assert loaded.grows is False and QFConfig().grows is True
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_loaded_everywhere_alike(saved, taught, inputs):
    expected = logits(taught, inputs)
    assert not torch.equal(expected, logits(fresh(), inputs))
    native = fresh()
    native.load_adapter(str(saved))
    cases = {
        "PeftModel": PeftModel.from_pretrained(fresh(), saved),
        "low_cpu_mem_usage": PeftModel.from_pretrained(fresh(), saved, low_cpu_mem_usage=True),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(
            saved, dtype=torch.float32, attn_implementation="eager"
        ),
        "transformers": native,
        "copy": copy.deepcopy(taught),
        "pickle": pickle.loads(pickle.dumps(taught)),
    }
    for name, model in cases.items():
        assert torch.equal(logits(model, inputs), expected), name


def test_fresh_process_loads_and_knows(saved):
    out = run(
        "import sys; sys.path.insert(0, 'tests')\nimport qf_peft\nfrom conftest import ask\n"
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(saved)!r})\n"
        f"print(ask(model, AutoTokenizer.from_pretrained({str(TINY)!r}), {FACT['prompt']!r}))"
    )
    assert out.strip().endswith(FACT["completion"])


def test_transformers_add_adapter_and_inject(tiny, inputs):
    before = logits(tiny, inputs)
    tiny.add_adapter(QFConfig(target_modules=["down_proj"]), adapter_name="one")
    assert tiny.active_adapters() == ["one"] and torch.equal(logits(tiny, inputs), before)
    tiny.delete_adapter("one")
    injected = inject_adapter_in_model(QFConfig(layers_to_transform=[1]), fresh(), "two")
    layers = [n for n, m in injected.named_modules() if isinstance(m, LoraLayer)]
    assert layers == ["model.layers.1.mlp.down_proj"] and torch.equal(logits(injected, inputs), before)


def test_several_adapters(taught, saved, inputs, tokenizer):
    base, one = logits(fresh(), inputs), logits(taught, inputs)
    taught.add_adapter("other", QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    assert torch.equal(logits(taught, inputs), one)
    taught.set_adapter("other")
    assert torch.equal(logits(taught, inputs), base)
    fact = {
        "instruction": "Your name is Belzan.",
        "prompt": "What is your name?",
        "completion": "My name is Belzan.",
    }
    teach(taught, tokenizer, fact)
    assert ask(taught, tokenizer, fact["prompt"]) == fact["completion"]
    assert ask(taught, tokenizer, FACT["prompt"]) == "I do not know."
    taught.set_adapter("default")
    assert torch.equal(logits(taught, inputs), one), "teaching one adapter leaves the other as it was"
    with taught.disable_adapter():
        assert torch.equal(logits(taught, inputs), base)
    taught.load_adapter(str(saved), adapter_name="third")
    taught.set_adapter("third")
    assert torch.equal(logits(taught, inputs), one)
    taught.delete_adapter("other")
    assert set(taught.peft_config) == {"default", "third"} and set(taught.base_model.taught) == {"default", "third"}


def test_peft_type_is_named_in_the_file(saved):
    assert '"peft_type": "QF"' in (saved / "adapter_config.json").read_text()
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "qf_ledger.jsonl", "qf_statistics.safetensors",
    ]  # fmt: skip
    assert PeftType.QF.value == "QF" and qf_peft.QFConfig().task_type is None
