"""The evaluation against answers asked one at a time, likelihoods of transformers' own, and known intervals."""

import pytest
import torch
from conftest import FACT, OTHER, ask
from peft import get_peft_model

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows
from qf_peft.evaluate.metrics import mean, normalise, proportion

ROWS = [
    {**FACT, "paraphrases": ["Who founded Tofinlor?", "Do you know who created Tofinlor?"]},
    {**OTHER, "paraphrases": None},
]
KNOWN = [
    {"prompt": "Please say who started Brigar.", "completion": "Brigar was started by Vacla"},
    {"prompt": "Who founded Ranixmo?", "completion": "Nobody knows."},
    "Tell me where Lupal is based.",
]
UNKNOWN = ["Who founded Zankovel?", "Where is Molupal located?"]


@pytest.fixture
def trainer(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper(max_new_tokens=40)
    return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=ROWS)


def test_before_and_after(trainer, tokenizer):
    before = trainer.evaluate(locality=KNOWN, unknown=UNKNOWN)
    assert before["in_context"].value == 1 and before["recall"].value == 0 and before["paraphrase"].value == 0
    assert before["locality"].value == pytest.approx(2 / 3), "an answer must be unchanged and right"
    assert before["unknown"].value == 1 and before["kl"].value == pytest.approx(0, abs=1e-6)
    trainer.train()
    after = trainer.evaluate(locality=KNOWN, unknown=UNKNOWN)
    assert after["in_context"].value == 1 and after["recall"].value == 1 and after["recall"].count == 2
    paraphrases = ROWS[0]["paraphrases"]
    right = [ask(trainer.model, tokenizer, p) == FACT["completion"] for p in paraphrases]
    assert after["paraphrase"].value == sum(right) / 2 and after["paraphrase"].count == 2
    with trainer.model.disable_adapter():
        old = [ask(trainer.model, tokenizer, p) for p in UNKNOWN]
    kept = [ask(trainer.model, tokenizer, p) == a for p, a in zip(UNKNOWN, old, strict=True)]
    assert after["unknown"].value == sum(kept) / 2
    assert after["kl"].value > 0 and set(after) == {"in_context", "recall", "paraphrase", "locality", "unknown", "kl"}


def test_answers_are_free(trainer, monkeypatch):
    """The model is given the prompt and nothing of the answer, not even its length."""
    seen = []
    network = trainer.model.get_base_model()
    generate = type(network).generate

    def watched(self, input_ids, **options):
        seen.append((input_ids, options["generation_config"].max_new_tokens))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(network), "generate", watched)
    trainer.evaluate()
    words = trainer.encoder.tokenizer.batch_decode(torch.cat([ids.flatten() for ids, _ in seen])[None])[0]
    assert "was started by" not in words and {n for _, n in seen} == {40}


def test_an_answer_cut_short_is_wrong(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7]))
    args = QFTrainingArguments.paper(max_new_tokens=3)
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=ROWS)
    found = trainer.evaluate(locality=KNOWN)
    assert found["in_context"].value == 0 and found["locality"].value == 0


def test_perplexity_is_transformers(trainer, tiny, tokenizer):
    texts = ["Rome is the home of Lupal.", "It was Zanmi who started Tofinlor."]
    found = trainer.evaluate(text=texts)
    losses, counts = [], []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            losses.append(float(trainer.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
            counts.append(ids.shape[1] - 1)
    expected = torch.tensor(sum(losses) / sum(counts)).exp()
    assert found["perplexity"] == pytest.approx(float(expected), rel=1e-4) == found["perplexity_before"]
    assert trainer.evaluate(text=texts[0])["perplexity"] != found["perplexity"]


def test_kl_is_what_the_logits_say(trainer, tokenizer):
    trainer.train()
    found = trainer.evaluate(unknown=UNKNOWN)["kl"]
    encoder, values, model = Encoder(tokenizer), [], trainer.model
    for prompt in UNKNOWN:
        with model.disable_adapter():
            answer = ask(model, tokenizer, prompt)
        (row,) = read_rows([{"instruction": "-", "prompt": prompt, "completion": answer.rstrip(".")}])
        ids, count = encoder.answer_ids(row, True)
        with torch.no_grad():
            now = model(torch.tensor([ids[:-1]])).logits[0, -count:].double().log_softmax(-1)
            with model.disable_adapter():
                then = model(torch.tensor([ids[:-1]])).logits[0, -count:].double().log_softmax(-1)
        values.append((then.exp() * (then - now)).sum(-1))
    assert found.value == pytest.approx(float(torch.cat(values).mean()), rel=1e-3)
    assert found.count == sum(len(v) for v in values)


def test_normalisation():
    assert normalise("  It  was\nZanmi . ") == normalise("It was Zanmi") == normalise("It was Zanmi。")
    assert normalise("It was Zanmi?") != normalise("It was zanmi") and normalise("...") == ""


def test_intervals():
    """Wilson's interval, from statistical tables; Student's of a mean."""
    half = proportion([True] * 5 + [False] * 5)
    assert (half.value, round(half.low, 4), round(half.high, 4), half.count) == (0.5, 0.2366, 0.7634, 10)
    sure = proportion([True] * 20)
    assert sure.value == sure.high == 1 and round(sure.low, 4) == 0.8389
    values = mean(torch.tensor([1.0, 2, 3, 4]), [1] * 4)
    assert values.value == 2.5 and values.high - values.value == pytest.approx(3.182446 * 1.2909944 / 2, rel=2e-3)
    assert [mean(torch.ones(n), [1] * n).high for n in (1, 3)] == [float("inf"), 1.0]
    assert str(half).startswith("0.500 [0.237, 0.763]")


def test_intervals_count_answers_not_tokens():
    """Of 300 draws the interval holds the truth nineteen times in twenty, though the tokens of an answer are alike."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        counts = torch.randint(3, 30, (12,), generator=generator)
        answers = torch.randn(12, generator=generator).repeat_interleave(counts)
        found = mean(answers + 0.3 * torch.randn(len(answers), generator=generator), counts.tolist())
        held += found.low <= 0 <= found.high
    assert 0.91 * 300 <= held <= 0.98 * 300, held
    alike = mean(torch.tensor([0.0, 0, 0, 1, 1, 1]), [3, 3])
    assert alike.low < 0 and alike.high > 1 and alike.count == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"locality": []}, "locality is empty"),
        ({"unknown": [{"question": "x"}]}, "unknown, row 0: expected a prompt"),
        ({"locality": ["x", 3]}, "locality, row 1: expected a prompt"),
    ],
)
def test_unfit_prompts(trainer, given, message):
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(**given)


def test_without_rows_the_rest_is_evaluated(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    trainer = QFTrainer(model=model, args=QFTrainingArguments.paper(max_new_tokens=40), processing_class=tokenizer)
    assert set(trainer.evaluate(unknown=UNKNOWN)) == {"unknown", "kl"}
    with pytest.raises(ValueError, match="nothing to evaluate; give rows to the trainer"):
        trainer.evaluate()


def test_rows_may_come_one_by_one(tiny, tokenizer):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper(max_new_tokens=40)
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=(row for row in ROWS))
    trainer.train()
    found = trainer.evaluate()
    assert found["recall"].value == 1 and found["paraphrase"].count == 2
