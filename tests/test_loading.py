"""Adapters that strangers made: clear errors or PEFT's warnings, no code run, no memory blown up, no weight touched."""

import json
import pickle
import resource
import struct
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import FACT, TINY, random_model
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

A = "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"
B = "base_model.model.model.layers.7.mlp.down_proj.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """The files of a taught adapter, as bytes and tensors."""
    folder = tmp_path_factory.mktemp("made")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT]).train()
    model.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


@pytest.fixture
def write(made, tmp_path):
    """Write the adapter with changes: to its configuration by name, and to its tensors by a function."""

    def written(change=None, **config):
        settings, tensors = made
        tensors = dict(tensors)
        if change is not None:
            change(tensors)
        (tmp_path / CONFIG).write_text(json.dumps({**settings, **config}))
        save_file(tensors, tmp_path / WEIGHTS)
        return tmp_path

    return written


def load(base, folder, **options):
    """Load, and check whatever happens that no weight of the base model has changed."""
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    try:
        return PeftModel.from_pretrained(base, folder, **options)
    finally:
        for name, parameter in base.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_unchanged_it_loads(write, base, made, low_cpu_mem_usage):
    model = load(base, write(), low_cpu_mem_usage=low_cpu_mem_usage)
    a, b = model.base_model.factors("default", "model.layers.7.mlp.down_proj")
    assert torch.equal(a, made[1][A]) and torch.equal(b, made[1][B])


def _set(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def _swap(tensors):
    tensors[A], tensors[B] = tensors[B].contiguous(), tensors[A].contiguous()


def _rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


BROKEN = {
    "transposed": (_swap, r"layers\.7\.mlp\.down_proj\.lora_[AB] has shape .* must be"),
    "other width": (_set(A, torch.zeros(4, 7)), r"lora_A has shape \(4, 7\)"),
    "a vector": (_set(B, torch.zeros(192)), r"lora_B has shape \(192,\)"),
    "a scalar": (_set(B, torch.tensor(1.0)), r"lora_B has shape \(\)"),
    "integers": (lambda t: t.update({A: torch.ones_like(t[A], dtype=torch.int64)}), "int64, not floating point"),
    "complex": (lambda t: t.update({A: t[A].to(torch.complex64)}), "complex64, not floating point"),
    "not a number": (lambda t: t[A].view(-1)[3:4].fill_(float("nan")), "lora_A holds values that are not finite"),
    "infinite": (lambda t: t[B].view(-1)[:1].fill_(float("inf")), "lora_B holds values that are not finite"),
    "another layer": (_rename(A, A.replace(".7.", ".3.")), r"no target module.*layers\.3\.mlp\.down_proj\.lora_A"),
    "no such layer": (_rename(A, A.replace(".7.", ".99.")), r"layers\.99\.mlp"),
    "a base weight": (
        _set("base_model.model.model.embed_tokens.weight", torch.zeros(512, 192)),
        "embed_tokens.weight'.*nothing else",
    ),
    "the layer's own weight": (
        _set("base_model.model.model.layers.7.mlp.down_proj.base_layer.weight", torch.zeros(192, 768)),
        "base_layer.weight",
    ),
    "a path": (_set("../../etc/passwd", torch.zeros(1)), r"'\.\./\.\./etc/passwd'"),
    "a method": (_set("base_model.model.__init__.lora_A.weight", torch.zeros(1)), "__init__"),
    "many": (lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(50)}), "50 of its tensors.*…"),
    "DoRA": (_set(A.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(192)), "lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_broken_tensors(write, base, case, low_cpu_mem_usage):
    change, message = BROKEN[case]

    def changed(tensors):
        tensors.update({name: tensor.clone() for name, tensor in tensors.items()})
        change(tensors)

    with pytest.raises(ValueError, match=message):
        load(base, write(changed), low_cpu_mem_usage=low_cpu_mem_usage)


def test_values_too_large_for_the_base_models_dtype(write):
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float16, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"not finite in the layer's torch\.float16"):
        load(base, write(lambda t: t.update({A: t[A] * 1e6 + 1e6})), autocast_adapter_dtype=False)


def test_missing_tensors_are_warned_of_by_peft(write, base):
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lora_B"):
        load(base, write(lambda tensors: tensors.pop(B)))


def test_a_huge_rank_takes_no_memory(write, base):
    with limited_memory(2**30), pytest.raises(ValueError, match=r"lora_A has shape .* with r=1000000000"):
        load(base, write(r=10**9, lora_alpha=10**9))
    fresh = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    with limited_memory(2**30), pytest.raises(RuntimeError, match="mismatched"):
        fresh.load_adapter(str(write(r=10**9, lora_alpha=10**9)))


@contextmanager
def limited_memory(more):
    """No more than so many bytes beyond what the process has."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (used + more, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_a_rank_beyond_the_layers_own_loads_if_the_file_has_it(base, tokenizer, tmp_path):
    """Adapters put side by side have the sum of their ranks, which may exceed what one change needs."""
    model = get_peft_model(base, QFConfig(layers_to_transform=[7], r=100, task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT]).train()
    model.base_model.add_weighted_adapter(["default"] * 3, [1.0, 0.5, -0.5], "sum", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    fresh = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "sum")
    name = "model.layers.7.mlp.down_proj"
    assert loaded.peft_config["default"].r == 300 > 192
    assert torch.equal(loaded.base_model.factors("default", name)[0], model.base_model.factors("sum", name)[0])
    inputs = tokenizer(FACT["prompt"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 3, "lora_alpha": 3}, "r=3"),
        ({"r": 0}, "r=0"),
        ({"r": -4}, "r=-4"),
        ({"r": 1e9}, "r=1000000000.0"),
        ({"r": "9" * 30}, "expected a positive integer"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": "many"}, "lora_alpha='many'"),
        ({"target_modules": {"down_proj": 1}}, "target_modules=.*expected a string or a list"),
        ({"target_modules": [1, 2]}, "target_modules="),
        ({"exclude_modules": 7}, "exclude_modules=7"),
        ({"target_modules": ["../../etc"]}, "matches no module"),
        ({"target_modules": ["gone_proj"]}, "gone_proj.*matches no module of Qwen2"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.* not found in the base model"),
        ({"layers_to_transform": [99]}, "layer 99 is out of range"),
        ({"layers_to_transform": ["7"]}, "layers_to_transform="),
        ({"layers_to_transform": [-1]}, "layer -1 is out of range"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path="),
        ({"grows": "yes"}, "grows='yes'"),
        ({"task_type": "RUN"}, "Invalid task type"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron"),
        ({"rank_pattern": {"down_proj": 10**9}}, "with r=1000000000"),
        ({"rank_pattern": {"down_proj": "9"}}, "rank_pattern"),
        ({"alpha_pattern": {"down_proj": -1}}, "alpha_pattern"),
        ({"layer_replication": [[0, 8], [0, 8]]}, "layer_replication"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_parameters": ["lm_head.weight"]}, "target_parameters"),
    ],
)
def test_configurations(write, base, changes, message):
    with pytest.raises(ValueError, match=message):
        load(base, write(**changes))


def test_options_of_the_runtime_and_of_the_future_are_ignored_with_pefts_warning(write, base):
    with pytest.warns(UserWarning, match="runtime_config"):
        load(base, write(runtime_config={"ephemeral_gpu_offload": True}))
    fresh = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments.*_custom_modules"):
        load(fresh, write(_custom_modules={"a": "b"}))


def test_auto_mapping_imports_nothing_by_a_strangers_word(write, base, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = write(task_type=None, auto_mapping={"base_model_class": "Model", "parent_library": "planted"})
    with pytest.raises(ValueError, match="allowlist"):
        AutoPeftModel.from_pretrained(folder)
    load(base, folder)
    assert not (tmp_path / "ran").exists()


def test_another_base_model(write):
    other = random_model("qwen2", num_hidden_layers=8)
    with pytest.raises(ValueError, match="made for another base model"):
        load(other, write())
    with pytest.raises(ValueError, match=r"layer 7 is out of range"):
        load(random_model("qwen2"), write())
    with pytest.raises(ValueError, match="matches no module of GPT2"):
        load(random_model("gpt2"), write())


def test_another_base_model_of_the_same_shape_is_warned_of(write, base, caplog):
    base.name_or_path = "someone/another-model"
    load(base, write(base_model_name_or_path="someone/a-model"))
    assert "made for 'someone/a-model' and is put into 'someone/another-model'" in caplog.text
    caplog.clear()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    for name in ("someone/a-model", "x" * 5000, "../../\0"):  # from a folder: it may well be the same
        load(base, write(base_model_name_or_path=name)).unload()
    assert "made for" not in caplog.text


class Planted:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("auto", [False, True])
def test_pickles_are_refused(write, base, tmp_path, auto):
    folder, ran = write(), tmp_path / "ran"
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Planted(ran)))
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        if auto:
            AutoPeftModelForCausalLM.from_pretrained(folder)
        else:
            load(base, folder)
    assert not ran.exists()


def test_a_pickle_beside_safetensors_is_not_read(write, base, tmp_path):
    folder, ran = write(), tmp_path / "ran"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Planted(ran)))
    load(base, folder)
    assert not ran.exists()


@pytest.mark.parametrize("case", ["cut off", "header beyond the file", "header no JSON", "offsets beyond the file"])
def test_files_that_are_no_safetensors(write, base, case):
    folder = write()
    data = (folder / WEIGHTS).read_bytes()
    header = {A: {"dtype": "F32", "shape": [10**9, 768], "data_offsets": [0, 4 * 768 * 10**9]}}
    text = json.dumps(header).encode()
    data = {
        "cut off": data[: len(data) // 2],
        "header beyond the file": struct.pack("<Q", 2**62) + data[8:],
        "header no JSON": struct.pack("<Q", 8) + b"import x" + data,
        "offsets beyond the file": struct.pack("<Q", len(text)) + text + b"\0" * 64,
    }[case]
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(Exception, match=r"(?i)header|deserializing|incomplete"):
        load(base, folder)


def test_a_second_adapter_is_checked_too(write, base, made):
    model = load(base, write())
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(str(write(lambda t: t.update({A: t[A] * float("nan")}))), adapter_name="second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(str(write()), adapter_name="third")
    assert torch.equal(model.base_model.factors("third", "model.layers.7.mlp.down_proj")[0], made[1][A])
