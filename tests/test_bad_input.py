"""Unfit input: each is refused with a message that names the row, field or module and says what to do."""

import pytest
import torch
from conftest import FACT, OTHER, TINY, random_model
from peft import LoraConfig, PeftMixedModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments


@pytest.fixture(scope="module")
def model():
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    return get_peft_model(base, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))


def without(key):
    return {k: v for k, v in FACT.items() if k != key}


def message(role, content="text"):
    return {"role": role, "content": content}


BAD_ROWS = {
    "empty dataset": ([], "train_dataset is empty; give at least one row"),
    "a string": ("facts.jsonl", "train_dataset is a str; expected a list of dicts"),
    "one dict": (FACT, "train_dataset is a dict; expected a list of dicts"),
    "not a dict": ([FACT, "Qi"], "row 1 is a str; expected a dict"),
    "no instruction": ([FACT, without("instruction")], r"row 1: no column 'instruction' \(it has"),
    "no prompt": ([without("prompt")], "row 0: no column 'prompt'"),
    "misspelt required": ([{**without("prompt"), "promt": "x"}], "unknown column 'promt'; did you mean 'prompt'"),
    "misspelt optional": ([{**FACT, "significances": 1}], "'significances'; did you mean 'significance'"),
    "misspelt plural": ([FACT, {**without("completion"), "completions": "x"}], "row 1: .*did you mean 'completion'"),
    "empty instruction": ([{**FACT, "instruction": "  "}], "row 0: instruction is empty"),
    "empty prompt": ([{**FACT, "prompt": ""}], "row 0: prompt is empty"),
    "no prompt messages": ([{**FACT, "prompt": []}], "row 0: prompt is empty"),
    "empty completion": ([FACT, {**FACT, "completion": " "}], "row 1: completion is empty; leave the column out"),
    "instruction a number": ([{**FACT, "instruction": 7}], "row 0: instruction is a int; expected a string or"),
    "not a message": ([{**FACT, "prompt": ["hello"]}], "row 0: prompt: 'hello' is not a message"),
    "message without text": ([{**FACT, "prompt": [message("user", None)]}], "of a user message is not a string"),
    "two completions": ([{**FACT, "completion": [message("user"), message("assistant")]}], "expected one assistant"),
    "messages without system": ([{"messages": [message("user"), message("assistant")]}], "begin with one system"),
    "messages without prompt": ([{"messages": [message("system"), message("assistant")]}], "messages has no prompt"),
    "empty system": ([{"messages": [message("system", " "), message("user")]}], "the system message .* is empty"),
    "significance too short": ([{**FACT, "significance": [1, 1]}], "has 2 numbers; the completion has 5 words"),
    "significance negative": ([{**FACT, "significance": [1, 1, -1, 1, 1]}], "row 0: significance -1; expected"),
    "significance not finite": ([{**FACT, "significance": float("nan")}], "row 0: significance nan; expected"),
    "significance a word": ([{**FACT, "significance": "high"}], "row 0: significance 'high' is not a number"),
    "significance all zero": ([{**FACT, "significance": [0] * 5}], "all zero, so nothing would be taught"),
    "significance zero": ([{**FACT, "significance": 0}], "significance is all zero"),
    "words without completion": ([{**without("completion"), "significance": [1]}], "per word needs a completion"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows(model, tokenizer, case):
    rows, expected = BAD_ROWS[case]
    with pytest.raises(ValueError, match=expected):
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows)


def test_missing_arguments(model, tokenizer):
    with pytest.raises(ValueError, match="processing_class is missing; give the model's tokenizer"):
        QFTrainer(model=model, train_dataset=[FACT])
    with pytest.raises(ValueError, match="train_dataset is missing"):
        QFTrainer(model=model, processing_class=tokenizer).train()
    with pytest.raises(ValueError, match="args is a dict; expected QFTrainingArguments"):
        QFTrainer(model=model, args={}, processing_class=tokenizer, train_dataset=[FACT])
    for name in ("batch_tokens", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0; expected a positive integer"):
            QFTrainingArguments(**{name: 0})


def test_tokenizer_without_padding_token(model):
    bare = AutoTokenizer.from_pretrained(TINY)
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        QFTrainer(model=model, processing_class=bare, train_dataset=[FACT])


@pytest.mark.parametrize("refuses", ["raises", "leaves it out"])
def test_template_without_system_role(model, refuses):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    check = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    silent = "{% if m['role'] != 'system' %}"
    template = tokenizer.chat_template
    if refuses == "raises":
        tokenizer.chat_template = template.replace("%}<|im_start|>{{m", "%}" + check + "<|im_start|>{{m", 1)
    else:
        tokenizer.chat_template = template.replace("%}<|im_start|>{{m", "%}" + silent + "<|im_start|>{{m", 1).replace(
            "{% endfor %}", "{% endif %}{% endfor %}"
        )
    assert tokenizer.chat_template != template
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=[OTHER, FACT])
    with pytest.raises(ValueError, match=r"row 0: .*no system role, give the instruction as a list of messages"):
        trainer.train()
    turns = [message("user", "Zanmi founded Tofinlor."), message("assistant", "I see.")]
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=[{**FACT, "instruction": turns}])
    assert trainer.train()["facts"] == 1, "the advice in the message works"


def test_messages_without_a_template(model):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=[{**FACT, "prompt": [message("user")]}])
    with pytest.raises(ValueError, match="row 0: prompt is a list of messages, but the tokenizer has no chat template"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["down"]}, r"\['down'\] matches no module of Qwen2ForCausalLM.*'mlp.down_proj'"),
        ({"target_modules": r".*\.nothing"}, "matches no module"),
        ({"target_modules": ["input_layernorm"]}, "Qwen2RMSNorm.* is not supported"),
        ({"target_modules": ["mlp"]}, "(?s)Qwen2MLP.* is not supported"),
        ({"layers_to_transform": [2, 3]}, "layer 3 is out of range; the modules .* are in layers 0 to 2"),
        ({"layers_to_transform": -1}, "layer -1 is out of range"),
    ],
)  # fmt: skip
def test_targets(settings, expected):
    base = random_model("qwen2")
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match=expected):
        get_peft_model(base, QFConfig(**settings))
    assert [n for n, _ in base.named_modules()] == names, "the model was not touched"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["embed_tokens", "down_proj"], "'model.embed_tokens', a Embedding, which is not linear; QFTrainer changes"),
        (["lm_head"], "'lm_head' lies in no numbered block"),
    ],
)
def test_what_cannot_be_taught_is_wrapped_and_refused_by_the_trainer(tokenizer, names, expected):
    model = get_peft_model(random_model("qwen2", tie_word_embeddings=False), QFConfig(target_modules=names))
    with pytest.raises(ValueError, match=expected):
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=[FACT])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 0}, "r=0; expected a positive integer"),
        ({"r": 2.5}, "r=2.5; expected a positive integer"),
        ({"lora_alpha": 0}, "lora_alpha=0; expected a positive number"),
        ({"rank_pattern": {"down_proj": 1.5}}, "rank_pattern=.*expected positive numbers"),
        ({"use_dora": True}, "use_dora=True is an option of LoRA that a QF adapter does not have"),
        ({"lora_bias": True}, "lora_bias=True is an option of LoRA that a QF adapter does not have"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is an option of LoRA that .* expected one of"),
    ],
)
def test_options_of_lora(settings, expected):
    with pytest.raises(ValueError, match=expected):
        QFConfig(**settings)


def trainer(model, tokenizer, rows=(FACT,)):
    args = QFTrainingArguments.paper()
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=list(rows))


def test_model_without_qf_adapter(tiny, tokenizer):
    with pytest.raises(ValueError, match=r"model is a Qwen2ForCausalLM without a QF adapter; give get_peft_model"):
        trainer(tiny, tokenizer)
    lora = get_peft_model(tiny, LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"adapter 'default' is a LORA adapter; .*merge_and_unload"):
        trainer(lora, tokenizer)
    mixed = PeftMixedModel(lora.unload(), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="is a LORA adapter"):
        trainer(mixed, tokenizer)


def test_a_lora_adapter_active_under_the_qf_adapter(tiny, tokenizer):
    tiny.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="style")
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7]))
    trainer(model, tokenizer).train()
    model.get_base_model().set_adapter("style")  # transformers' own method, past PEFT's wrapper
    with pytest.raises(ValueError, match=r"q_proj has an active adapter 'style' that is not a QF adapter"):
        trainer(model, tokenizer).train()


def test_adapters_in_the_wrong_state(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    ready = trainer(model, tokenizer)
    ready.train()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into .*down_proj; call model.unmerge_adapter\(\)"):
        ready.train()
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="are disabled; enable them before teaching"):
        ready.train()
    model.add_adapter("other", QFConfig(layers_to_transform=[7]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"made for the adapter 'default', but 'other' is active now"):
        ready.train()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        trainer(model, tokenizer)


def test_text_longer_than_the_models_positions(tokenizer):
    model = get_peft_model(
        random_model("gpt2", max_position_embeddings=40, n_positions=40), QFConfig(layers_to_transform=[2])
    )
    long = {**FACT, "instruction": "Zanmi founded Tofinlor. " * 4}
    with pytest.raises(ValueError, match=r"row 1 has \d+ tokens with its instruction; the model has 40 positions"):
        trainer(model, tokenizer, [{"instruction": "A b.", "prompt": "C", "completion": "D"}, long]).train()


@pytest.mark.parametrize("where", ["base", "later block"])
def test_activations_that_are_not_finite(tiny, tokenizer, where):
    block = tiny.model.layers[0 if where == "base" else 7]
    block.mlp.up_proj.weight.data[3] = float("inf")
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    with pytest.raises(FloatingPointError, match=r"row 0: the activations at .* are not finite"):
        trainer(model, tokenizer, [FACT, OTHER]).train()
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_an_answer_that_does_not_end(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments(max_new_tokens=2)
    row = {k: FACT[k] for k in ("instruction", "prompt")}
    with pytest.raises(ValueError, match="row 1: the model's own answer does not end within 2 tokens"):
        QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT, row]).train()
