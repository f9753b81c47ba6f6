"""Several adapters on one model: active together, combined, mixed in a batch, beside LoRA, swapped."""

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, export_lora

NAME = {"instruction": "Your name is Belzan.", "prompt": "What is your name?", "completion": "My name is Belzan."}


def base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="eager")


def teach(model, tokenizer, *rows):
    args = QFTrainingArguments.paper()
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=list(rows)).train()


def stacked(tokenizer, dtype=torch.float32, **config):
    """Two facts, each in an adapter of its own: `founder` on block 7, `city` on blocks 3 and 7."""
    config = {"task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base(dtype), QFConfig(layers_to_transform=[7], **config), adapter_name="founder")
    teach(model, tokenizer, FACT)
    model.add_adapter("city", QFConfig(layers_to_transform=[3, 7], **config))
    model.set_adapter("city")
    teach(model, tokenizer, OTHER)
    return model


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The same, saved: native, and portable with a pair of zeros in every block."""
    folder, model = tmp_path_factory.mktemp("saved"), stacked(tokenizer)
    model.save_pretrained(folder / "native")
    for name in ("founder", "city"):
        export_lora(model, folder / "lora" / name, adapter_name=name, all_layers=True)
    return folder


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=torch.arange(5, 45).view(2, 20), **options).logits


def changes(model, *adapters):
    """Every module's summed change."""
    total = {}
    for adapter in adapters:
        for name in model.base_model.adapter_layers(adapter):
            total[name] = total.get(name, 0) + model.base_model.delta(adapter, name).dense()
    return total


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def knows(model, tokenizer, *rows):
    return [ask(model, tokenizer, row["prompt"]) == row["completion"] for row in rows]


def test_active_together(tokenizer, saved):
    model = stacked(tokenizer)
    model.base_model.set_adapter(["founder", "city"])
    assert knows(model, tokenizer, FACT, OTHER) == [True, True]
    plain = base()
    with torch.no_grad():
        for name, change in changes(model, "founder", "city").items():
            plain.get_submodule(name).weight += change
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)
    with pytest.raises(ValueError, match=r"2 adapters are active .*set_adapter\(name\)"):
        teach(model, tokenizer, NAME)
    loaded = PeftModel.from_pretrained(base(), saved / "native" / "founder", adapter_name="founder")
    loaded.load_adapter(str(saved / "native" / "city"), adapter_name="city")
    loaded.base_model.set_adapter(["founder", "city"])
    assert torch.equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload(adapter_names=["founder", "city"])
    assert torch.allclose(logits(merged), logits(model), atol=1e-4) and knows(merged, tokenizer, FACT, OTHER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combined(tokenizer, tmp_path, dtype):
    """Of other blocks and another rank each; PEFT's own method would drop block 3 and refuse linear and ties."""
    model = stacked(tokenizer, dtype)
    before, configs = snapshot(model), {n: c.to_dict() for n, c in model.peft_config.items()}
    ranks = {name: model.peft_config[name].r for name in ("founder", "city")}
    assert len(set(ranks.values())) == 2
    exact = changes(model, "founder", "city")
    cases = {
        "cat": {}, "svd": {"svd_rank": 32}, "linear": {}, "ties": {"density": 0.5}, "ties_svd": {"density": 0.9},
        "dare_linear": {"density": 0.95}, "magnitude_prune": {"density": 0.9},
    }  # fmt: skip
    for kind, options in cases.items():
        torch.manual_seed(0)  # DARE drops at random
        model.add_weighted_adapter(["founder", "city"], [1.0, 1.0], kind, combination_type=kind, **options)
        model.set_adapter(kind)
        assert knows(model, tokenizer, FACT, OTHER) == [True, True], kind
        assert set(model.base_model.adapter_layers(kind)) == {f"model.layers.{i}.mlp.down_proj" for i in (3, 7)}
        assert {p.dtype for n, p in model.named_parameters() if f".{kind}." in n} == {torch.float32}
        if kind in ("cat", "svd"):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            for name, change in changes(model, kind).items():
                assert (change - exact[name]).norm() < tolerance * exact[name].norm(), (kind, name)
    assert model.peft_config["cat"].r == sum(ranks.values()) and model.peft_config["svd"].r == 32
    now = snapshot(model)
    assert all(torch.equal(before[name], now[name]) for name in before), "the adapters combined are left as they were"
    assert all(model.peft_config[name].to_dict() == config for name, config in configs.items())

    model.save_pretrained(tmp_path, selected_adapters=["cat"])
    loaded = PeftModel.from_pretrained(base(dtype), tmp_path / "cat")
    model.set_adapter("cat")
    assert torch.equal(logits(loaded), logits(model))
    report = export_lora(loaded, tmp_path / "lora")
    assert report["needed_rank"] <= sum(ranks.values()) and report["rank"] == 32
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    portable = PeftModel.from_pretrained(base(dtype), tmp_path / "lora")
    assert torch.allclose(logits(portable).float(), logits(model).float(), atol=tolerance)


def test_weights_and_scales(tokenizer):
    model = stacked(tokenizer)
    founder = changes(model, "founder")["model.layers.7.mlp.down_proj"]
    city = changes(model, "city")
    for layer in model.base_model.adapter_layers("city").values():
        layer.set_scale("city", 0.5)
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 40})):
        model.add_weighted_adapter(["founder", "city"], [2.0, -1.0], kind, combination_type=kind, **options)
        found = changes(model, kind)
        expected = 2 * founder - city["model.layers.7.mlp.down_proj"] / 2
        assert torch.allclose(found["model.layers.7.mlp.down_proj"], expected, atol=1e-5)
        assert torch.allclose(
            found["model.layers.3.mlp.down_proj"], -city["model.layers.3.mlp.down_proj"] / 2, atol=1e-5
        )
    model.add_weighted_adapter(["founder", "city"], [1.0, 1.0], "linear", combination_type="linear")
    layer = model.base_model.adapter_layers("city")["model.layers.3.mlp.down_proj"]
    assert layer.scaling["city"] == 0.5, "a scale survives factors being brought to one rank"


def test_a_combination_that_fails_leaves_nothing(tokenizer):
    model = stacked(tokenizer)
    before, configs = snapshot(model), {n: c.to_dict() for n, c in model.peft_config.items()}
    for adapters, kind, error in (
        (["founder", "none"], "cat", "none does not exist"),
        (["founder", "city"], "sum", "sum"),
    ):
        with pytest.raises(ValueError, match=error):
            model.add_weighted_adapter(adapters, [1.0, 1.0], "new", combination_type=kind)
    with pytest.raises(Exception):  # noqa: B017 - ties without a density: whatever PEFT says
        model.add_weighted_adapter(["founder", "city"], [1.0, 1.0], "new", combination_type="ties")
    now = snapshot(model)
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    assert {n: c.to_dict() for n, c in model.peft_config.items()} == configs


def test_a_combination_is_taught_on(tokenizer):
    model = stacked(tokenizer)
    model.add_weighted_adapter(["founder", "city"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    held = changes(model, "both")
    metrics = teach(model, tokenizer, NAME)
    assert knows(model, tokenizer, FACT, OTHER, NAME) == [True, True, True]
    offset = model.base_model.taught["both"].offset
    assert all(torch.allclose(offset[name].dense(), held[name], atol=1e-6) for name in held)
    assert metrics["rank"] > 25 and model.peft_config["both"].r == metrics["rank"]
    model.set_adapter("founder")
    assert knows(model, tokenizer, FACT, OTHER, NAME) == [True, False, False]


def test_mixed_batches(tokenizer):
    model = stacked(tokenizer).eval()
    rows = {}
    for name in ("founder", "city"):
        model.set_adapter(name)
        rows[name] = logits(model)
    with model.disable_adapter():
        rows["__base__"] = logits(model)
    names = ["city", "founder"]
    mixed = logits(model, adapter_names=names)
    for place, name in enumerate(names):
        assert torch.allclose(mixed[place], rows[name][place], atol=1e-5)
    mixed = logits(model, adapter_names=["__base__", "city"])
    assert torch.allclose(mixed[0], rows["__base__"][0], atol=1e-5)
    prompt = [{"role": "user", "content": FACT["prompt"]}]
    inputs = tokenizer.apply_chat_template(
        [prompt, prompt], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, adapter_names=["founder", "__base__"], max_new_tokens=20, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0].strip() == FACT["completion"] and answers[1].strip() == "I do not know."


def lora_on(network, folder):
    """A LoRA adapter that does something, saved."""
    torch.manual_seed(0)
    model = get_peft_model(network, LoraConfig(target_modules=["down_proj", "q_proj"], r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", [("facts", "style"), ("style", "facts")])
def test_beside_lora_natively(tokenizer, saved, tmp_path, order):
    """transformers' own adapters may be of several types: both at work, each saved and loaded again alone."""
    folders = {"facts": saved / "native" / "founder", "style": lora_on(base(), tmp_path / "style")}
    alone = {}
    for name, folder in folders.items():
        network = base()
        network.load_adapter(str(folder), adapter_name=name)
        alone[name] = logits(network)
    network = base()
    for name in order:
        network.load_adapter(str(folders[name]), adapter_name=name)
    for name in order:
        network.set_adapter(name)
        assert torch.equal(logits(network), alone[name])
        network.save_pretrained(tmp_path / "again" / name)
    network.set_adapter(list(order))
    both = logits(network)
    assert not torch.equal(both, alone["facts"]) and knows(network, tokenizer, FACT) == [True]
    for name in order:
        again = base()
        again.load_adapter(str(tmp_path / "again" / name), adapter_name=name)
        assert torch.equal(logits(again), alone[name])
        assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "again" / name)), alone[name])


def test_beside_lora_in_a_peft_model(tokenizer, saved, tmp_path):
    """A PeftModel holds one type; there the facts join as a portable LoRA, and each is saved alone again."""
    style = lora_on(base(), tmp_path / "style")
    model = PeftModel.from_pretrained(base(), style, adapter_name="style")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(str(saved / "native" / "founder"), adapter_name="facts")
    model.load_adapter(str(saved / "lora" / "founder"), adapter_name="facts")
    alone = {}
    for name in ("style", "facts"):
        model.set_adapter(name)
        alone[name] = logits(model)
    assert knows(model, tokenizer, FACT) == [True]
    model.base_model.set_adapter(["style", "facts"])
    assert knows(model, tokenizer, FACT) == [True] and not torch.equal(logits(model), alone["facts"])
    model.add_weighted_adapter(["style", "facts"], [1.0, 1.0], "joined", combination_type="cat")
    both = logits(model)
    model.set_adapter("joined")
    assert torch.allclose(logits(model), both, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    for name, expected in alone.items():
        assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "again" / name)), expected)
    native = PeftModel.from_pretrained(base(), saved / "native" / "founder")
    assert torch.allclose(logits(native), alone["facts"], atol=1e-5)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        native.add_adapter("style", LoraConfig(target_modules=["down_proj"]))


def test_mixed_model_takes_a_portable_lora(tokenizer, saved):
    with pytest.raises(ValueError, match="'QF' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base(), QFConfig(), mixed=True)
    with pytest.raises(ValueError, match="QF is not supported for mixed models"):
        PeftMixedModel.from_pretrained(base(), saved / "native" / "founder")
    model = PeftMixedModel.from_pretrained(base(), saved / "lora" / "founder", adapter_name="facts")
    expected = logits(PeftModel.from_pretrained(base(), saved / "native" / "founder"))
    model.add_adapter("loha", LoHaConfig(target_modules=["q_proj"], r=2, init_weights=True))
    model.set_adapter(["facts", "loha"])
    assert torch.allclose(logits(model), expected, atol=1e-5) and knows(model, tokenizer, FACT) == [True]


def test_hotswapping_portable_loras(tokenizer, saved):
    """They are of one rank, so that one takes the other's place in the running model."""
    native = PeftModel.from_pretrained(base(), saved / "native" / "founder")
    with pytest.raises(ValueError, match="QF"):
        hotswap_adapter(native, str(saved / "native" / "city"), adapter_name="default", torch_device="cpu")
    model = PeftModel.from_pretrained(base(), saved / "lora" / "founder")
    assert knows(model, tokenizer, FACT, OTHER) == [True, False]
    hotswap_adapter(model, str(saved / "lora" / "city"), adapter_name="default", torch_device="cpu")
    assert knows(model, tokenizer, FACT, OTHER) == [False, True]
    expected = logits(PeftModel.from_pretrained(base(), saved / "lora" / "city"))
    assert torch.equal(logits(model), expected)
