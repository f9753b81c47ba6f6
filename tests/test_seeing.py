"""What is shown against what two plain forward passes, answers asked one at a time, and an adapter taught apart say."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask, random_model
from peft import get_peft_model
from test_default_setting import facts, questions
from transformers import AutoModelForCausalLM

from qf_peft import (
    QFConfig,
    QFTrainer,
    QFTrainingArguments,
    layer_shares,
    retention,
    strength_sweep,
    token_divergences,
)
from qf_peft.data.rows import Encoder, read_rows
from qf_peft.evaluate.coloured import Token, ansi, html
from qf_peft.evaluate.known import known_rows
from qf_peft.evaluate.metrics import Metric
from qf_peft.evaluate.plots import bars, lines

SVG = "{http://www.w3.org/2000/svg}"


def make(tokenizer, rows, model=None, layers=(6, 7), preserved=None, **settings):
    if model is None:
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(base, QFConfig(layers_to_transform=list(layers), task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper(disable_tqdm=True, max_new_tokens=40, **settings)
    return QFTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, preserve_dataset=preserved)


@pytest.fixture
def taught(tokenizer):
    trainer = make(tokenizer, [FACT, OTHER])
    trainer.train()
    return trainer


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@torch.no_grad()
def plain_kl(model, context, bare, count, adapter):
    """KL of the last `count` predictions from a plain pass with the instruction to one without."""
    with model.disable_adapter():
        told = model(torch.tensor([context[:-1]])).logits[0, -count:].double().log_softmax(-1)
        if not adapter:
            now = model(torch.tensor([bare[:-1]])).logits[0, -count:].double().log_softmax(-1)
    if adapter:
        now = model(torch.tensor([bare[:-1]])).logits[0, -count:].double().log_softmax(-1)
    return (told.exp() * (told - now)).sum(-1)


def test_divergences_are_those_of_two_plain_passes(taught, tokenizer):
    before = state(taught.model)
    found = token_divergences(taught)
    encoder = Encoder(tokenizer)
    for shown, row in zip(found, read_rows([FACT, OTHER]), strict=True):
        example = encoder.encode(row)
        for which, adapter in (("before", False), ("after", True)):
            expected = plain_kl(taught.model, example.context_ids, example.bare_ids, example.taught, adapter)
            given = torch.tensor([getattr(t, which) for t in shown.tokens], dtype=torch.float64)
            torch.testing.assert_close(given, expected.clamp(min=0), atol=2e-4, rtol=1e-3)
        assert "".join(t.text for t in shown.tokens) == f"assistant\n{row.completion}<|im_end|>"
        assert [t.answer for t in shown.tokens].count(False) == example.header > 0
        answers = [t.before for t in shown.tokens if t.answer]
        assert shown.before == pytest.approx(sum(answers) / len(answers)) and shown.after < 0.1 < shown.before
    name = max(found[0].tokens, key=lambda t: t.before)
    assert name.text.strip() in FACT["completion"] and name.after < 0.1 < 3 < name.before
    assert same(before, state(taught.model))


def test_rows_are_the_ledger_and_what_is_not_taught_yet(taught, tokenizer):
    new = {"instruction": "Zanmi leads Tofinlor.", "prompt": "Who leads Tofinlor?"}
    trainer = make(tokenizer, [OTHER, new], taught.model)
    rows = known_rows(trainer)
    assert [row.prompt for row in rows] == [FACT["prompt"], OTHER["prompt"], new["prompt"]]
    assert rows[2].completion == ask(taught.model.unload(), tokenizer, new["prompt"], new["instruction"])


def test_nothing_to_show(tokenizer):
    trainer = make(tokenizer, None)
    for act in (token_divergences, layer_shares, strength_sweep):
        with pytest.raises(ValueError, match="nothing to show"):
            act(trainer)
    with pytest.raises(ValueError, match="ledger is empty"):
        retention(trainer)


def test_text_as_tokens_of_parts_of_characters(tokenizer):
    """Characters of several tokens are shown whole, at their last token."""
    trainer = make(tokenizer, [{**FACT, "completion": "Zoë 東 👍."}])
    (shown,) = token_divergences(trainer)
    assert "".join(t.text for t in shown.tokens).replace("\ufffd", "") == "assistant\nZoë 東 👍.<|im_end|>"
    assert any(t.text == "\ufffd" for t in shown.tokens)


def test_terminal_and_html():
    tokens = [Token("<b>\x1b[31m\n", 4.0, 0.0, True), Token("x\u202e", 0.01, 0.4, False)]
    line = ansi(tokens, "before")
    assert line.startswith("\x1b[38;5;16;48;5;208m<b>\\u001b[31m⏎\x1b[0m") and line.endswith("x\\u202e")
    assert ansi(tokens, "after").startswith("<b>\\u001b[31m⏎\x1b[38;5;16;48;5;222mx"), "no colour, then some"
    assert line.count("\x1b") == 2, "none of the text's own"
    page = ET.fromstring(f"<p>{html(tokens, 'before')}</p>")
    assert [span.text for span in page] == ["<b>\\u001b[31m⏎", "x\\u202e"]
    assert page[0].get("title") == "before 4.000, now 0.000 nats"
    assert "56%" in page[0].get("style") and "opacity" in page[1].get("style")


def test_shares_are_what_hooks_and_weights_say(taught, tokenizer):
    """In the tiny model a block's adapter adds ΔW k to the stream; the last block's share is then plain algebra."""
    found = layer_shares(taught)
    assert [b.block for b in found.blocks] == [6, 7] and found.blocks[0].modules == ("mlp.down_proj",)
    assert sum(b.share for b in found.blocks) + found.response == pytest.approx(1)
    model, seen = taught.model, {}
    layers = model.base_model.model.model.layers
    written = {6: [], 7: []}
    changes, streams = [], {6: [], 7: []}
    encoder = Encoder(tokenizer)

    def keep(name, pre=False):
        if pre:
            return lambda _, args: seen.__setitem__(name, args[0][0])
        return lambda _, __, out: seen.__setitem__(name, (out if isinstance(out, torch.Tensor) else out[0])[0])

    handles = [layers[i].mlp.down_proj.register_forward_pre_hook(keep(f"key{i}", True)) for i in (6, 7)]
    handles += [layers[i].register_forward_hook(keep(f"out{i}")) for i in (6, 7)]
    with torch.no_grad():
        for row in read_rows([FACT, OTHER]):
            example = encoder.encode(row)
            count, ids = example.taught - example.header, torch.tensor([example.bare_ids[:-1]])
            with model.disable_adapter():
                model(ids)
                base = seen["out7"][-count:].double()
            model(ids)
            changes.append(seen["out7"][-count:].double() - base)
            for i in (6, 7):
                layer = layers[i].mlp.down_proj
                a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
                written[i].append(seen[f"key{i}"][-count:].double() @ a.T @ b.T)
                streams[i].append(seen[f"out{i}"][-count:].double() - written[i][-1])
    for handle in handles:
        handle.remove()
    change = torch.cat(changes)
    for block in found.blocks:
        part, stream = torch.cat(written[block.block]), torch.cat(streams[block.block])
        assert block.share == pytest.approx(float((part * change).sum() / change.square().sum()), rel=1e-3)
        assert block.size == pytest.approx(float(part.norm() / stream.norm()), rel=1e-3)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "granite", "gemma2", "qwen2_moe"])
def test_shares_of_one_last_block_are_one(tokenizer, model_type):
    """Whatever multipliers and norms stand behind the module: with nothing behind the block, its share is all."""
    model = get_peft_model(random_model(model_type), QFConfig(layers_to_transform=[2], task_type="CAUSAL_LM"))
    trainer = make(tokenizer, [FACT, OTHER], model)
    assert layer_shares(trainer).response == 0, "nothing was taught yet, so nothing changed"
    trainer.train()
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    found = layer_shares(trainer)
    assert found.blocks[0].share == pytest.approx(1, abs=1e-4) and found.response == pytest.approx(0, abs=1e-4)
    assert hooks == {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


def test_retention_by_order(tokenizer):
    rows = facts(11, 2)
    trainer = make(tokenizer, rows)
    trainer.train()
    found = retention(trainer)
    assert len(found.groups) == 10 and sum(g.recall.count for g in found.groups) == 11
    assert found.groups[0].start == 0 and found.groups[0].first <= found.groups[-1].last
    said = [ask(trainer.model, tokenizer, row["prompt"]) == row["completion"] for row in rows]
    for g in found.groups:
        part = said[g.start : g.start + g.recall.count]
        assert g.recall.value == sum(part) / len(part)
    labels = [e.text for e in ET.fromstring(found.svg()).iter(f"{SVG}text")]
    for g in found.groups:
        end = g.start + g.recall.count
        assert (str(end) if g.recall.count == 1 else f"{g.start + 1}–{end}") in labels


def test_sweep_teaches_each_strength_and_puts_everything_back(tokenizer):
    """Each point is what an adapter taught apart gives; the adapter, ledger and versions are as before."""
    known, unknown = questions(24, 1)
    settings = {"preserved": [q["prompt"] for q in known], "contrast_chats": 0, "preserve_chats": 4}
    trainer = make(tokenizer, [{**FACT, "paraphrases": ["Who founded Tofinlor?"]}, OTHER], **settings)
    trainer.train()
    before, ledger, metrics = state(trainer.model), trainer.facts, trainer.metrics
    versions = trainer.model.base_model.versions["default"]
    sweep = strength_sweep(trainer, (0.0, 5.0), locality=iter(known[:6]), unknown=unknown[:6])
    assert same(before, state(trainer.model)) and trainer.facts == ledger and trainer.metrics is metrics
    assert trainer.args.preserve_strength == 0.0 and trainer.model.base_model.versions["default"] is versions
    for strength, found, lesson in zip(sweep.strengths, sweep.metrics, sweep.lessons, strict=True):
        apart = make(tokenizer, trainer.dataset, **settings)
        apart.args = replace(apart.args, preserve_strength=strength)
        expected = apart.train()
        assert lesson["kl_after"] == expected["kl_after"] and lesson["rank"] == expected["rank"]
        assert found == apart.evaluate(locality=known[:6], unknown=unknown[:6]) and found["paraphrase"].count == 1
    assert sweep.lessons[0]["kl_after"] != sweep.lessons[1]["kl_after"]
    drawn = ET.fromstring(sweep.svg())
    assert {"recall", "paraphrase", "locality", "unknown", "0", "5"} <= {e.text for e in drawn.iter(f"{SVG}text")}
    trainer.rollback()
    assert trainer.facts == ()


def test_sweep_interrupted_puts_everything_back(taught):
    before, ledger, calls = state(taught.model), taught.facts, []

    def interrupt(*_):
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt

    handle = taught.model.get_base_model().model.layers[7].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        strength_sweep(taught, (0.0, 1.0))
    handle.remove()
    assert same(before, state(taught.model)) and taught.facts == ledger
    for strengths, message in (((), "strengths is empty"), ((-1.0,), "preserve_strength=-1.0")):
        with pytest.raises(ValueError, match=message):
            strength_sweep(taught, strengths)


def vertices(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]


def test_plots_are_to_scale():
    metric = Metric(0.5, 0.25, 1.0, 8)
    series = {"one": [0.0, 1.0], "two": [metric, metric]}
    figure = ET.fromstring(lines('A <title> & "quotes"', ["1", "2"], series, "axis & all"))
    texts = [e.text for e in figure.iter(f"{SVG}text")]
    assert figure.get("aria-label") == 'A <title> & "quotes"' and {'A <title> & "quotes"', "axis & all"} <= {*texts}
    dots = [float(dot.get("y")) for dot in figure.iter(f"{SVG}use")]
    low, high, *rest = dots[:4]  # those of the legend follow
    assert low > high and rest == pytest.approx([(low + high) / 2] * 2, abs=0.1)
    intervals = {e.get("id"): e for e in figure.iter(f"{SVG}g")}["LineCollection_2"]
    for path in intervals.iter(f"{SVG}path"):
        (x, bottom), (also_x, top) = vertices(path)
        assert x == also_x and bottom == pytest.approx(low + (high - low) / 4, abs=0.1)
        assert top == pytest.approx(high, abs=0.1)
    drawn = ET.fromstring(bars("b", ["x", "y", "z"], [0.2, -0.1, 0.0], "axis"))
    boxes = [vertices(path) for path in drawn.iter(f"{SVG}path") if "fill: #" in path.get("style")]
    up, down, flat = (box[2][1] - box[0][1] for box in boxes)  # downwards, as a page counts
    assert up < 0 < down and -up == pytest.approx(2 * down, abs=0.2) and flat == 0
    assert bars("none", ["x"], [0.0], "axis"), "nothing taught: a plot all the same"
