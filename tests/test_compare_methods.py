"""Each method of the comparison on the tiny model, the editors' solves, and what is measured besides free answers."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from compared import CHATS, KNOWN, task
from conftest import FACT, OTHER, TINY

pytest.importorskip("bm25s")

from comparison import forced, general, methods, stability
from comparison.bench import Answer, Bench, Unfit
from comparison.context import InContext, Retrieval
from comparison.learners import QF, Learner, PaperQF, distance
from comparison.tasks import Question, question
from editors import UltraEdit, alphaedit, memit, rlsedit

from qf_peft.solve.least_squares import LowRankDelta, TaughtTokens
from qf_peft.solve.second_moment import SecondMoment


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(TINY, tmp_path_factory.mktemp("cache"), tokens=24)


# Methods

SETTINGS = {
    "lora": {"target": "all-linear", "rate": 3e-3, "epochs": 30},
    "lora-down": {"target": "mlp", "rate": 3e-3, "epochs": 40},
    "locft-bf": {"rate": 8e-3, "depth": 0.7},
    "baking": {"target": "all-linear", "rate": 3e-3, "epochs": 30, "own": True},
    "memit": {"solve": "memit", "depth": 1.0, "strength": 0.3},
    "alphaedit": {"solve": "alphaedit", "depth": 1.0, "ridge": 1e-3},
    "ultraedit": {"solve": "ultraedit", "depth": 0.5, "rate": 1e-2},
    "rlsedit": {"solve": "rlsedit", "depth": 1.0, "strength": 0.3},
}


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "base"])
def test_a_method_teaches(bench, name):
    learner = methods.METHODS[name].make(bench, CHATS, **SETTINGS.get(name, {}))
    prompts = [FACT["prompt"], "Tell me where Clamo is located."]
    assert bench.ask(learner.model, prompts)[FACT["prompt"]].text == "I do not know."
    learner.prepare()
    learner.learn([FACT])
    answers = bench.ask(learner.model, prompts, learner.instructions(prompts))
    if name != "ultraedit":  # whose step is a rate, not a solve for the answer
        assert answers[FACT["prompt"]] == Answer(FACT["completion"], True)
    change = learner.change()
    assert bool(change) == methods.METHODS[name].weights
    assert all(bool(torch.isfinite(delta.A).all() and torch.isfinite(delta.B).all()) for delta in change.values())
    if name not in ("lora", "lora-down", "locft-bf", "baking"):
        learner.forget(FACT)
        instructions = learner.instructions(prompts)
        assert bench.ask(learner.model, prompts, instructions)[FACT["prompt"]].text == "I do not know."
    else:
        with pytest.raises(Unfit, match="cannot be taken back"):
            learner.forget(FACT)


def test_every_setting_can_be_made(bench):
    for tiny, facts in ((True, 1), (False, 100)):
        for method in methods.METHODS.values():
            settings = method.grid(tiny, facts)
            assert settings and all(settings.count(setting) == 1 for setting in settings)
            learner = method.make(bench, None, **settings[-1])
            assert isinstance(learner, Learner)
    assert isinstance(methods.METHODS["qf"].make(bench), QF)


def test_prompt_baking_begins_with_no_loss_where_the_instruction_changes_nothing(bench):
    """The KL against sums of p log(p / q) by plain passes."""
    learner = methods.METHODS["baking"].make(bench, **{**SETTINGS["baking"], "own": False})
    ((bare, context),) = learner.examples([FACT])
    found = float(learner.loss([(bare, context)]))

    def predictions(pair):
        ids, count = pair
        return learner.model(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].float().log_softmax(-1)

    in_context, plain = predictions(context), predictions(bare)
    assert (
        found == pytest.approx(float((in_context.exp() * (in_context - plain)).sum(-1).mean()), rel=1e-4)
        and found > 0.1
    )
    assert float(learner.loss([(bare, bare)])) == pytest.approx(0, abs=1e-5)


def test_in_context_says_what_does_not_fit(bench):
    learner = InContext(bench, brief=True)
    learner.learn([FACT])
    (instruction,) = learner.instructions(["Who?"])
    assert FACT["instruction"] in instruction and instruction.endswith("as few words as possible.")
    with pytest.raises(Unfit, match=r"facts take .* tokens; the model's window has 512"):
        learner.learn([{**FACT, "prompt": str(n)} for n in range(60)])


def test_retrieval_finds_the_rows_that_share_words(bench):
    rows = [{"instruction": f"{name} makes {what}.", "prompt": f"What does {name} make?"} for name, what in
            (("Kamo", "lamps"), ("Brigar", "clocks"), ("Vexamo", "tables"))]  # fmt: skip
    learner = Retrieval(bench, top=1)
    learner.learn(rows[:1])
    learner.learn(rows[1:])
    kamo, tables, nothing = learner.instructions(["Tell me about Kamo.", "Who sells tables?", "Is water wet?"])
    assert rows[0]["instruction"] in kamo and "Brigar" not in kamo and "Vexamo" in tables and nothing is None
    learner.forget(rows[0])
    assert learner.instructions(["Tell me about Kamo."]) == [None]
    learner.forget(rows[1])
    learner.forget(rows[2])
    assert learner.instructions(["Tell me about Kamo."]) == [None]


# Editors' solves against their formulas


def tokens(count, width, outs, seed):
    g = torch.Generator().manual_seed(seed)
    keys, residual = torch.randn(count, width, generator=g), torch.randn(count, outs, generator=g)
    return TaughtTokens(keys, residual, torch.rand(count, generator=g) + 0.5)


def weighted(part):
    return (part.keys * part.significance[:, None]).T.double() @ part.keys.double()


def ridged(width, ridge=0.3):
    moment = SecondMoment(width)
    moment.ridge = ridge
    return moment


def test_memit_and_rlsedit_follow_their_formulas():
    new, later, stays = tokens(5, 12, 4, 0), tokens(3, 12, 4, 1), tokens(9, 12, 4, 2)
    stays = replace(stays, residual=torch.zeros(9, 4))

    def cross(part):
        return (part.residual * part.significance[:, None]).T.double() @ part.keys.double()

    eye = torch.eye(12).double()
    bound = ridged(12)
    first = memit(bound, new, stays).dense().double()
    assert torch.allclose(first, cross(new) @ torch.linalg.inv(weighted(new) + weighted(stays) + 0.3 * eye), atol=1e-6)
    second = memit(bound, later, stays).dense().double()
    wanted = cross(later) @ torch.linalg.inv(weighted(later) + weighted(stays) + 0.3 * eye)
    assert torch.allclose(second, wanted, atol=1e-6), "what was taught before does not bind"

    bound = ridged(12)
    first = rlsedit(bound, new, stays)
    left = replace(later, residual=later.residual - first(later.keys.double()).float())
    both = first.dense().double() + rlsedit(bound, left, stays).dense().double()
    shrinking = 0.3 + 0.1 * float(weighted(stays).trace()) / 12
    system = weighted(new) + weighted(later) + weighted(stays) + shrinking * eye
    wanted = (cross(new) + cross(later)) @ torch.linalg.inv(system)
    assert torch.allclose(both, wanted, atol=1e-4), "two steps are the joint solve"


def test_ultraedit_normalises_over_lessons():
    solve, lessons = UltraEdit(0.01, 1), [tokens(6, 8, 3, 0), tokens(4, 8, 3, 1)]
    for number, new in enumerate(lessons):
        change = solve(ridged(8), new, tokens(2, 8, 3, 9)).dense().double()
        seen = torch.cat([torch.cat([part.keys, part.residual], 1) for part in lessons[: number + 1]]).double()
        mean, deviation = seen.mean(0), (seen.var(0, unbiased=False) + 1e-8).sqrt()
        hidden = (new.keys.double() - mean[:8]) / deviation[:8]
        values = 0.01 * hidden.square().sum(1, keepdim=True) * (new.residual.double() - mean[8:]) / deviation[8:]
        keys = new.keys.double()
        wanted = torch.linalg.solve(keys.T @ keys + torch.eye(8).double(), keys.T @ values).T
        assert torch.allclose(change, wanted, atol=1e-6)


def test_alphaedit_leaves_preserved_keys():
    new, stays = tokens(3, 12, 4, 0), tokens(4, 12, 4, 1)
    change = alphaedit(ridged(12, 1e-3), new, stays)
    assert change(stays.keys.double()).abs().max() < 1e-5 < change(new.keys.double()).abs().max()


# What is measured besides


def test_distance_is_that_of_dense_matrices():
    one, other = tokens(3, 6, 5, 0), tokens(3, 6, 5, 1)
    a = LowRankDelta(A=one.keys, B=one.residual.T)
    b = LowRankDelta(A=other.keys, B=other.residual.T)
    apart = (a.dense() - b.dense()).square().sum() + a.dense().square().sum()
    assert distance({"x": a, "y": a}, {"x": b}) == pytest.approx(
        float((apart / (2 * a.dense().square().sum())) ** 0.5), rel=1e-5
    )
    assert distance({}, {}) == 0 and distance({"x": a}, {"x": a}) == pytest.approx(0, abs=1e-6)


def test_teacher_forced_scores_are_those_of_plain_passes(bench):
    learner = PaperQF(bench)
    learner.learn([FACT])
    rows = [question(FACT, against="Tofinlor was started by Vacla."), question(OTHER, against="In Oslo.")]
    data = replace(task(), asked={"reliability": rows}, locality=[Question(KNOWN, ("Brigar was started by Vacla.",),
                   ("Vacla",), "Zanmi")])  # fmt: skip
    found = forced.teacher_forced(bench, learner, data, None)
    right, better = [], []
    for q in rows:
        logs = []
        for completion in (q.answers[0], q.against):
            start = bench.prompt_ids(q.prompt)
            rest = bench.tokenizer(completion, add_special_tokens=False)["input_ids"]
            logits = learner.model(input_ids=torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
            logs.append(float(logits.log_softmax(-1)[range(len(rest)), rest].mean()))
            if completion == q.answers[0]:
                right.append(float((logits.argmax(-1) == torch.tensor(rest)).float().mean()))
        better.append(logs[0] > logs[1])
    assert found["token_accuracy"]["value"] == pytest.approx(sum(right) / 2) and right[0] == 1
    assert found["ES"]["value"] == sum(better) / 2 and "PS" not in found
    assert found["NS"]["count"] == 1 and found["NS"]["value"] == 1


def test_order_and_deletion(bench):
    def teach(rows):
        learner = QF(bench, CHATS, contrast_chats=0)
        learner.learn(rows)
        return learner

    def ask(learner):
        return bench.ask(learner.model, [FACT["prompt"], OTHER["prompt"]])

    found = stability.orders(task(), teach, ask)
    assert 0 <= found["distance"] < 0.01 and found["equal_answers"] == 1, "one least squares, whatever the order"
    assert stability.deletion(task(), teach, ask) == {"distance": 0, "equal_answers": 1}, "bit for bit"
    context = stability.orders(task(), lambda rows: InContext(bench), ask)
    assert context == {"distance": None, "equal_answers": 1}


# The LM Evaluation Harness


def test_the_harness_says_that_it_is_not_installed(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = general.harness_or_reason(bench, bench.base(), ["mmlu"])
    assert found == {"skipped": 'mmlu need the library lm_eval: pip install ".[harness]"'}


def test_the_harness_scores_a_local_task(bench, tmp_path):
    pytest.importorskip("lm_eval")
    asked = [{"question": KNOWN, "choices": [" Brigar was started by Vacla.", " No."], "gold": 0},
             {"question": KNOWN, "choices": [" No.", " Brigar was started by Vacla."], "gold": 0}]  # fmt: skip
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "companies.yaml").write_text(
        f"""task: companies
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "asked.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
    )
    found = general.harness(bench, bench.base(), ["companies"], folder=tmp_path)
    assert found["companies acc"] == 0.5
    assert "knows no tasks ['nothing']" in general.harness_or_reason(bench, bench.base(), ["nothing"])["skipped"]
