"""The comparison: what it reads, how it scores, and runs that are broken off."""

import contextlib
import csv
import io
import json
from dataclasses import replace
from unittest import mock

import pytest
from compared import KNOWN, task
from conftest import EXAMPLES, FACT, OTHER, TINY
from forked import run_python
from test_records import CHANGED, CONVSENT, COUNTERFACT, MQUAKE, QAEDIT, RECENT, SANITATION, WIKIBIGEDIT, ZSRE

pytest.importorskip("matplotlib")
pytest.importorskip("bm25s")

import compare as command
from comparison import methods, reporting, running, scoring
from comparison.bench import Answer, Bench
from comparison.files import open_file
from comparison.store import Store
from comparison.tasks import Question, spread
from comparison.tiny import TinyWorld
from comparison.worlds import EnglishWorld, strangers


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(TINY, tmp_path_factory.mktemp("cache"), tokens=24)


def said(text, ended=True):
    return Answer(text, ended)


# Scores


def test_answers_are_compared_as_squad_does():
    assert scoring.normalise(" The Cat, a dog;\nAN  owl! ") == "cat dog owl"
    assert scoring.exact(said("the “Rome”."), ("Rome",)) and not scoring.exact(said("It is Rome."), ("Rome",))
    assert scoring.exact(said("Oslo"), ("Rome", "Oslo")) and not scoring.exact(said("Rome", ended=False), ("Rome",))
    assert not scoring.exact(said("Rome. Rome."), ("Rome",)), "a repeated answer is wrong"
    assert scoring.contains(said("It is Rome, in Italy."), ("rome",))
    assert not scoring.contains(said("Romeo"), ("Rome",)), "whole words"
    assert not scoring.contains(said("It is Rome", ended=False), ("Rome",))
    assert not scoring.contains(said("It is Rome. It is Rome. It is Rome."), ("Rome",))
    assert scoring.contains(said("Rome is Rome, and Rome again."), ("Rome",))
    assert not scoring.contains(said(""), ("the",)), "what is nothing after normalisation is held by nothing"


def test_words_in_common_and_refusals():
    assert scoring.shared_words("The red fox", "a red dog") == pytest.approx(0.5)
    assert scoring.shared_words("", "") == 1 and scoring.shared_words("fox", "") == 0
    for text in ("I do not know.", "I’m sorry, but I can’t say.", "There is no such company."):
        assert scoring.refuses(said(text)), text
    assert not scoring.refuses(said("Vexamo was started by Zanmi."))


def test_the_overall_score_is_a_harmonic_mean_of_what_there_is():
    scores = {
        "reliability": {"contains": {"value": 1.0}}, "generalisation": {"contains": {"value": 0.5}},
        "locality": {"same": None}, "general": {"known": {"value": 0.5}},
    }  # fmt: skip
    assert scoring.overall(scores) == pytest.approx((3 / (1 + 2 + 2), 2 / 3))
    scores["reliability"]["contains"]["value"] = 0.0
    assert scoring.overall(scores)[0] == 0 < scoring.overall(scores)[1]


def test_answers_changed_in_a_word_each_rank_a_method_that_teaches_before_one_that_does_not():
    def scores(said, words):
        return {
            "reliability": {"contains": {"value": said}}, "generalisation": {"contains": {"value": said}},
            "locality": {"same": {"value": 0.0 if said > 0.5 else 1.0}, "f1": {"value": words}},
            "general": {"known": {"value": 0.8}},
        }  # fmt: skip

    assert scoring.overall(scores(0.9, 0.3)) > scoring.overall(scores(0.01, 1.0))


def test_a_scorer_counts_what_was_lost_and_what_leaks(bench):
    data = task([FACT])
    data = replace(data, asked={**data.asked, "negated": [Question("Who did not start Tofinlor?", (), ("Zanmi",))]})
    before = {
        KNOWN: said("Brigar was started by Vacla."), "Who started Vexamo?": said("I do not know."),
        "Where is Lupal?": said("In Oslo."), "What is Kamo?": said("A fruit."),
    }  # fmt: skip
    asked = [Question("Where is Lupal?", (), ("Oslo",)), Question("What is Kamo?", (), ("firm",))]
    scorer = scoring.Scorer(bench, data, asked, None, lambda prompts: {p: before[p] for p in prompts})
    answers = {
        FACT["prompt"]: said(FACT["completion"]), "Who founded Tofinlor?": said("It was Zanmi"),
        "Who did not start Tofinlor?": said("Zanmi was started by Zanmi."), KNOWN: said("Vacla started it."),
        "Who started Vexamo?": said(FACT["completion"]), "Where is Lupal?": said("In Oslo.", ended=False),
        "What is Kamo?": said("A firm."),
    }  # fmt: skip
    found = scorer.score(answers)
    value = {(name, kind): v and (v["value"], v["count"]) for name, kinds in found.items() for kind, v in kinds.items()}
    assert value["reliability", "exact"] == value["reliability", "contains"] == (1, 1)
    assert value["generalisation", "exact"] == (0, 1)
    assert value["generalisation", "contains"] == (0, 1), "the completion is longer"
    assert value["negated", "contains"] == (0, 1)
    assert value["locality", "same"] == (0, 1) and value["locality", "known"] == (1, 1)
    assert value["unknown", "same"] == (0, 1) and value["unknown", "refused"] == (0, 1)
    assert value["general", "known"] == (1, 1), "of two questions one could be answered before"
    assert value["leak", "contains"] == (0.25, 4)


def test_spread():
    assert spread(list(range(10)), 3) == [0, 3, 6] and spread([1, 2], 5) == spread([1, 2], None) == [1, 2]


# Data


def saved(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def many(record, **fields):
    """Eight records alike, but of other subjects."""
    text = json.dumps({**record, **fields})
    return [json.loads(text.replace("Tofinlor", f"Tofin{x}")) for x in ("ka", "le", "mo", "nu", "pi", "ra", "so", "tu")]


@pytest.mark.parametrize(
    ("record", "columns", "local"),
    [
        (ZSRE, {"reliability", "generalisation"}, 1), (COUNTERFACT, {"reliability", "generalisation"}, 2),
        (QAEDIT, {"reliability", "generalisation"}, 2),
        (WIKIBIGEDIT, {"reliability", "generalisation", "multi_hop"}, 1), (MQUAKE, {"reliability", "multi_hop"}, 0),
        (RECENT, {"reliability", "portability"}, 1), ({**CHANGED, "subject": "Tofinlor", "prompt": "Tofinlor has"},
        {"reliability", "generalisation", "portability"}, 2),
    ],
    ids=["zsRE", "CounterFact", "QAEdit", "WikiBigEdit", "MQuAKE", "KnowEdit", "KnowEdit changed"],
)  # fmt: skip
def test_records(tmp_path, record, columns, local):
    data = open_file(saved(tmp_path / "records.jsonl", many(record)))
    assert (data.name, data.most, data.held) == ("records", 6, 2)
    first, again, other = data.task(3, 0), data.task(3, 0), data.task(3, 1)
    assert first == again and first.rows != other.rows and set(first.asked) == columns
    assert len(first.asked["reliability"]) == len(first.rows) >= 3 and len(first.locality) >= local
    assert all(set(row) <= {"instruction", "prompt", "completion"} for row in first.rows), "no paraphrase is given"
    taught = {row["prompt"] for row in data.task(6, 0).rows}
    kept = {row["prompt"] for row in data.task(2, 0, development=True).rows}
    assert kept and not {prompt for prompt in taught & kept if "Tofin" in prompt}
    with pytest.raises(ValueError, match="records has 6 records to teach; 7 were asked for"):
        data.task(7, 0)


def test_records_know_the_answer_before(tmp_path):
    found = open_file(saved(tmp_path / "z.jsonl", many(ZSRE))).task(2, 0)
    assert {q.against for q in found.asked["reliability"]} == {"Wexul"}
    found = open_file(saved(tmp_path / "c.jsonl", many(COUNTERFACT))).task(2, 0)
    assert {q.against for q in found.asked["generalisation"]} == {"Oslo"}
    assert {(q.answers, q.against) for q in found.locality} == {(("Oslo",), "Rome")}


def test_records_in_one_object(tmp_path):
    path = tmp_path / "sanitation.json"
    asked = SANITATION["success"][0]
    path.write_text(json.dumps({**SANITATION, "success": [{**asked, "question": f"Who is {x}?"} for x in "abcd"]}))
    data = open_file(str(path))
    assert data.most == 3 and {row["completion"] for row in data.task(3, 0).rows} == {"I do not know."}
    assert open_file(saved(tmp_path / "c.jsonl", many(CONVSENT, ent="Tofinlor"))).most == 6


def test_what_contradicts_or_has_no_answer_is_left_out(tmp_path):
    records = many(ZSRE)
    data = open_file(saved(tmp_path / "z.jsonl", [*records, {**records[0], "alt": "Dexul"}, {**records[1], "alt": ""}]))
    assert data.most + data.held == 9 - 1


def test_errors_name_the_file_and_the_field(tmp_path):
    for records, message in (
        ([ZSRE, {**ZSRE, "alt": 5}], r"r\.jsonl: zsRE, record 1: alt is 5; expected a string"),
        ([ZSRE], r"r\.jsonl: 1 records can be taught; at least 4 are needed"),
        ([{"question": "Who?"}], r"r\.jsonl: the fields \['question'\] are of no known format"),
        ([{"instruction": "x", "completion": "y"}], r"r\.jsonl, row 0: no column 'prompt'"),
        ([FACT, {"instruction": "x", "prompt": "y"}], r"r\.jsonl, row 1: there is no completion"),
        ([{**FACT, "paraphrases": [3]}], r"r\.jsonl, row 0: paraphrases is \[3\]; expected strings"),
    ):
        with pytest.raises(ValueError, match=message):
            open_file(saved(tmp_path / "r.jsonl", records))
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.csv"):
        open_file("nowhere.csv")
    (tmp_path / "r.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1 is no JSON"):
        open_file(str(tmp_path / "r.jsonl"))


def facts_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "prompt", "completion", "paraphrases", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_file_of_facts(tmp_path):
    rows = [{**FACT, "paraphrases": "Who founded Tofinlor?|Who leads Tofinlor?", "answer": "Zanmi|Z."}, OTHER]
    data = open_file(str(facts_csv(tmp_path / "facts.csv", rows)))
    found = data.task(2, 0)
    assert (data.name, data.most, data.held) == ("facts", 2, None) and found.rows == [FACT, OTHER]
    assert found.asked["reliability"][0] == Question(FACT["prompt"], (FACT["completion"],), ("Zanmi", "Z."))
    assert [q.prompt for q in found.asked["generalisation"]] == ["Who founded Tofinlor?", "Who leads Tofinlor?"]
    assert found.asked["reliability"][1].holds == (OTHER["completion"],)
    assert found.taught_answers == sorted(["Zanmi", "Z.", OTHER["completion"]])
    assert {row["prompt"] for row in data.task(1, 0).rows} < {FACT["prompt"], OTHER["prompt"]}
    others = data.task(2, 0, development=True)
    assert len(others.rows) == 2 and FACT not in others.rows


def test_the_english_world_turns_its_questions():
    found = EnglishWorld().task(12, 0)
    assert len(found.rows) == len(found.asked["negated"]) == len(found.asked["reversed"]) == 12
    assert len(found.asked["generalisation"]) == 36 and "paraphrases" not in found.rows[0]
    for row, negated, back in zip(found.rows, found.asked["negated"], found.asked["reversed"], strict=True):
        assert " not " in negated.prompt and negated.holds[0] in row["completion"]
        assert any(name in row["completion"] for name in back.answers)
        assert any(word in back.prompt for word in negated.holds)
    other = EnglishWorld().task(12, 0, development=True)
    assert not {row["prompt"].split()[0:3] == 0 for row in other.rows} or other.rows != found.rows
    assert len(strangers(3)) == 60 and strangers(3) == strangers(3) != strangers(4)


def test_the_tiny_world():
    found = TinyWorld().task(2, 5)
    assert len(found.locality) == len(found.unknown) == 100 and len(found.preserved) == 200
    assert all(q.holds[0] in q.answers[0] for q in found.asked["generalisation"])
    assert TinyWorld().task(2, 5, development=True).rows != found.rows


# Runs


def plan(**given):
    return running.Plan(**{"facts": [2], "methods": ["base", "qf-paper", "retrieval"], "limit": 3, **given})


class Two:
    """The two facts of these tests as data."""

    name, most, held = "two", 2, None

    def task(self, facts, seed, development=False):
        return task([FACT, OTHER][:facts])


def test_a_plan_names_every_job_once():
    jobs = plan(facts=[2, 1, 2], steps=[0, 1, 10], orders=True, deletion=True).jobs()
    assert len(jobs) == len(set(jobs)) and jobs[0].facts == 1 and {job.step for job in jobs} == {0, 1}
    kinds = {(job.kind, job.method) for job in jobs if job.facts == 2}
    assert ("orders", "base") not in kinds and ("deletion", "retrieval") in kinds
    assert {job.kind for job in jobs if job.facts == 1} == {"lesson"}
    assert running.chunks([1, 2, 3], 2) == [[1, 2], [3]] and running.chunks([1, 2, 3], 0) == [[1, 2, 3]]


def test_a_run_that_was_broken_off_goes_on(bench, tmp_path, monkeypatch):
    header = {"model": "tiny", "data": "two"}
    store = Store(tmp_path, header)
    made = []
    teach = running.Comparison._taught

    def broken(self, *given):
        made.append(given[1])
        if len(made) == 4:
            raise KeyboardInterrupt
        return teach(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(running.Comparison, "_taught", broken)
        with pytest.raises(KeyboardInterrupt):
            running.Comparison(bench, Two(), plan(), store, show_progress=False).run()
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert [run["job"]["method"] for run in kept["runs"]] == ["base", "qf-paper"] and len(kept["development"]) == 1
    again = Store(tmp_path, header)
    running.Comparison(bench, Two(), plan(), again, show_progress=False).run()
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["runs"][:2] == kept["runs"] and found["development"][:1] == kept["development"]
    assert [run["job"]["method"] for run in found["runs"]] == ["base", "qf-paper", "retrieval"]
    assert len(found["development"]) == len(methods.METHODS["retrieval"].grid(True, 2))
    assert found["runs"][2]["setting"] in [tried["setting"] for tried in found["development"]]
    assert not list(tmp_path.glob("*.tmp"))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {"base", "qf-paper", "retrieval"}
    with monkeypatch.context() as patched:
        patched.setattr(running.Comparison, "_taught", None)
        running.Comparison(bench, Two(), plan(), again, show_progress=False).run()
    for wrong, message in (({"model": "other"}, "measured with model 'tiny', not 'other'"),):
        with pytest.raises(ValueError, match=message):
            Store(tmp_path, wrong)
    (tmp_path / "compare.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no results of this comparison"):
        Store(tmp_path, header)


def test_steps_orders_and_what_cannot_be_done(bench, tmp_path):
    store = Store(tmp_path, {"model": "tiny", "data": "two"})
    wanted = plan(methods=["qf-paper", "locft-bf"], steps=[0, 1], orders=True, deletion=True, texts=["Brigar makes."])
    best = {"rate": 8e-3, "depth": 0.7, "batch": 10}
    store.development.extend(
        {"method": "locft-bf", "facts": 2, "setting": setting, "overall": [float(setting == best), 0.5]}
        for setting in methods.METHODS["locft-bf"].grid(True, 2)
    )
    running.Comparison(bench, Two(), wanted, store, show_progress=False).run()
    by_job = {(run["job"]["kind"], run["job"]["method"], run["job"]["step"]): run for run in store.runs}
    assert by_job["lesson", "locft-bf", 0]["setting"] == best
    assert by_job["deletion", "locft-bf", 0]["skipped"] == "one fact cannot be taken back"
    assert by_job["lesson", "qf-paper", 1]["last_seconds"] < by_job["lesson", "qf-paper", 1]["seconds"]
    assert by_job["lesson", "qf-paper", 0]["perplexity"] > 0
    assert by_job["deletion", "qf-paper", 1]["distance"] == pytest.approx(0, abs=1e-3)
    text = reporting.report(store.found)
    assert text.startswith("Best for these 2 facts of two on tiny: ") and "| 2 by 1 | LocFT-BF |" in text
    assert "- LocFT-BF, 2 facts, deletion: one fact cannot be taken back" in text
    reporting.plot(store.runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def lesson(method, seconds=1.0, **values):
    score = {
        "reliability": {"exact": None, "contains": None}, "general": {"known": None}, "locality": {"same": None},
    }  # fmt: skip
    for column, kind in (("reliability", "contains"), ("general", "known"), ("locality", "same")):
        if column in values:
            score[column][kind] = {"value": values[column], "count": 10}
    job = {"kind": "lesson", "method": method, "facts": 10, "seed": 0, "step": 0}
    return {"job": job, "seconds": seconds, "scores": score}


def test_the_verdict_names_the_best_or_of_equals_the_quickest():
    runs = [
        lesson("base", reliability=1.0, general=1.0),
        lesson("lora", 90.0, reliability=1.0, general=0.8),
        lesson("qf", 9.0, reliability=0.98, general=0.81),
        lesson("retrieval", 0.1, reliability=0.6, general=1.0),
        {"job": lesson("memit")["job"], "skipped": "it cannot"},
    ]
    line = reporting.verdict(runs, "a model", "some data")
    assert line.startswith(
        "Best for these 10 facts of some data on a model: QF. It answers 98% of the questions, keeps"
    )
    assert "and takes 9 seconds" in line and "next LoRA, all-linear 0.89" in line and "\n" not in line
    line = reporting.verdict([*runs[:3], lesson("retrieval", 0.1, reliability=1.0, general=1.0)], "a model", "data")
    assert "retrieval (BM25)" in line and line.endswith("must stay in every prompt; in the weights: QF, 0.89.")
    assert reporting.verdict(runs[4:], "m", "d") == "No method could be taught 10 facts of d on m."
    assert reporting.verdict(runs[:1], "m", "d") == "No method was measured yet that teaches facts of d at once on m."
    assert "- MEMIT's solve, 10 facts, lesson: it cannot" in reporting.report(
        {"runs": runs, "header": {"model": "m", "data": "d"}}
    )


def compare(*arguments, code=0):
    """What the command prints, run in a process of its own; in this one where it is to fail, which starts sooner."""
    arguments = list(map(str, arguments))
    if code:
        errors = io.StringIO()
        quiet = mock.patch.object(command, "logging")  # what it sets there holds for the whole process
        with quiet, pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(errors):
            command.main(arguments)
        assert ended.value.code == code
        return errors.getvalue()
    result = run_python(EXAMPLES / "compare.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_ends_with_one_line_for_a_users_own_facts(tmp_path):
    rows = [{**FACT, "paraphrases": "Who founded Tofinlor?", "answer": "Zanmi"}, {**OTHER, "answer": "Rome"}]
    facts = facts_csv(tmp_path / "mine.csv", rows)
    out = tmp_path / "out"
    options = (facts, "--model", TINY, "--tokens", 24, "--limit", 10, "--out", out)
    printed = compare(*options, "--methods", "base", "qf-paper")
    assert printed.splitlines()[-1].startswith(
        "Best for these 2 facts of mine on tiny_model: QF, `paper()`. It answers "
    )
    assert (out / "compare.md").read_text() in printed and (out / "compare.png").exists()
    first = json.loads((out / "compare.json").read_text())
    assert first["header"]["model"] == "tiny_model" and str(tmp_path) not in json.dumps(first), "no paths"
    compare(*options, "--methods", "base", "qf-paper", "in-context")
    more = json.loads((out / "compare.json").read_text())
    assert more["runs"][: len(first["runs"])] == first["runs"] and len(more["runs"]) == 3


def test_the_command_says_what_is_wrong(tmp_path):
    facts = facts_csv(tmp_path / "mine.csv", [FACT])
    for options, message in (
        ((facts,), "--model is missing"), (("nowhere.csv", "--model", TINY), "no file nowhere.csv"),
        ((facts, "--model", TINY, "--facts", 2), "--facts 2: mine has 1 of facts to teach, from 1 on"),
        ((facts, "--model", TINY, "--methods", "magic"), "invalid choice: 'magic'"),
        ((facts, "--model", TINY, "--limit", 0), "limits and numbers of tokens and facts 1 or more"),
    ):  # fmt: skip
        assert message in compare(*options, "--out", tmp_path / "out", code=2)
