"""What users of PEFT expect of a tuner: LoRA's options, trainable factors, modules of any place and kind."""

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

FIXED = {"layers_to_transform": [6, 7], "task_type": "CAUSAL_LM"}


def teach(model, tokenizer, rows, args=None):
    trainer = QFTrainer(model, args or QFTrainingArguments.paper(), rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def changes(model, adapter="default"):
    """The changes of the weights as PEFT itself computes them to merge."""
    layers = {n: m for n, m in model.base_model.model.named_modules() if adapter in getattr(m, "lora_A", ())}
    return {n: m.get_delta_weight(adapter).detach().clone() for n, m in layers.items()}


def base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


class Mixed(nn.Module):
    """A module of every kind that LoRA takes, none of them in a numbered block."""

    def __init__(self):
        super().__init__()
        self.embed, self.plain, self.conv1d = nn.Embedding(11, 6), nn.Linear(6, 6), Conv1D(6, 6)
        self.image = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, ids):
        states = self.conv1d(self.plain(self.embed(ids)))
        return self.image(states[:, None]).sum(1)


@pytest.mark.parametrize("initial", [True, False, "gaussian"])
def test_modules_of_any_place_and_kind(tmp_path, initial):
    torch.manual_seed(0)
    network, ids = Mixed(), torch.arange(10).reshape(2, 5)
    before = network(ids).detach()
    config = QFConfig(target_modules=["embed", "plain", "conv1d", "image"], r=3, init_lora_weights=initial)
    model = get_peft_model(network, config)
    assert torch.equal(model(ids), before) == (initial is not False), "only random factors change anything"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(ids).pow(2).sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)
    expected = model(ids)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mixed(), tmp_path)
    assert torch.allclose(loaded(ids), expected) and not any(p.requires_grad for p in loaded.parameters())
    assert torch.allclose(model.merge_and_unload()(ids), expected, atol=1e-4)


OPTIONS = {  # ranks that leave room for both facts
    "alpha": {"r": 40, "lora_alpha": 320},
    "odd alpha": {"r": 41, "lora_alpha": 3},
    "rank-stabilised": {"r": 40, "lora_alpha": 2, "use_rslora": True},
    "alpha while it grows": {"lora_alpha": 5},
    "alpha of one module while it grows": {"alpha_pattern": {"layers.7.mlp.down_proj": 3}},
    "patterns": {"r": 40, "rank_pattern": {"layers.6.mlp.down_proj": 50}, "alpha_pattern": {"down_proj": 3}},
    "dropout": {"lora_dropout": 0.5, "r": 40},
    "others": {"bias": "all", "modules_to_save": ["norm"], "r": 40},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_taught_does_not_depend_on_how_it_is_scaled(tokenizer, tmp_path, case):
    """Two lessons, and one taken back: the weights change as they do by default; so after loading."""
    found = []
    for options in (OPTIONS[case], {}):
        model = get_peft_model(base(), QFConfig(target_modules=["down_proj"], **FIXED, **options))
        teach(model, tokenizer, [FACT])
        trainer = teach(model, tokenizer, [OTHER])
        model.save_pretrained(tmp_path / str(bool(options)))
        both = changes(model)
        trainer.forget(trainer.facts[0].id)
        found.append((model, both, changes(model)))
    (model, *ours), (_, *theirs) = found
    for mine, default in zip(ours, theirs, strict=True):
        assert mine.keys() == default.keys() and all(d.norm() > 0 for d in default.values())
        assert all(torch.allclose(mine[n], default[n], atol=1e-4 * float(d.abs().max())) for n, d in default.items())
    config, layer = model.peft_config["default"], model.base_model.model.model.layers[6].mlp.down_proj
    assert QFConfig(rank_pattern={"down_proj": 3}).r == 8, "LoRA's"
    if "r" in OPTIONS[case]:
        assert config.r == OPTIONS[case]["r"] and config.lora_alpha == OPTIONS[case].get("lora_alpha", config.r)
    assert layer.r["default"] == config.rank_pattern.get("layers.6.mlp.down_proj", config.r)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "True")
    assert all(torch.equal(d, changes(loaded)[n]) for n, d in ours[0].items())
    assert len(loaded.base_model.taught["default"].entries) == 2
    assert ask(loaded, tokenizer, OTHER["prompt"]) == OTHER["completion"]


def test_adapters_of_different_scale_are_combined(tokenizer):
    model = get_peft_model(base(), QFConfig(target_modules=["down_proj"], r=30, lora_alpha=18, **FIXED))
    teach(model, tokenizer, [FACT])
    model.add_adapter("other", QFConfig(target_modules=["down_proj"], r=20, lora_alpha=2, use_rslora=True, **FIXED))
    model.set_adapter("other")
    teach(model, tokenizer, [OTHER])
    before = {name: changes(model, name) for name in ("default", "other")}
    for kind in ("cat", "svd"):
        options = {"svd_rank": 50} if kind == "svd" else {}
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], kind, combination_type=kind, **options)
        for name, delta in changes(model, kind).items():
            wanted = 0.5 * before["default"][name] + 2.0 * before["other"][name]
            assert torch.allclose(delta, wanted, atol=1e-4 * float(wanted.abs().max())), kind
    assert all(torch.equal(d, changes(model, n)[m]) for n, found in before.items() for m, d in found.items())


def test_no_graph_is_built_while_teaching_and_evaluating(tokenizer):
    model = get_peft_model(base(), QFConfig(task_type="CAUSAL_LM"))
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda *given: seen.append(given[2].requires_grad))
    args = QFTrainingArguments(preserve_chats=4, contrast_chats=0, max_new_tokens=8)
    trainer = teach(model, tokenizer, [FACT], args)
    trainer.evaluate(unknown=["Who founded Ranixmo?"], text="Zanmi founded Tofinlor.")
    trainer.dry_run()
    assert len(seen) > 10 and not any(seen)
    assert all(p.requires_grad and p.is_leaf for n, p in model.named_parameters() if "lora_" in n)
    assert model(**tokenizer("Who?", return_tensors="pt")).logits.requires_grad, "but whoever trains on has one"


def test_a_taught_adapter_is_trained_on_in_every_direction(tokenizer):
    """Also in those that the lesson left free, and in modules that it did not change."""
    model = get_peft_model(base(), QFConfig(target_modules=["down_proj"], r=40, task_type="CAUSAL_LM"))
    trainer = teach(model, tokenizer, [FACT], QFTrainingArguments(preserve_chats=4, contrast_chats=0))
    tuner = model.base_model
    first = next(iter(tuner.adapter_layers("default")))
    tuner.set_factors("default", {first: tuple(0 * part for part in tuner.factors("default", first))})
    batch = tokenizer([FACT["completion"]], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    factors = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(factors) == 8 and all(bool(p.grad.any(dim=0).all()) for p in factors.values())
    with torch.no_grad():
        for parameter in factors.values():
            parameter -= 1e-4 * parameter.grad
    trainer = teach(model, tokenizer, [OTHER])
    assert [fact.settled for fact in trainer.facts] == [True, False], "the lesson that was trained on is not undone"
