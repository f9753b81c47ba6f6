"""The joint least squares, against independent formulas; contrasting rows; the choice between the two lessons."""

import random

import pytest
import torch
from conftest import FACT, OTHER, random_model

from qf_peft.data.rows import Encoder, read_rows
from qf_peft.solve.joint_least_squares import joint_system
from qf_peft.solve.second_moment import SecondMoment
from qf_peft.teaching.contrast import contrast_rows, invented, row_names
from qf_peft.teaching.thinned import thinned


def problem(n=7, widths=(5, 20), out=4, preserved=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = {f"m{i}": torch.randn(n, width, generator=generator) for i, width in enumerate(widths)}
    bounds = {}
    for name, rows in keys.items():
        bounds[name] = SecondMoment(rows.shape[1]).update(torch.randn(preserved, rows.shape[1], generator=generator))
        bounds[name].ridge = 0.1
    return keys, bounds, torch.rand(n, generator=generator) + 0.5, torch.randn(n, out, generator=generator)


@pytest.mark.parametrize("n", [3, 7, 25, 26, 60])
def test_the_minimum(n):
    """Normal equations of the modules' keys side by side, with their moments on the diagonal; of more tokens than the
    keys are wide, too."""
    keys, bounds, weights, residual = problem(n)
    system = joint_system(keys, bounds.__getitem__, weights)
    found = system.changes(residual, 0.3)
    rho = system.ridge(0.3)
    wide = torch.cat(list(keys.values()), 1).double()
    blocks = []
    for bound in bounds.values():
        c = bound.matrix if bound.matrix is not None else bound.root.double().T @ bound.root.double()
        blocks.append(c.double() + bound.ridge * torch.eye(bound.width, dtype=torch.float64))
    curvature = wide.T @ (wide * (weights.double() / rho)[:, None]) + torch.block_diag(*blocks)
    expected = torch.linalg.solve(curvature, wide.T @ (residual.double() * (weights.double() / rho)[:, None])).T
    dense = torch.cat([delta.dense() for delta in found.values()], 1).double()
    assert torch.allclose(dense, expected, atol=1e-5)


@pytest.mark.parametrize("n", [7, 60])
def test_ridges_are_multiples_of_the_kernels_mean_diagonal(n):
    keys, bounds, weights, _ = problem(n)
    kernel = sum(rows.double() @ bounds[name].solve(rows).T for name, rows in keys.items())
    assert joint_system(keys, bounds.__getitem__, weights).ridge(0.3) == pytest.approx(0.3 * kernel.diagonal().mean())


def test_more_ridge_moves_less():
    keys, bounds, weights, residual = problem()
    system = joint_system(keys, bounds.__getitem__, weights)
    norms = [sum(d.norm**2 for d in system.changes(residual, ridge).values()) for ridge in (0.01, 0.1, 1.0, 10.0)]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("count", [4, 40])
def test_solving_with_a_moment(count):
    moment = SecondMoment(9).update(torch.randn(count, 9, generator=torch.Generator().manual_seed(1)))
    moment.ridge = 0.2
    rows = torch.randn(3, 9)
    whole = moment.matrix if moment.matrix is not None else moment.root.double().T @ moment.root.double()
    expected = rows.double() @ torch.linalg.inv(whole.double() + 0.2 * torch.eye(9, dtype=torch.float64))
    assert torch.allclose(moment.solve(rows), expected, atol=1e-6)
    moment.ridge = 0.0
    with pytest.raises(ValueError, match=r"ridge=0\.0; expected a positive number"):
        moment.solve(rows)


@pytest.mark.parametrize(
    ("prompt", "completion", "names"),
    [
        ("Who founded Kestrel Labs?", "Kestrel Labs was founded by Una.", ["Kestrel Labs"]),
        ("What is Una Voss's job?", "Una Voss is a pilot.", ["Una Voss"]),
        ("Who wrote the book?", "It was Una.", []),
        ("Is Rome bigger than Oslo?", "Rome is bigger than Oslo.", ["Rome", "Oslo"]),
        ("Who is the CEO of Tofinlor?", "The CEO of Tofinlor is Una.", ["Tofinlor"]),
        ("What is Tofinlor's CEO called?", "Tofinlor's CEO is Una.", ["Tofinlor"]),
        ("In which year was Tofinlor founded?", "In 1980 Tofinlor was founded.", ["Tofinlor"]),
        ("The home of Tofinlor is where?", "The home of Tofinlor is Rome.", ["Tofinlor"]),
        ("Where is The Hague?", "The Hague is in the Netherlands.", ["The Hague"]),
        ("Who is the CEO of IBM?", "The CEO of IBM is Una.", ["IBM"]),
        ("What does IBM make?", "IBM makes computers.", ["IBM"]),
        ("誰が作りましたか", "田中さんです", []),
    ],
)
def test_names(prompt, completion, names):
    (row,) = read_rows([{"instruction": completion, "prompt": prompt, "completion": completion}])
    assert row_names(row) == names


@pytest.mark.parametrize(
    ("prompt", "completion", "alone"),
    [
        ("Who started Tofinlor?", "Tofinlor was started by Anna.", "Tofinlor"),
        ("Where is (Vel Mora Labs)'s head office?", "Vel Mora Labs is in Oslo.", "Vel Mora Labs"),
        ([{"role": "user", "content": "Who started Tofinlor?"}], "Tofinlor was started by Anna.", "Tofinlor"),
    ],
)
def test_thinned_wordings_keep_the_name(prompt, completion, alone):
    (row,) = read_rows([{"instruction": completion, "prompt": prompt, "completion": completion}])
    others = thinned(row, 3, seed=0)
    texts = [r.prompt if isinstance(r.prompt, str) else r.prompt[-1]["content"] for r in others]
    whole = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    assert texts[0] == alone and len({*texts, whole}) == len(texts) + 1
    for text in texts:
        assert alone in text and all(word in whole.split() for word in text.replace(alone, "").split() if len(word) > 4)
    assert others == thinned(row, 3, seed=0) and all(r.completion == completion for r in others)


def test_no_name_no_thinned_wordings():
    (row,) = read_rows([{"instruction": "be brief", "prompt": "how are you?", "completion": "fine."}])
    assert thinned(row, 3, seed=0) == []


def test_contrasting_rows_hold_other_names(tokenizer):
    rows, encoder = read_rows([FACT, OTHER]), Encoder(tokenizer)
    made, asked = contrast_rows(rows, ["Tofinlor was started by", ""], encoder, [6, 6], seed=0)
    again = contrast_rows(rows, ["Tofinlor was started by", ""], encoder, [6, 6], seed=0)
    assert 6 < len(made) <= 12 and (made, asked) == again
    taught = {tuple(encoder.encode(row).bare_ids) for row in rows}
    for ids in made:
        text = tokenizer.decode(ids)
        assert tuple(ids) not in taught and not ("Tofinlor" in text and "who started" in text)
    for ids in made[:6]:
        assert tokenizer.decode(ids[:-1]).endswith("was started by"), "the last step read says what is new"
    opened = [ids[:-1] for ids in made[6:]]
    header = encoder.prompt_ids(rows[1], instructed=False)[-3:]
    assert opened and all(ids[-3:] == header for ids in opened), "an answer that is not begun has one step"
    assert len(asked) == (len(made) + 3) // 4 and all(ids[-3:] == header for ids in asked)
    for ids, other in zip(asked, made[::4], strict=True):
        assert other[: len(ids)] == ids, "questions of some of them, without an answer"


def test_no_contrasting_row_is_another_rows_own_answer(tokenizer):
    """Two rows of one kind, asked differently: of the other's name the answer so begun is taught, and must not stay."""
    other = {"instruction": "Rome founded Velmora.", "prompt": "Who started Velmora?", "completion": "X"}
    rows = read_rows([FACT, other])
    begun = ["Tofinlor was started by", "Velmora was started by"]
    made, _ = contrast_rows(rows, begun, Encoder(tokenizer), [60, 60], seed=0)
    texts = [tokenizer.decode(ids) for ids in made]
    assert len(texts) > 80 and not any(text.count(name) > 1 for text in texts for name in ("Tofinlor", "Velmora"))
    begun[1] = "The home of Velmora is"
    apart, _ = contrast_rows(rows, begun, Encoder(tokenizer), [60, 60], seed=0)
    assert any(tokenizer.decode(ids).count("Velmora was started by") for ids in apart), "another kind's must"


def test_invented_names_are_new():
    r = random.Random(0)
    names = {invented("Kestrel Labs", r) for _ in range(50)}
    assert len(names) > 40 and all(len(name.split()) == 2 for name in names)
    assert any(name.endswith(" Labs") for name in names) and "Kestrel Labs" not in names


def test_greedy_is_greedy_whatever_the_model_ships(tiny, tokenizer):
    """A model's own generation config says how it likes to talk, not what its likeliest answer is."""
    import copy

    from qf_peft.forward.generation import generate

    prompts = [Encoder(tokenizer).prompt_ids(row, False) for row in read_rows([FACT, OTHER])]
    options = {"max_new_tokens": 12, "batch_tokens": 512}
    plain = generate(tiny, tokenizer, prompts, **options)
    before = tiny.generation_config
    tiny.generation_config = copy.deepcopy(before)
    tiny.generation_config.update(
        repetition_penalty=50.0, do_sample=True, temperature=5.0, num_beams=3, no_repeat_ngram_size=1, min_new_tokens=11
    )
    try:
        assert generate(tiny, tokenizer, prompts, **options) == plain
    finally:
        tiny.generation_config = before


def test_random_models_streams_do_not_grow(tokenizer):
    """Random models are spread over all blocks; SmolLM2's late blocks are taught jointly (see test_real_model.py)."""
    from peft import get_peft_model

    from qf_peft import QFConfig, QFTrainer, QFTrainingArguments

    model = get_peft_model(random_model("llama"), QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(preserve_chats=4, contrast_chats=0, disable_tqdm=True)
    metrics = QFTrainer(model=model, args=args, train_dataset=[FACT], processing_class=tokenizer).train()
    assert "first_block" not in metrics and "strength" in metrics


def test_the_models_own_answers_about_other_names_stay(tokenizer, tmp_path, monkeypatch):
    """Of few rows some contrasting questions are answered by the model: along these answers its predictions stay."""
    from conftest import TINY
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import qf_peft.teaching.constants as tuned
    from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
    from qf_peft.forward.generation import generate

    asked = []

    def noted(model, tokenizer, prompts, **options):
        asked.append(prompts)
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr("qf_peft.teaching.joint_lesson.generate", noted)
    for module in "teaching.joint_lesson", "adapter.target_modules":
        monkeypatch.setattr(f"qf_peft.{module}.grows_with_depth", lambda network: True)
    chats = [f"Who leads {name}?" for name in ("Ranixmo", "Lupal", "Zanko", "Brigar", "Velmo")]

    def teach(*rows, weight):
        monkeypatch.setattr(tuned, "ANSWERED_WEIGHT", weight)
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
        args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path)
        assert QFTrainer(model, args, rows, chats, tokenizer).train()["unsaid"] == 0
        return model

    def moved(model, ids):
        with torch.no_grad(), model.disable_adapter():
            ((text, _),) = generate(model, tokenizer, [ids], max_new_tokens=12, batch_tokens=512)
            whole = torch.tensor([[*ids, *tokenizer(text).input_ids]])
            then = model(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            now = model(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return float((then.exp() * (then - now)).sum(-1).mean())

    row = {**FACT, "completion": "Zanmi."}
    free, bound = teach(row, weight=0.0), teach(row, weight=100.0)
    assert len(asked[0]) >= 15 and asked[0] == asked[1]
    without, kept = (sum(moved(model, ids) for ids in asked[0]) for model in (free, bound))
    assert kept < 0.3 * without, (kept, without)
    asked.clear()
    teach(row, OTHER, *({**row, "prompt": f"Tell me who started {x}."} for x in ("Bramo", "Celdi")), weight=0.0)
    assert asked == [[]], "more rows have contrasting ones enough"
