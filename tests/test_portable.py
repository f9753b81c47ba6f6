"""A QF adapter as a plain LoRA: loaded by PEFT alone, by MLX-LM, and checked against what all readers take."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import FACT, OTHER, TINY, ask, random_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qf_peft.share.lora_export
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, check_portable, export_lora
from qf_peft.solve.least_squares import LowRankDelta

DOWN = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"


def base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="eager")


def teach(network, tokenizer, rows=(FACT,), **config):
    model = get_peft_model(network, QFConfig(task_type="CAUSAL_LM", **config))
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=list(rows)).train()
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=ids if ids is not None else torch.arange(5, 25)[None]).logits


def fields(directory):
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def taught(tokenizer):
    return teach(base(), tokenizer, layers_to_transform=[3, 7])


# A process that cannot import qf_peft: what a reader of the portable directory has.
READER = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "qf_peft":
            raise ImportError("qf_peft is not installed")
sys.meta_path.insert(0, Refuse())
try:
    import qf_peft
except ImportError:
    pass
else:
    raise SystemExit("qf_peft could be imported")
import torch, warnings
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    network = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32, attn_implementation="eager")
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing or not its own
        model = PeftModel.from_pretrained(network, folder + "/lora")
        far = (model(input_ids=expected["ids"]).logits - expected["logits"]).abs().max()
        moved = (expected["base"] - expected["logits"]).abs().max()
    print(folder, float(far), float(moved))
    assert far < 1e-5 * max(1.0, float(expected["logits"].abs().max())) and moved > 0.01
assert not any(name.split(".")[0] == "qf_peft" for name in sys.modules)
"""


def test_plain_peft_in_a_fresh_process(tokenizer, tmp_path, taught):
    """Qwen2 (real), Conv1D with an ambiguous ending (GPT-2), parallel blocks, a mixture of experts, a pattern."""
    cases = {
        "tiny": taught,
        "gpt2": teach(random_model("gpt2"), tokenizer, layers_to_transform=[1]),
        "gpt_neox": teach(random_model("gpt_neox"), tokenizer),
        "qwen2_moe": teach(random_model("qwen2_moe"), tokenizer, layers_to_transform=[2]),
        "named": teach(random_model("llama"), tokenizer, target_modules=r".*(0.mlp.down_proj|2.self_attn.(q|o)_proj)"),
    }
    ids = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    for name, model in cases.items():
        folder = tmp_path / name
        report = export_lora(model, folder / "lora", all_layers=name == "gpt_neox")
        assert report["loss"] < 1e-6 and check_portable(folder / "lora") == []
        with model.disable_adapter():
            untaught = logits(model, ids)
        torch.save({"ids": ids, "logits": logits(model, ids), "base": untaught}, folder / "expected.pt")
        untouched = base() if name == "tiny" else random_model("llama" if name == "named" else name)
        untouched.save_pretrained(folder / "base")
    result = subprocess.run(
        [sys.executable, "-I", "-c", READER, *(str(tmp_path / name) for name in cases)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    assert fields(tmp_path / "gpt2" / "lora")["target_modules"] == ["mlp.c_proj"]
    assert fields(tmp_path / "gpt2" / "lora")["fan_in_fan_out"] is True
    named = fields(tmp_path / "named" / "lora")
    assert named["target_modules"] == ["down_proj", "o_proj", "q_proj"] and named["layers_to_transform"] == [0, 2]


def test_what_the_files_say(taught, tmp_path):
    report = export_lora(taught, tmp_path / "lora")
    needed = taught.peft_config["default"].r
    assert report["rank"] == 16 and report["needed_rank"] == needed == 13
    assert report["modules"] == 2 and report["zero_modules"] == 0
    assert set(report["module_losses"]) == {f"model.layers.{i}.mlp.down_proj" for i in (3, 7)}
    config = fields(tmp_path / "lora")
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 16
    assert config["target_modules"] == ["down_proj"] and config["layers_to_transform"] == [3, 7]
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert set(tensors) == {DOWN.format(i, side) for i in (3, 7) for side in "AB"}
    for layer in (3, 7):
        a, b = (tensors[DOWN.format(layer, side)] for side in "AB")
        assert a.shape == (16, 768) and b.shape == (192, 16)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4), "as large as each other, direction by direction"
        assert not a[needed:].any() and not b[:, needed:].any()


def test_every_layer_on_request(taught, tmp_path):
    report = export_lora(taught, tmp_path, all_layers=True)
    assert report["zero_modules"] == 6 and fields(tmp_path)["layers_to_transform"] is None
    assert check_portable(tmp_path, num_layers=8) == []
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 16 and not tensors[DOWN.format(0, "A")].any()
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(taught), atol=1e-5)


def test_truncation_is_the_nearest_and_its_loss_is_told(tokenizer, tmp_path):
    model = teach(base(), tokenizer, [FACT, OTHER], layers_to_transform=[6, 7])
    exact = export_lora(model, tmp_path / "exact")
    cut = export_lora(model, tmp_path / "cut", rank=16)
    assert exact["rank"] == 32 and cut["rank"] == 16 and cut["needed_rank"] == exact["needed_rank"] == 25
    tensors, lost, whole = load_file(tmp_path / "cut" / "adapter_model.safetensors"), 0.0, 0.0
    for layer in (6, 7):
        name = f"model.layers.{layer}.mlp.down_proj"
        delta = model.base_model.delta("default", name).dense().double()
        values = torch.linalg.svdvals(delta)
        least = values[16:].norm() / values.norm()
        written = (tensors[DOWN.format(layer, "B")] @ tensors[DOWN.format(layer, "A")]).double()
        loss = (delta - written).norm() / delta.norm()
        assert float(loss) == pytest.approx(float(least), rel=1e-3)
        assert cut["module_losses"][name] == pytest.approx(float(loss), rel=1e-3)
        lost, whole = lost + (delta - written).norm() ** 2, whole + delta.norm() ** 2
    assert cut["loss"] == pytest.approx(float((lost / whole) ** 0.5), rel=1e-3) and 0.01 < cut["loss"] < 0.5
    assert check_portable(tmp_path / "cut") == []
    roomy = export_lora(model, tmp_path / "roomy", rank=64)
    assert roomy["rank"] == 64 and roomy["loss"] < 1e-6


def test_more_than_rank_128_is_written_exactly_with_a_warning(tmp_path):
    model = get_peft_model(base(), QFConfig(layers_to_transform=[2]))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 0.01 for shape in ((150, 768), (192, 150)))
    model.base_model.install("default", {"model.layers.2.mlp.down_proj": LowRankDelta(A=a, B=b)})
    seen = []
    logger = qf_peft.share.lora_export.logger
    handler = type("Seen", (__import__("logging").Handler,), {"emit": lambda _, record: seen.append(record.msg)})()
    logger.addHandler(handler)
    try:
        report = export_lora(model, tmp_path)
    finally:
        logger.removeHandler(handler)
    assert report["rank"] == 256 and report["needed_rank"] == 150 and report["loss"] < 1e-6
    assert len(seen) == 1 and "150" in seen[0] and "rank=128" in seen[0]
    assert check_portable(tmp_path) == ["r is 256; expected 16, 32, 64 or 128"]
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(tokenizer, tmp_path, dtype):
    model = teach(base(dtype), tokenizer)
    report = export_lora(model, tmp_path)
    assert report["loss"] < 2 * torch.finfo(dtype).eps and check_portable(tmp_path) == []
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    assert ask(PeftModel.from_pretrained(base(dtype), tmp_path), tokenizer, FACT["prompt"]) == FACT["completion"]


def test_scale_and_choice_of_adapter(taught, tmp_path, tokenizer):
    """What is written is what the adapter does now, its scale included, and whichever of several adapters is named."""
    model = get_peft_model(base(), QFConfig(layers_to_transform=[7]))
    native = tmp_path / "native"
    taught.save_pretrained(native)
    model.load_adapter(str(native), adapter_name="facts")
    layer = model.base_model.model.model.layers[7].mlp.down_proj
    layer.set_scale("facts", 0.5)
    export_lora(model, tmp_path / "lora", adapter_name="facts")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    half = written[DOWN.format(7, "B")] @ written[DOWN.format(7, "A")]
    whole = taught.base_model.delta("default", "model.layers.7.mlp.down_proj").dense()
    assert torch.allclose(half, whole / 2, atol=1e-6)
    export_lora(model, tmp_path / "untaught")  # the active one, which holds nothing
    assert not any(t.any() for t in load_file(tmp_path / "untaught" / "adapter_model.safetensors").values())
    assert check_portable(tmp_path / "untaught") == []


def test_a_directory_that_exists(taught, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    export_lora(taught, tmp_path, rank=64)
    export_lora(taught, tmp_path)
    assert fields(tmp_path)["r"] == 16 and (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"holds a PEFT adapter .*give another"):
        export_lora(taught, tmp_path, format="mlx")
    export_lora(taught, tmp_path / "mlx", format="mlx")
    with pytest.raises(FileExistsError, match="holds an MLX adapter"):
        export_lora(taught, tmp_path / "mlx")
    with pytest.raises(FileExistsError, match="is a file"):
        export_lora(taught, tmp_path / "README.md")


def test_a_failure_midway_leaves_nothing(taught, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    export_lora(taught, tmp_path / "kept")
    before = (tmp_path / "kept" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(qf_peft.share.lora_export, "save_file", full)
    for name in ("new", "kept"):
        with pytest.raises(OSError, match="No space"):
            export_lora(taught, tmp_path / name, rank=32)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and check_portable(tmp_path / "kept") == []
    assert (tmp_path / "kept" / "adapter_model.safetensors").read_bytes() == before


def test_clear_errors(taught, tmp_path):
    for rank in (0, 8, 20, 24.0, True, -16):
        with pytest.raises(ValueError, match=r"rank=.*expected 16, 32, 64, 128"):
            export_lora(taught, tmp_path / "x", rank=rank)
    with pytest.raises(ValueError, match="format='onnx'; expected one of peft, mlx, gguf"):
        export_lora(taught, tmp_path / "x", format="onnx")
    with pytest.raises(ValueError, match=r"adapter_name='other'; the model has the adapters \['default'\]"):
        export_lora(taught, tmp_path / "x", adapter_name="other")
    with pytest.raises(ValueError, match="without a QF adapter"):
        export_lora(base(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"none of QF's; save them by model.save_pretrained"):
        export_lora(get_peft_model(base(), LoraConfig(target_modules=["down_proj"])), tmp_path / "x")
    model = get_peft_model(base(), QFConfig(layers_to_transform=[7]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into model.layers.7.mlp.down_proj; call .*unmerge"):
        export_lora(model, tmp_path / "x")
    model.unmerge_adapter()
    model.base_model.model.model.layers[7].mlp.down_proj.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"at model.layers.7.mlp.down_proj that are not finite"):
        export_lora(model, tmp_path / "x")
    falcon = get_peft_model(random_model("falcon"), QFConfig(layers_to_transform=[0]))
    with pytest.raises(ValueError, match=r"what MLX-LM calls 'transformer.h.0.mlp.dense_4h_to_h'.* is not known"):
        export_lora(falcon, tmp_path / "x", format="mlx")
    assert not (tmp_path / "x").exists()


def test_a_gguf_file(taught, tmp_path):
    """llama.cpp adds alpha / rank · B A to the weight of the tensor that a pair is named after."""
    report = export_lora(taught, tmp_path, format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert (values["general.architecture"], values["general.type"], values["adapter.type"]) == (
        "qwen2",
        "adapter",
        "lora",
    )
    assert values["adapter.lora.alpha"] == report["rank"]
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(tensors) == {f"blk.{i}.ffn_down.weight.lora_{side}" for i in (3, 7) for side in "ab"}
    for i in (3, 7):
        a, b = (tensors[f"blk.{i}.ffn_down.weight.lora_{side}"] for side in "ab")
        layer = taught.base_model.model.model.layers[i].mlp.down_proj
        assert torch.allclose(b @ a, layer.get_delta_weight("default"), atol=1e-6)


def test_a_gguf_file_of_what_lies_otherwise_there(tmp_path):
    model = get_peft_model(base(), QFConfig(target_modules=["q_proj"], layers_to_transform=[7]))
    with pytest.raises(ValueError, match=r"model.layers.7.self_attn.q_proj has no tensor of its own order"):
        export_lora(model, tmp_path, format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_mlx_files(taught, tmp_path):
    """MLX-LM computes y + scale · (x @ lora_a) @ lora_b in the last `num_layers` blocks, at the keys named."""
    report = export_lora(taught, tmp_path, format="mlx")
    config, tensors = fields(tmp_path), load_file(tmp_path / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 5
    assert config["lora_parameters"] == {"rank": 16, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    assert report["rank"] == 16
    for layer in (3, 7):
        name = f"model.layers.{layer}.mlp.down_proj"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (768, 16) and b.shape == (16, 192)
        assert torch.allclose(a @ b, taught.base_model.delta("default", name).dense().T, atol=1e-6)
    assert len(tensors) == 4
    gpt2 = get_peft_model(random_model("gpt2"), QFConfig(layers_to_transform=[1]))
    export_lora(gpt2, tmp_path / "gpt2", format="mlx", all_layers=True)
    assert fields(tmp_path / "gpt2")["num_layers"] == 3
    assert "model.h.0.mlp.c_proj.lora_a" in load_file(tmp_path / "gpt2" / "adapters.safetensors")


def test_mlx_lm_itself(taught, tmp_path):
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    export_lora(taught, tmp_path, format="mlx")
    theta = taught.config.rope_parameters["rope_theta"]  # where MLX-LM's Qwen2 looks for it
    network, _ = load_model(TINY, model_config={"rope_theta": theta})
    network.set_dtype(mlx.float32)
    network = load_adapters(network, str(tmp_path))
    network.eval()
    ids = torch.arange(5, 25)[None]
    found = torch.tensor(network(mlx.array(ids.tolist())).tolist())
    assert torch.allclose(found, logits(taught, ids), atol=1e-4)


# The checker, on directories that break one rule each.
def change(**values):
    def apply(folder):
        (folder / "adapter_config.json").write_text(json.dumps({**fields(folder), **values}))

    return apply


def tensors(edit):
    def apply(folder):
        stored = load_file(folder / "adapter_model.safetensors")
        save_file(edit(stored), folder / "adapter_model.safetensors")

    return apply


def put(key, value):
    return tensors(lambda stored: {**stored, key: value(stored) if callable(value) else value})


def with_attention(stored):
    copies = {k.replace("mlp.down", "self_attn.o"): v.clone() for k, v in stored.items() if "layers.7." in k}
    return {**stored, **copies}


A7, B7 = DOWN.format(7, "A"), DOWN.format(7, "B")
BROKEN = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "cannot be read: it is not an object"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "torn weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678x"), "cannot be read"),
    "pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b""), "adapter_model.bin may run code"),
    "type": (change(peft_type="QF"), "peft_type is 'QF'; expected 'LORA'"),
    "rank": (change(r=13, lora_alpha=13), "r is 13; expected 16, 32, 64 or 128"),
    "no rank": (change(r=None), "r is None"),
    "alpha": (change(lora_alpha=32), "lora_alpha is 32; expected an integer, r"),
    "fraction": (change(lora_alpha=16.0), "lora_alpha is 16.0; expected an integer, r"),
    "rank pattern": (change(rank_pattern={"down_proj": 8}), "rank_pattern is {'down_proj': 8}"),
    "alpha pattern": (change(alpha_pattern={"down_proj": 8}), "alpha_pattern is"),
    "rslora": (change(use_rslora=True), "use_rslora is True; expected False"),
    "dora": (change(use_dora=True), "use_dora is True"),
    "bias": (change(bias="all"), "bias is 'all'; expected 'none'"),
    "modules to save": (change(modules_to_save=["lm_head"]), "modules_to_save is"),
    "excluded": (change(exclude_modules=["o_proj"]), "exclude_modules is"),
    "init": (change(init_lora_weights="pissa"), "init_lora_weights is 'pissa'; expected true"),
    "unknown field": (change(grows=True), "grows is no field of a LoRA configuration"),
    "regular expression": (change(target_modules=".*down_proj"), "target_modules is '.*down_proj'; expected a list"),
    "full path": (change(target_modules=["model.layers.7.mlp.down_proj"]), "target_modules is"),
    "pattern in list": (change(target_modules=["(up|down)_proj"]), "target_modules is"),
    "no targets": (change(target_modules=[]), "target_modules is []"),
    "layers": (change(layers_to_transform=["3"]), "layers_to_transform is ['3']"),
    "other layers": (change(layers_to_transform=[3]), "layers.7.mlp.down_proj is in none of the blocks"),
    "a layer without weights": (change(layers_to_transform=[2, 3, 7]), "missing in the blocks [2]"),
    "other target": (change(target_modules=["up_proj"]), "is none of target_modules ['up_proj']"),
    "target without weights": (change(target_modules=["down_proj", "up_proj"]), "no tensors belong to the target_mod"),
    "foreign key": (put("base_model.model.lm_head.weight", torch.ones(2)), "'base_model.model.lm_head.weight' is not"),
    "adapter's name in key": (put(A7.replace("lora_A", "lora_A.default"), torch.ones(16, 768)), "is not named"),
    "one factor": (tensors(lambda s: {k: v for k, v in s.items() if k != B7}), "has lora_A alone"),
    "no factors": (tensors(lambda s: {"x": torch.ones(1)}), "there is no pair of factors"),
    "another rank": (
        tensors(lambda s: {**s, A7: s[A7][:8].clone(), B7: s[B7][:, :8].clone()}),
        "has lora_A (8, 768), lora_B (192, 8); expected (16, d_in), (d_out, 16)",
    ),
    "transposed": (put(A7, lambda s: s[A7].T.contiguous()), "has lora_A (768, 16)"),
    "dtype": (put(A7, lambda s: s[A7].double()), "is stored as F32, F64; expected one of"),
    "two dtypes": (put(A7, lambda s: s[A7].half()), "stored in several dtypes (F16, F32); expected one"),
    "not finite": (put(A7, lambda s: s[A7] / 0), "has values that are not finite"),
    "unbalanced": (
        tensors(lambda s: {**s, A7: s[A7] * 8, B7: s[B7] / 8}),
        "expected them equal, as servers cast to 16 bits",
    ),
    "a layer missing": (
        lambda f: (
            change(layers_to_transform=None, target_modules=["down_proj", "o_proj"])(f),
            tensors(with_attention)(f),
        ),
        "self_attn.o_proj is missing in the blocks [3]; write zeros there",
    ),
    "no block": (
        put("base_model.model.lm_head.lora_A.weight", torch.ones(16, 4)),
        "lm_head has lora_A alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_the_checker_finds_what_is_broken(taught, tmp_path, rule):
    export_lora(taught, tmp_path)
    assert check_portable(tmp_path) == []
    damage, message = BROKEN[rule]
    damage(tmp_path)
    problems = check_portable(tmp_path)
    assert any(message in problem for problem in problems), problems


def test_the_checker_on_other_directories(taught, tmp_path):
    assert check_portable(tmp_path / "none") == [f"{tmp_path / 'none'} is not a directory"]
    taught.save_pretrained(tmp_path / "native")
    problems = check_portable(tmp_path / "native")
    assert "peft_type is 'QF'; expected 'LORA'" in problems and "r is 13; expected 16, 32, 64 or 128" in problems
    lora = get_peft_model(base(), LoraConfig(r=16, lora_alpha=16, target_modules=["down_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert all("expected them equal" in problem for problem in check_portable(tmp_path / "lora"))
    export_lora(taught, tmp_path / "portable")
    assert check_portable(tmp_path / "portable", num_layers=8) == [
        "model.layers.….mlp.down_proj is missing in the blocks [0, 1, 2, 4, 5, 6]; write zeros there"
    ]
