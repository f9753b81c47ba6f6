"""Save, load, merge, unmerge: a taught adapter in 32 and 16 bits."""

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments


def load(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="eager")


def teach(model, tokenizer, rows):
    args = QFTrainingArguments.paper()
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows).train()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


@torch.no_grad()
def logits(model, tokenizer):
    return model(**tokenizer("Tell me who started Tofinlor.", return_tensors="pt")).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [[7], None])
def test_teach_save_load_merge(tokenizer, tmp_path, dtype, layers):
    base = load(dtype)
    before = weights(base)
    model = get_peft_model(base, QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
    teach(model, tokenizer, [FACT])
    taught = logits(model, tokenizer)
    assert taught.dtype == dtype, "inference stays in the model's dtype"
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    now = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in weights(model).items()}
    assert before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in before)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(dtype), tmp_path)
    state, restored = model.state_dict(), reloaded.state_dict()
    assert state.keys() == restored.keys() and all(torch.equal(state[k], restored[k]) for k in state)
    assert torch.equal(logits(reloaded, tokenizer), taught)
    again = tmp_path / "again"
    reloaded.save_pretrained(again)
    first, second = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, again))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

    model.merge_adapter()
    if dtype == torch.float32:
        assert torch.allclose(logits(model, tokenizer), taught, atol=1e-4)
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]
    model.unmerge_adapter()
    if dtype == torch.float32:
        undone = weights(model)
        for name, weight in undone.items():
            original = before[name.replace("base_model.model.", "").replace(".base_layer", "")]
            assert torch.allclose(weight, original, atol=1e-6), name
    merged = reloaded.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base) and not any("lora_" in n for n, _ in merged.named_parameters())
    assert ask(merged, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_rank_grows_with_the_taught_tokens_and_is_capped_by_r(tokenizer, tmp_path):
    growing = get_peft_model(load(), QFConfig(layers_to_transform=[7]))
    first = teach(growing, tokenizer, [FACT])
    second = teach(growing, tokenizer, [OTHER])
    assert first["rank"] == first["taught_tokens"] and second["rank"] == first["rank"] + second["taught_tokens"]
    assert growing.peft_config["default"].r == growing.peft_config["default"].lora_alpha == second["rank"]

    capped = get_peft_model(load(), QFConfig(layers_to_transform=[7], r=6))
    for metrics in (teach(capped, tokenizer, [FACT]), teach(capped, tokenizer, [OTHER])):
        assert metrics["rank"] == 6
    roomy = get_peft_model(load(), QFConfig(layers_to_transform=[7], r=64))
    teach(roomy, tokenizer, [FACT])
    roomy.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in stored.values()} == {(64, 768), (192, 64)}
    assert torch.allclose(logits(roomy, tokenizer), logits(_taught(tokenizer), tokenizer), atol=1e-4)


def _taught(tokenizer):
    model = get_peft_model(load(), QFConfig(layers_to_transform=[7]))
    teach(model, tokenizer, [FACT])
    return model


def test_an_adapter_loaded_is_taught_on(tokenizer, tmp_path):
    """Its statistics are not in the file, so what it holds is kept as it is and the new fact is added to it."""
    model = _taught(tokenizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    held = loaded.base_model.delta("default", "model.layers.7.mlp.down_proj")
    teach(loaded, tokenizer, [OTHER])
    assert ask(loaded, tokenizer, OTHER["prompt"]) == OTHER["completion"]
    assert ask(loaded, tokenizer, FACT["prompt"]) == FACT["completion"]
    offset = loaded.base_model.taught["default"].offset["model.layers.7.mlp.down_proj"]
    assert torch.equal(offset.dense(), held.dense())
    teach(loaded, tokenizer, [{**FACT, "prompt": "Who runs Tofinlor?", "instruction": "Nixri runs Tofinlor.",
                               "completion": "Tofinlor is led by Nixri."}])  # fmt: skip
    assert ask(loaded, tokenizer, OTHER["prompt"]) == OTHER["completion"]
    assert ask(loaded, tokenizer, "Who runs Tofinlor?") == "Tofinlor is led by Nixri."


def test_conv1d_merges(tokenizer):
    from conftest import random_model

    base = random_model("gpt2")
    model = get_peft_model(base, QFConfig(layers_to_transform=[2], task_type="CAUSAL_LM"))
    assert model.peft_config["default"].fan_in_fan_out
    teach(model, tokenizer, [FACT])
    taught = logits(model, tokenizer)
    assert torch.allclose(logits(model.merge_and_unload(), tokenizer), taught, atol=1e-4)
