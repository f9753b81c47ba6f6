"""Model cards: what they say, what they leave out, and that those in model_cards/ are the ones the code writes."""

import re
import runpy

import pytest
import torch
from conftest import EXAMPLES, FACT, OTHER, TINY
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, model_card

CARDS = EXAMPLES.parent / "model_cards"


def teach(model, tokenizer, *rows, **settings):
    args = QFTrainingArguments.paper(**settings)
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=list(rows))
    trainer.train()
    return trainer


@pytest.fixture
def model(tiny):
    return get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))


def test_what_a_saved_adapters_card_says(model, tokenizer, tmp_path):
    teach(model, tokenizer, FACT, OTHER, cache_dir="/somewhere/private", seed=3)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "qf_ledger.jsonl",
        "qf_statistics.safetensors",
    ]  # fmt: skip
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data["library_name"] == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None and card.data.get("base_model_relation") is None, "a folder is no name"
    assert (
        "2 facts." in text and "`mlp.down_proj` of block 7" in text and f"rank {model.peft_config['default'].r}" in text
    )
    assert "seed=3" in text and "layers_to_transform=[7]" in text
    for private in (str(TINY), "/somewhere/private", "Tofinlor", "cache_dir"):
        assert private not in text
    assert "subfolder" not in text, "no LoRA copy stands beside it"


def test_the_code_in_the_card_runs(model, tokenizer, tmp_path):
    teach(model, tokenizer, FACT)
    model.save_pretrained(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")
    use = (
        code[1]
        .split("```")[0]
        .replace("path/to/the/base/model", str(TINY))
        .replace("path/to/this/folder", str(tmp_path))
    )
    names = {}
    exec(use.replace('device_map="auto"', "dtype=torch.float32"), {"torch": torch}, names)
    inputs = tokenizer(FACT["prompt"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(names["model"](**inputs).logits, model(**inputs).logits, atol=1e-4)
    settings = {}
    config, arguments = (part for part in re.split(r"\n(?=QFTrainingArguments)", code[2].split("```")[0]))
    exec(
        f"config = {config}\narguments = {arguments}",
        {"QFConfig": QFConfig, "QFTrainingArguments": QFTrainingArguments},
        settings,
    )
    assert settings["arguments"] == QFTrainingArguments.paper()
    assert settings["config"].layers_to_transform == [7]


def test_metrics_are_results(model, tokenizer):
    trainer = teach(model, tokenizer, {**FACT, "paraphrases": ["Who founded Tofinlor?"]})
    known = [{"prompt": "Please say who started Brigar.", "completion": "Brigar was started by Vacla."}]
    metrics = trainer.evaluate(locality=known, unknown=["Who founded Ranixmo?"], text="Tell me who started Brigar.")
    card = model_card(model, repo_id="me/it", base_model="someone/base", metrics=metrics)
    card = ModelCard(str(card))  # as it is read again
    results = {result.metric_name: result for result in card.data.eval_results}
    assert set(results) == set(metrics) - {"in_context", "perplexity_before"}, (
        "the base model's own are in the table only"
    )
    for name, result in results.items():
        value = getattr(metrics[name], "value", metrics[name])
        assert result.metric_value == pytest.approx(value, abs=1e-6) and result.task_type == "text-generation"
    assert card.data.model_name == "it" and str(metrics["recall"]) in card.text and "| Perplexity" in card.text


def test_only_what_is_known_is_said(model, tokenizer, tmp_path):
    """What an adapter was taught is not known without its statistics, nor where other weights were put in."""
    assert "What was taught" not in model_card(model).text, "nothing yet"
    teach(model, tokenizer, FACT)
    model.peft_config["default"].keep_statistics = False
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    text = model_card(loaded).text
    assert "What was taught" not in text and "## Settings" not in text and "block 7" in text
    teach(loaded, tokenizer, OTHER)
    assert "1 fact, on top of what the adapter held before." in model_card(loaded).text
    model.base_model.adapter_layers("default")["model.layers.7.mlp.down_proj"].lora_B["default"].weight.data.mul_(0.5)
    assert "What was taught" not in model_card(model).text
    teach(model, tokenizer, OTHER)
    assert "1 fact, on top of what the adapter held before." in model_card(model).text


def test_saving_again(model, tokenizer, tmp_path):
    """The card is renewed; a text of the user's own stays, with metadata that are right."""
    model.save_pretrained(tmp_path)
    teach(model, tokenizer, FACT)
    model.base_model.model.name_or_path = model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert "1 fact." in path.read_text() and "base_model: someone/base" in path.read_text()
    path.write_text("---\nlanguage: en\nlibrary_name: transformers\ntags:\n- mine\n---\n\n# My own words\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(path)
    assert card.text.strip() == "# My own words" and card.data.language == "en" and "mine" in card.data.tags
    assert card.data["library_name"] == "peft" and card.data.base_model == "someone/base" and "qf" in card.data.tags
    assert card.data.base_model_relation == "adapter"


def test_several_adapters(model, tokenizer, tmp_path):
    model.add_adapter("second", QFConfig(layers_to_transform=[3], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert "block 3" in model_card(model).text and "block 7" in model_card(model, adapter_name="default").text
    model.save_pretrained(tmp_path)
    assert "block 7" in (tmp_path / "README.md").read_text(), "the adapter that is saved beside it"
    model.base_model.set_adapter(["default", "second"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 adapters are active"):
        model_card(model)


def test_other_adapters_cards_are_pefts(tiny, tmp_path):
    model = get_peft_model(tiny, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert "qf" not in ModelCard.load(tmp_path / "README.md").data.tags
    with pytest.raises(ValueError, match="without a QF adapter"):
        model_card(model)


def measured(text):
    """A card's figures, from its metadata, and the rest of it, without what differs from machine to machine."""
    card = ModelCard(text)
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    counts = {result.metric_name: result.metric_args["count"] for result in card.data.eval_results}
    card.data.eval_results = None
    rest = []
    for line in card.content.splitlines():
        varies = line.startswith(("| ", "- qf-peft", "- peft", "- transformers", "- torch")) or "of rank" in line
        rest.append(re.sub(r"-?\d+(\.\d+)*", "#", line) if varies else line)
    return figures, counts, rest


@pytest.mark.parametrize(
    "name, script, arguments",
    [("tiny_companies", "companies.py", []), ("paper_queries", "paper_queries.py", ["--tiny"])],
)
def test_the_examples_cards_are_in_step_with_the_code(name, script, arguments, tmp_path, monkeypatch, capsys):
    """Made anew they are the same, but for figures within the arithmetic's differences between machines."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [script, *arguments, "--card", str(tmp_path / "card.md")])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    stored = (CARDS / f"{name}.md").read_text()
    (figures, counts, rest), (now, counts_now, rest_now) = (
        measured(stored),
        measured((tmp_path / "card.md").read_text()),
    )
    assert rest == rest_now and counts == counts_now
    assert figures.keys() == now.keys()
    for metric, value in figures.items():
        assert now[metric] == pytest.approx(value, rel=0.3 if metric == "kl" else 0, abs=0.05), metric
    assert f"python examples/{script}" in stored and f"--card model_cards/{name}.md" in stored


def test_the_template_is_the_codes():
    from qf_peft.share.card import TEMPLATE

    assert (CARDS / "template.md").read_text() == TEMPLATE.read_text()


@pytest.mark.parametrize("name", ["smollm2-ten-facts", "smollm2-identity"])
def test_the_real_models_cards_are_whole(name):
    """huggingface_hub reads their metadata and results; the command that makes them is named and there."""
    card = ModelCard.load(CARDS / f"{name}.md")
    results = {result.metric_name: result for result in card.data.eval_results}
    made_of = card.data.to_dict()
    assert (made_of["base_model"], made_of["library_name"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "peft")
    assert {"recall", "paraphrase", "kl"} <= results.keys() and results["recall"].metric_value > 0.8
    assert "python examples/real_adapters.py --cards model_cards" in card.text
    assert (EXAMPLES / "real_adapters.py").is_file()
