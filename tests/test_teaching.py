"""What the trainer does with rows: forms, batches, self-answered rows, failure, modes, metrics."""

import random

import pytest
import torch
from conftest import FACT, OTHER, ask, random_model
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows

NAME = "model.layers.7.mlp.down_proj"


def qf(base, **settings):
    return get_peft_model(base, QFConfig(**{"layers_to_transform": [7], **settings}, task_type="CAUSAL_LM"))


def teach(model, tokenizer, rows, **settings):
    args = QFTrainingArguments.paper(**settings)
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows).train()


def delta(model, name=NAME):
    return model.base_model.delta("default", name).dense()


def facts(n, seed=0):
    from world import RELATIONS, answer, novel, phrase, state, value

    r, rows = random.Random(seed), []
    for _ in range(n):
        relation, x = r.choice(list(RELATIONS)), novel(r)
        y = value(r, relation)
        question = phrase("Tell me {a}.", RELATIONS[relation]["asks"][0], x)
        rows.append({"instruction": state(r, relation, x, y), "prompt": question, "completion": answer(relation, x, y)})
    return rows


def test_metrics_and_a_better_model(tiny, tokenizer):
    model = qf(tiny)
    metrics = teach(model, tokenizer, [FACT, OTHER])
    assert metrics["facts"] == 2 and metrics["taught_tokens"] == 25 and metrics["rank"] == 25
    assert metrics["kl_before"] > 1 and metrics["kl_after"] < 0.01 and metrics["residual_left"] < 0.01
    assert metrics["forward_passes"] == 2.12 and metrics["seconds"] > 0
    for row in (FACT, OTHER):
        assert ask(model, tokenizer, row["prompt"]) == row["completion"]
    assert ask(model, tokenizer, "Who founded Tofinlor?") == FACT["completion"]
    assert ask(model, tokenizer, "Please say who started Brigar.") == "Brigar was started by Vacla."


def test_kl_is_what_the_logits_say(tiny, tokenizer):
    """The metric against logits of whole passes, one row at a time."""
    rows = [FACT, OTHER]
    encoder = Encoder(tokenizer)

    @torch.no_grad()
    def predictions(model, ids, taught):
        return model(input_ids=torch.tensor([ids[:-1]])).logits[0, -taught:].double().log_softmax(-1)

    def mean_kl(model):
        total = []
        for row in read_rows(rows):
            e = encoder.encode(row)
            p, q = context[row.index], predictions(model, e.bare_ids, e.taught)
            total.append((p.exp() * (p - q)).sum(-1))
        return float(torch.cat(total).mean())

    context = [predictions(tiny, e.context_ids, e.taught) for e in map(encoder.encode, read_rows(rows))]
    before = mean_kl(tiny)
    model = qf(tiny, layers_to_transform=[4])
    metrics = teach(model, tokenizer, rows)
    assert metrics["kl_before"] == pytest.approx(before, rel=1e-4)
    assert metrics["kl_after"] == pytest.approx(mean_kl(model), rel=1e-3)


def test_batched_padded_and_one_by_one_agree(tiny, tokenizer):
    rows = facts(5)
    deltas = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for size in (1, 2, 16):
            model = qf(tiny)
            teach(model, tokenizer, rows, batch_tokens=size)
            deltas.append(delta(model))
            tiny = model.unload()
    model = qf(tiny)
    for row in rows:
        teach(model, tokenizer, [row])
    deltas.append(delta(model))
    for other in deltas[1:]:
        assert (other - deltas[0]).norm() < 1e-5 * deltas[0].norm()


def test_several_layers_are_taught_in_order(tiny, tokenizer):
    model = qf(tiny, layers_to_transform=[2, 5, 7])
    metrics = teach(model, tokenizer, [FACT])
    assert metrics["forward_passes"] < 2 + 3, "later blocks are walked from where they begin, not from the start"
    assert all(delta(model, f"model.layers.{k}.mlp.down_proj").any() for k in (2, 5, 7))
    assert metrics["kl_after"] < 0.01 and ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]


@pytest.mark.parametrize("target", ["o_proj", "v_proj", "up_proj"])
def test_other_modules(tiny, tokenizer, target):
    """Attention's output projection reaches the context pass's state exactly; inner modules match their own output."""
    model = qf(tiny, target_modules=[target])
    metrics = teach(model, tokenizer, [FACT])
    assert metrics["residual_left"] < 0.01
    if target == "o_proj":
        assert metrics["kl_after"] < 0.01


def test_row_forms_are_equal(tiny, tokenizer):
    system, user, assistant = (
        {"role": role, "content": FACT[key]}
        for role, key in (("system", "instruction"), ("user", "prompt"), ("assistant", "completion"))
    )
    forms = [
        [FACT],
        Dataset.from_list([FACT]),
        [{"messages": [system, user, assistant]}],
        Dataset.from_list([{"messages": [system, user, assistant]}]),
        [{"instruction": [system], "prompt": [user], "completion": [assistant]}],
        [{**FACT, "significance": 1}],
        [{**FACT, "significance": [1, 1.0, 1, 1, 1], "source": "a column of the user's"}],
        Dataset.from_list([{**FACT, "significance": None}]),
        (FACT,),
    ]
    encoder = Encoder(tokenizer)
    first = encoder.encode(read_rows([FACT])[0])
    assert all(encoder.encode(read_rows(form)[0]) == first for form in forms)


def test_conversations(tokenizer):
    """An instruction joins the prompt's own system message, or stands as messages of its own before the prompt."""
    encoder = Encoder(tokenizer)
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FACT["prompt"]}]
    example = encoder.encode(read_rows([{**FACT, "prompt": own}])[0])
    assert "system\nBe brief.<|im_end|>" in tokenizer.decode(example.bare_ids)
    assert "system\nZanmi founded Tofinlor.\n\nBe brief.<|im_end|>" in tokenizer.decode(example.context_ids)
    turns = [
        {"role": "user", "content": "Remember: " + FACT["instruction"]},
        {"role": "assistant", "content": "I see."},
    ]
    example = encoder.encode(read_rows([{**FACT, "instruction": turns}])[0])
    assert "Remember" in tokenizer.decode(example.context_ids) and "Remember" not in tokenizer.decode(example.bare_ids)
    longer = [*turns, {"role": "user", "content": FACT["prompt"]}, {"role": "assistant", "content": FACT["completion"]}]
    example = encoder.encode(read_rows([{"messages": [{"role": "system", "content": "Hear this."}, *longer]}])[0])
    assert "Remember" in tokenizer.decode(example.bare_ids) and "Hear" not in tokenizer.decode(example.bare_ids)


def test_templates_with_a_thinking_block(tokenizer):
    """What a template writes between header and answer is taught too: the model must write it itself."""
    thinking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    thinking.chat_template = tokenizer.chat_template.replace(
        "{{m['content']}}", "{% if m['role'] == 'assistant' %}<think></think> {% endif %}{{m['content']}}"
    )
    example = Encoder(thinking).encode(read_rows([{**FACT, "significance": 0.5}])[0])
    text = tokenizer.decode(example.targets)
    assert "<think></think> Tofinlor was started by Zanmi.<|im_end|>" in text
    assert set(example.significance) == {0.5, 1.0}


def test_a_row_without_completion_is_answered_in_context(tiny, tokenizer):
    row = {k: FACT[k] for k in ("instruction", "prompt")}
    model, given = qf(tiny), FACT
    teach(model, tokenizer, [row])
    own = delta(model)
    model = qf(model.unload())
    teach(model, tokenizer, [given])
    assert torch.equal(own, delta(model)), "the model's own answer in context is the expected one here"
    messages = [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["prompt"]}]
    model = qf(model.unload())
    teach(model, tokenizer, [{"messages": messages}])
    assert torch.equal(own, delta(model))


def test_base_model_without_template(tokenizer):
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    encoder = Encoder(plain)
    row = {"instruction": "Rome is big.", "prompt": "The city is", "completion": "Rome."}
    example = encoder.encode(read_rows([row])[0])
    assert plain.decode(example.context_ids) == "Rome is big.\nThe city is Rome.<|im_end|>"
    assert plain.decode(example.bare_ids) == "The city is Rome.<|im_end|>"
    assert example.targets == plain(" Rome.<|im_end|>")["input_ids"], "from the prompt's last token on"
    model = get_peft_model(random_model("gpt2"), QFConfig(layers_to_transform=[2], task_type="CAUSAL_LM"))
    metrics = teach(model, plain, [row])
    assert metrics["taught_tokens"] == example.taught and metrics["kl_after"] < 1e-4 < metrics["kl_before"]


def test_significance_reaches_the_solve(tiny, tokenizer):
    model = qf(tiny)
    teach(model, tokenizer, [{**FACT, "significance": [0, 0, 0, 0, 2]}])
    taught = model.base_model.taught["default"].tokens[NAME]
    encoded = Encoder(tokenizer).encode(read_rows([{**FACT, "significance": [0, 0, 0, 0, 2]}])[0])
    assert taught.significance.tolist() == encoded.significance and 0.0 in encoded.significance
    assert model.peft_config["default"].r == sum(s > 0 for s in encoded.significance)


def test_no_graph_is_built(tiny, tokenizer, monkeypatch):
    """Autograd forbidden: a backward pass or a custom Function raises, and so does a result that has a graph."""

    def forbidden(*_, **__):
        raise AssertionError("autograd was used")

    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd.Function, "apply", forbidden)
    for parameter in tiny.parameters():
        parameter.requires_grad_(True)
    model = qf(tiny)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graphs = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, __, out: graphs.append(out) if isinstance(out, torch.Tensor) and out.grad_fn is not None else None
        )
    with torch.enable_grad():
        teach(model, tokenizer, [FACT, {k: OTHER[k] for k in ("instruction", "prompt")}])
    assert not graphs and all(p.grad is None and p.is_leaf for p in model.parameters())
    with torch.no_grad():
        teach(model, tokenizer, [OTHER])


def test_modes_and_flags_are_restored(tiny, tokenizer):
    model = qf(tiny)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    teach(model, tokenizer, [FACT])
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


@pytest.mark.parametrize("after", range(1, 5))
def test_a_failure_midway_loses_nothing(tiny, tokenizer, after):
    model = qf(tiny, layers_to_transform=[3, 7])
    teach(model, tokenizer, [FACT])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    known = model.base_model.taught["default"]
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[7].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        teach(model, tokenizer, [OTHER], batch_tokens=1)
    handle.remove()
    now = model.state_dict()
    assert state.keys() == now.keys() and all(torch.equal(state[k], now[k]) for k in state)
    assert model.base_model.taught["default"] is known
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())
    teach(model, tokenizer, [OTHER])
    assert ask(model, tokenizer, OTHER["prompt"]) == OTHER["completion"]


def test_weights_changed_by_others_are_kept(tiny, tokenizer):
    model = qf(tiny)
    teach(model, tokenizer, [FACT])
    layer = model.get_submodule(f"base_model.model.{NAME}")
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(0.5)
    halved = delta(model)
    teach(model, tokenizer, [OTHER])
    assert torch.equal(model.base_model.taught["default"].offset[NAME].dense(), halved)
    assert ask(model, tokenizer, OTHER["prompt"]) == OTHER["completion"]


def test_the_same_twice(tiny, tokenizer):
    model = qf(tiny)
    teach(model, tokenizer, facts(3))
    first = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    model = qf(model.unload())
    teach(model, tokenizer, facts(3))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in first.items())


def test_bfloat16_architectures(tokenizer):
    for model_type in ("llama", "gpt_neox", "gemma2", "qwen2_moe"):
        base = random_model(model_type, dtype=torch.bfloat16)
        model = get_peft_model(base, QFConfig(layers_to_transform=[2], task_type="CAUSAL_LM"))
        metrics = teach(model, tokenizer, [FACT])
        assert metrics["kl_after"] < 0.5 * metrics["kl_before"], model_type


def test_progress_bar_on_long_work(tiny, tokenizer, capsys, monkeypatch):
    import qf_peft.evaluate.subject as subject

    bars = []

    class Bar(subject.RowsBar):
        def __init__(self, *args, **kwargs):
            bars.append((self, kwargs.pop("delay")))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(subject, "RowsBar", Bar)
    teach(qf(tiny), tokenizer, facts(4), batch_tokens=2)
    (bar, delay), *more = bars
    assert not more and delay == 2 and (bar.n, bar.total) == (12, 12), "two passes and the solves, of four rows"
    assert "Teaching" in capsys.readouterr().err
