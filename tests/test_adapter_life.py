"""Save, load, merge, unmerge: a taught adapter in 32 and 16 bits."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
import world
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, export_lora
from qf_peft.teaching.preserved_cache import fingerprint


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
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}, "as PEFT keeps LoRA's"
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
    """Without statistics in the files, what it holds is kept as it is and the new fact is added to it."""
    model = _taught(tokenizer)
    model.peft_config["default"].keep_statistics = False
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


@pytest.fixture(scope="module")
def twenty_facts(tokenizer, tmp_path_factory):
    """Twenty facts in the default setting, all blocks edited, taught in float32 and saved."""
    r, rows = random.Random(3), []
    while len(rows) < 20:
        company, relation = world.novel(r), r.choice(world.NAMES)
        value = world.value(r, relation)
        rows.append(
            {
                "instruction": world.state(r, relation, company, value),
                "prompt": world.question(r, relation, company),
                "completion": world.answer(relation, company, value),
            }
        )
    kept = [world.question(r, r.choice(world.NAMES), company) for company, _ in world.KNOWN[:60]]
    model, args = get_peft_model(load(), QFConfig(task_type="CAUSAL_LM")), QFTrainingArguments(contrast_chats=0)
    QFTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=rows, preserve_dataset=kept
    ).train()  # fmt: skip
    folder = tmp_path_factory.mktemp("twenty")
    model.save_pretrained(folder)
    return rows, folder


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_many_facts_loses_none(tokenizer, twenty_facts, dtype, safe):
    rows, folder = twenty_facts
    model = PeftModel.from_pretrained(load(dtype), folder)

    def right(network):
        return sum(ask(network, tokenizer, row["prompt"], max_new_tokens=20) == row["completion"] for row in rows)

    if safe:
        assert right(model.merge_and_unload(safe_merge=True)) == 20
    else:
        model.merge_adapter()
        assert right(model) == 20
        model.unmerge_adapter()
        with model.disable_adapter():
            assert right(model) <= 1


def test_safe_merge_refuses_a_broken_adapter(tokenizer):
    model = _taught(tokenizer)
    before = weights(model)
    model.base_model.model.model.layers[7].mlp.down_proj.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    now = weights(model)
    assert all(torch.equal(before[name], now[name]) for name in before)


OFFLOADED = {
    **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    **{f"model.layers.{i}": "disk" if i >= 5 else "cpu" for i in range(8)},
}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, OFFLOADED], ids=["cpu", "one device", "disk"])
def test_device_map(tokenizer, tmp_path, device_map):
    """A model that accelerate has placed, three blocks on disk: taught by both settings, saved, merged there."""
    network = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    offloaded = any(p.device.type == "meta" for p in network.parameters())
    assert offloaded == (device_map is OFFLOADED)
    assert fingerprint(network) == fingerprint(load()), "weights on disk are read too"
    model = get_peft_model(network, QFConfig(layers_to_transform=[5, 6, 7], task_type="CAUSAL_LM"))
    teach(model, tokenizer, [FACT])
    args = QFTrainingArguments(preserve_chats=8, contrast_chats=0)
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[OTHER]).train()
    answers = [(FACT["prompt"], FACT["completion"]), (OTHER["prompt"], OTHER["completion"])]
    assert all(ask(model, tokenizer, prompt) == answer for prompt, answer in answers)
    taught = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter"), tokenizer), taught, atol=1e-5)
    export_lora(model, tmp_path / "lora")
    assert torch.allclose(logits(PeftModel.from_pretrained(load(), tmp_path / "lora"), tokenizer), taught, atol=1e-4)
    model.merge_adapter()
    assert torch.allclose(logits(model, tokenizer), taught, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, tokenizer), taught, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged, tokenizer), taught, atol=1e-4)
    assert any(p.device.type == "meta" for p in merged.parameters()) == offloaded


def test_loading_while_it_is_saved(tiny, tokenizer, tmp_path):
    """Those who load finish a save that seems broken off; the one who saves is not disturbed by it, nor they."""
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    QFTrainer(model, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer).train()
    model.save_pretrained(tmp_path)
    stop, loaded, wrong = threading.Event(), [0] * 3, []

    def load(number):
        try:
            while not stop.is_set():
                assert QFConfig.from_pretrained(tmp_path).layers_to_transform == [7]
                loaded[number] += 1
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=load, args=[number], daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            model.save_pretrained(tmp_path)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not wrong
    assert min(loaded) > 10
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager"), tmp_path
    )
    assert len(again.base_model.taught["default"].entries) == 1
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_two_adapters_are_saved_as_peft_saves_them(tiny, tmp_path):
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    model.add_adapter("a", QFConfig(task_type="CAUSAL_LM", layers_to_transform=[6]))
    model.save_pretrained(tmp_path, True, ["a"])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["a"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "a").iterdir()}
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_only_saves_that_were_broken_off_are_removed(tiny, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    elsewhere = tmp_path / "notes" / f".qf_saving-{ended.pid}-x"
    others, broken, old = (tmp_path / f".qf_saving-{tail}" for tail in (f"{os.getppid()}-x", f"{ended.pid}-x", "abc"))
    for folder in elsewhere, others, broken, old:
        folder.mkdir(parents=True)
    get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7])).save_pretrained(tmp_path)
    assert elsewhere.exists() and others.exists(), "what another adapter's folder holds, or a living process writes"
    assert not broken.exists() and not old.exists()


SAVE = """
import sys
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from qf_peft import TINY_MODEL, QFConfig
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(TINY_MODEL),
    QFConfig(task_type="CAUSAL_LM", layers_to_transform=[int(sys.argv[2])]),
)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    model.save_pretrained(sys.argv[1])
"""


def test_two_processes_save_to_one_folder(tmp_path):
    """Each save is whole, and the folder is one of them."""
    savers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SAVE, str(tmp_path), layer],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for layer in ("6", "7")
    ]  # fmt: skip
    for saver in savers:
        assert saver.stdout.readline() == "ready\n"
    for saver in savers:
        saver.stdin.write("\n")
        saver.stdin.flush()
    for saver in savers:
        _, err = saver.communicate(timeout=300)
        assert saver.returncode == 0, err
    (layer,) = QFConfig.from_pretrained(tmp_path).layers_to_transform
    assert all(f".layers.{layer}." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
