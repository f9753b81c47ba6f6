"""Quantised bases: taught, saved, moved to the unquantised base and back, merged where the backend can."""

import copy
import logging
import warnings

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask, random_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, check_portable, export_lora
from qf_peft.teaching.preserved_cache import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*may get different generations due to rounding")
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def bits8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'qf-peft[quantized]')")
    return BitsAndBytesConfig(load_in_8bit=True)


def bits4(kind="nf4", double=False, dtype=torch.float32):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'qf-peft[quantized]')")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )


def torchao8():
    torchao = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed (pip install 'qf-peft[quantized]')"
    )
    return TorchAoConfig(quant_type=torchao.Int8WeightOnlyConfig())


QUANTIZED = {
    "bitsandbytes 8 bit": bits8,
    "bitsandbytes nf4": bits4,
    "bitsandbytes nf4, scales quantised": lambda: bits4(double=True),
    "bitsandbytes fp4": lambda: bits4("fp4"),
    "torchao int8": torchao8,
}


def load(config=None, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        TINY, dtype=dtype, attn_implementation="eager", quantization_config=config, device_map="cpu"
    )


def teach(network, tokenizer, *rows, args=None, **config):
    model = get_peft_model(network, QFConfig(task_type="CAUSAL_LM", **config))
    args = args or QFTrainingArguments.paper()
    metrics = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=list(rows)).train()
    return model, metrics


def factor_dtypes(model):
    return {p.dtype for n, p in model.named_parameters() if "lora_" in n}


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("kind", QUANTIZED)
def test_taught_saved_moved_and_merged(tokenizer, tmp_path, kind):
    network = load(QUANTIZED[kind]())
    stored = {n: copy.deepcopy(p.detach()) for n, p in network.named_parameters() if "norm" in n}
    assert ask(network, tokenizer, FACT["prompt"]) == "I do not know."
    model, metrics = teach(network, tokenizer, FACT)
    assert metrics["residual_left"] < 1e-4 and metrics["kl_after"] < 1e-6 < metrics["kl_before"]
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert factor_dtypes(model) == {torch.float32}
    assert all(torch.equal(dict(network.named_parameters())[n], p) for n, p in stored.items())

    before = logits(model)
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(model), before), "saving leaves the base as it was"
    plain = PeftModel.from_pretrained(load(), tmp_path / "native")
    assert ask(plain, tokenizer, FACT["prompt"]) == FACT["completion"], (
        "taught on the quantised base, used on the other"
    )
    again = PeftModel.from_pretrained(load(QUANTIZED[kind]()), tmp_path / "native")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    report = export_lora(again, tmp_path / "lora")
    assert report["loss"] < 1e-6 and check_portable(tmp_path / "lora") == []
    portable = PeftModel.from_pretrained(load(QUANTIZED[kind]()), tmp_path / "lora")
    assert ask(portable, tokenizer, FACT["prompt"]) == FACT["completion"]

    assert ask(again, tokenizer, FACT["prompt"]) == FACT["completion"]
    again.merge_adapter()
    assert ask(again, tokenizer, FACT["prompt"]) == FACT["completion"]
    again.unmerge_adapter()
    with again.disable_adapter():
        assert ask(again, tokenizer, FACT["prompt"]) == "I do not know."
    assert ask(again, tokenizer, FACT["prompt"]) == FACT["completion"]
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    assert ask(merged, tokenizer, FACT["prompt"]) == FACT["completion"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_taught_on_the_plain_base_used_on_the_quantised(tokenizer, tmp_path, kind):
    config = QUANTIZED[kind]()
    model, _ = teach(load(), tokenizer, FACT, OTHER)
    model.save_pretrained(tmp_path)
    moved = PeftModel.from_pretrained(load(config), tmp_path)
    assert ask(moved, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert ask(moved, tokenizer, OTHER["prompt"]) == OTHER["completion"]
    third = {**FACT, "prompt": "Who runs Tofinlor?", "instruction": "Nixri runs Tofinlor.",
             "completion": "Tofinlor is led by Nixri."}  # fmt: skip
    args = QFTrainingArguments.paper()
    QFTrainer(model=moved, args=args, processing_class=tokenizer, train_dataset=[third]).train()
    assert ask(moved, tokenizer, third["prompt"]) == third["completion"], "what was loaded is taught on"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_default_setting(tokenizer, tmp_path, kind):
    """Preserved chats, their cache, the unembedding: nothing of it reads a quantised weight."""
    config = QUANTIZED[kind]()
    args = QFTrainingArguments(preserve_chats=24, contrast_chats=0, cache_dir=tmp_path)
    model, metrics = teach(load(config), tokenizer, FACT, OTHER, args=args)
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert ask(model, tokenizer, OTHER["prompt"]) == OTHER["completion"]
    assert metrics["kl_after"] < 0.2 * metrics["kl_before"]
    _, second = teach(load(config), tokenizer, FACT, OTHER, args=args)
    assert len(list(tmp_path.glob("preserved-*"))) == 1, "the same quantised model is recognised"
    assert second["kl_after"] == pytest.approx(metrics["kl_after"], rel=0.05)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_fingerprint(tmp_path, kind):
    """It stays through forward passes (some lay 4-bit weights out anew), and another weight changes it."""
    network = load(QUANTIZED[kind]())
    first = fingerprint(network)
    logits(network)
    assert fingerprint(network) == first == fingerprint(load(QUANTIZED[kind]())) != fingerprint(load())
    changed = load()
    weight = changed.model.layers[3].mlp.up_proj.weight.data
    weight.add_(0.02 * torch.randn_like(weight))
    changed.save_pretrained(tmp_path)
    config = QUANTIZED[kind]()
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", quantization_config=config, device_map="cpu"
    )
    same = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", quantization_config=config, device_map="cpu"
    )
    other.config = same.config
    assert fingerprint(other) != fingerprint(same)


@pytest.mark.parametrize(
    "kind, dtype",
    [("8 bit", torch.bfloat16), ("4 bit", torch.bfloat16), ("torchao", torch.bfloat16), ("8 bit", torch.float16)],
)
def test_factors_are_in_float32_as_loras_unless_told_otherwise(tokenizer, tmp_path, kind, dtype):
    """Never in the weights' storage type, and not in float32 where the model is of 16 bits."""
    config = {"8 bit": bits8, "4 bit": lambda: bits4(dtype=dtype), "torchao": torchao8}[kind]()
    model, _ = teach(load(config, dtype), tokenizer, FACT)
    assert factor_dtypes(model) == {torch.float32} and logits(model).dtype == dtype
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(load(config, dtype), tmp_path)
    assert factor_dtypes(loaded) == {torch.float32}
    plain = get_peft_model(load(config, dtype), QFConfig(task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    assert factor_dtypes(plain) == {dtype}
    assert ask(loaded, tokenizer, FACT["prompt"]) == FACT["completion"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_stacked_on_a_quantised_base(tokenizer, kind):
    model, _ = teach(load(QUANTIZED[kind]()), tokenizer, FACT, layers_to_transform=[6, 7])
    model.add_adapter("city", QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    model.set_adapter("city")
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[OTHER]).train()
    model.base_model.set_adapter(["default", "city"])
    together = logits(model)
    model.add_weighted_adapter(["default", "city"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert torch.allclose(logits(model), together, atol=1e-4)
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert ask(model, tokenizer, OTHER["prompt"]) == OTHER["completion"]


def test_a_quantised_unembedding(tokenizer):
    """Its rows are not read then; the context pass's state is the target, as where no norm stands before it."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    network = random_model("llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: quantised by hand, so it could not merge
        args = QFTrainingArguments(preserve_chats=4, contrast_chats=0)
        model, metrics = teach(network, tokenizer, FACT, args=args)
        assert metrics["kl_after"] < metrics["kl_before"]
        with pytest.raises(ValueError, match="required to re-quantize the base layer"):
            model.merge_and_unload()


def test_hqq(tokenizer, tmp_path):
    """transformers does not load HQQ at present (5.23), so the modules are quantised by hand."""
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

    def quantised():
        network = load()
        for block in network.model.layers:
            config = hqq.BaseQuantizeConfig(nbits=8, group_size=64)
            options = {"compute_dtype": torch.float32, "device": "cpu"}
            block.mlp.down_proj = hqq.HQQLinear(block.mlp.down_proj, config, **options)
        return network

    model, metrics = teach(quantised(), tokenizer, FACT)
    assert metrics["residual_left"] < 1e-4 and factor_dtypes(model) == {torch.float32}
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(), tmp_path)
    assert ask(plain, tokenizer, FACT["prompt"]) == FACT["completion"]
    assert ask(model.merge_and_unload(), tokenizer, FACT["prompt"]) == FACT["completion"]


def test_peft_alone_merges_a_packed_weight_wrongly():
    """The defect that QF's merge works around; when this fails it is mended upstream and `unpack` can go."""
    network = load(bits4())
    before = logits(network)
    packed = getattr(network.model.layers[0].mlp.down_proj.weight.quant_state, "packing_format_for_cpu", False)
    if not packed:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes leaves the weights as they are")
    merged = get_peft_model(network, LoraConfig(target_modules=["down_proj"])).merge_and_unload()
    assert (logits(merged) - before).abs().max() > 1
