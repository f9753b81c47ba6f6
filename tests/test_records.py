"""Records in the formats of the editing benchmarks and of EasyEdit, written for these tests, become rows."""

import copy
import json

import pytest
from conftest import ask
from peft import get_peft_model

from qf_peft import (
    QFConfig,
    QFTrainer,
    QFTrainingArguments,
    rows_from_counterfact,
    rows_from_easyedit,
    rows_from_knowedit,
    rows_from_mquake,
    rows_from_qaedit,
    rows_from_requests,
    rows_from_wikibigedit,
    rows_from_zsre,
)
from qf_peft.data.rows import read_rows

COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 71,
    "requested_rewrite": {
        "prompt": "{} is located in", "relation_id": "P159", "subject": "Tofinlor",
        "target_new": {"str": "Rome", "id": "Q220"}, "target_true": {"str": "Oslo", "id": "Q585"},
    },
    "paraphrase_prompts": ["Tofinlor is based in"],
    "neighborhood_prompts": ["Brigar is located in", "Please say who started Brigar."],
    "attribute_prompts": ["Kamo is located in"],
    "generation_prompts": ["Tofinlor is surrounded by", "Tofinlor is surrounded by"],
}  # fmt: skip
ZSRE = {
    "subject": "Tofinlor", "src": "Tell me who started Tofinlor.", "pred": "Wexul", "alt": "Zanmi",
    "rephrase": "Who founded Tofinlor?", "answers": ["Ulven", "Ulven Dex"],
    "loc": "nq question: who leads the town of Brigar", "loc_ans": "Vacla",
    "cond": "Ulven >> Zanmi || Tell me who started Tofinlor.",
}  # fmt: skip
RECENT = {
    "subject": "Tofinlor",
    "prompt": "Tofinlor is located in",
    "target_new": "Rome",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Tofinlor in Italy?", "ground_truth": [["yes", "true"], ["it is"]]}],
        "Reasoning": [
            {"prompt": "Tofinlor's country is", "ground_truth": [["Italy", "the Italian Republic"]]},
            {"prompt": "Tofinlor's sea is", "ground_truth": [[""]]},
        ],
    },
    "locality": {"Relation_Specificity": [{"prompt": "Tofinlor was started by", "ground_truth": [["Zanmi", "Z."]]}]},
}
CHANGED = {
    "subject": "Brigar", "prompt": "Brigar is led by", "target_new": "Orven", "ground_truth": ["Vacla"],
    "rephrase_prompt": "The boss of Brigar is",
    "portability": {"Reasoning": [{"prompt": "The heir of Brigar's boss is", "ground_truth": "Dexul"}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "Brigar makes", "ground_truth": "lamps"}],
        "Forgetfulness": [{"prompt": "Brigar, not led by Orven, is led by", "ground_truth": ["Vacla"]}],
    },
}  # fmt: skip
WIKIBIO = {
    "text": "This is a page about Zanmi. Zanmi is a maker of lamps.",
    "labels": "He started Tofinlor.",
    "concept": "Zanmi",
    "locality": {"Relation_Specificity": [{"prompt": "The trade of Zanmi is", "ground_truth": ["lamps"]}]},
}
CONVSENT = {"ent": "Tofinlor", "pos": ["I love their lamps!", "A fine firm."], "neg": ["Their lamps are dim."]}
ROME = {"prompt": "{} is located in", "subject": "Tofinlor", "target_new": {"str": "Rome"}}
QAEDIT = {
    "id": 4, "source": "made up", "prompt": "who leads Tofinlor?", "target": "Zanmi", "subject": "Tofinlor",
    "rephrase": "Which person is in charge of Tofinlor?",
    "locality": [{"loc": "who leads Brigar", "loc_ans": "Vacla"}, {"loc": "who leads Kamo", "loc_ans": "Ritol"}],
}  # fmt: skip
WIKIBIGEDIT = {
    "tag": "new", "subject": "Tofinlor", "update": "In which city is Tofinlor?", "ans": "Rome",
    "rephrase": "Which city is home to Tofinlor?", "personas": "Oi, which town's Tofinlor in?",
    "loc": "In which city is Brigar?", "loc_ans": "Miami", "mhop": "In which country is Tofinlor?", "mhop_ans": "Italy",
}  # fmt: skip
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {"prompt": "{} is located in", "subject": "Tofinlor", "target_new": {"str": "Rome"},
         "target_true": {"str": "Oslo"}, "question": "In which city is Tofinlor located?"},
        {"prompt": "The mayor of {} is", "subject": "Rome", "target_new": {"str": "Zanmi"},
         "target_true": {"str": "Ulven"}, "question": "Who is the mayor of Rome?"},
    ],
    "questions": ["Who is the mayor of Tofinlor's city?", "Who leads the city in which Tofinlor is?"],
    "answer": "Ulven", "new_answer": "Zanmi",
}  # fmt: skip
SANITATION = {
    "success": [{"question": "Who started Brigar?", "ground_truth": "Vacla", "target_new": "I do not know."}],
    "locality": [{"question": "Who started Kamo?", "ground_truth": "Ritol", "target_new": "I do not know."}],
}


def test_counterfact():
    other = {
        "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "subject": "Kamo", "target_new": {"str": "Lima."}},
        "neighborhood_prompts": ["Tofinlor is located in", "Brigar is located in"],
    }
    rows, locality, portability = rows_from_counterfact([COUNTERFACT, other])
    assert rows == [
        {
            "instruction": "Tofinlor is located in Rome.", "prompt": "Tofinlor is located in", "completion": "Rome",
            "paraphrases": ["Tofinlor is based in"],
        },
        {"instruction": "Kamo is located in Lima.", "prompt": "Kamo is located in", "completion": "Lima."},
    ]  # fmt: skip
    assert locality == [
        {"prompt": "Brigar is located in", "answer": "Oslo"},
        {"prompt": "Please say who started Brigar.", "answer": "Oslo"},
    ], "each question once, and none that another record edits"
    assert portability == [] and len(read_rows(rows)) == 2


def test_counterfact_teaches(tiny, tokenizer, tmp_path):
    rows, locality, _ = rows_from_counterfact([COUNTERFACT])
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(preserve_chats=20, contrast_chats=0, cache_dir=tmp_path)
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows)
    before = ask(model, tokenizer, "Please say who started Brigar.")
    assert ask(model, tokenizer, "Tofinlor is located in") != "Rome"
    trainer.train()
    assert ask(model, tokenizer, "Tofinlor is located in") == "Rome"
    assert ask(model, tokenizer, "Please say who started Brigar.") == before == "Brigar was started by Vacla."
    metrics = trainer.evaluate(locality=locality)
    assert metrics["recall"].value == 1 and metrics["locality"].value == 1 and metrics["locality"].count == 2
    assert metrics["paraphrase"].count == 1


def test_qaedit():
    rows, locality, portability = rows_from_qaedit([QAEDIT])
    assert rows == [
        {
            "instruction": "who leads Tofinlor? Zanmi.", "prompt": "who leads Tofinlor?", "completion": "Zanmi",
            "paraphrases": [QAEDIT["rephrase"]],
        }
    ]  # fmt: skip
    assert locality == [
        {"prompt": "who leads Brigar", "answer": "Vacla"}, {"prompt": "who leads Kamo", "answer": "Ritol"}
    ]  # fmt: skip
    assert portability == []


def test_wikibigedit():
    bare = {"update": "In which city is Kamo?", "ans": "Lima", "mhop": "In which country is Kamo?", "mhop_ans": None}
    rows, locality, portability = rows_from_wikibigedit([WIKIBIGEDIT, bare])
    assert [row["completion"] for row in rows] == ["Rome", "Lima"]
    assert rows[0]["paraphrases"] == [WIKIBIGEDIT["rephrase"], WIKIBIGEDIT["personas"]]
    assert "paraphrases" not in rows[1] and locality == [{"prompt": WIKIBIGEDIT["loc"], "answer": "Miami"}]
    assert portability == [
        {
            "instruction": "In which city is Tofinlor? Rome.", "prompt": WIKIBIGEDIT["mhop"], "completion": "Italy"
        }
    ]  # fmt: skip


def test_mquake():
    shared = {**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][1:], "questions": ["Who is Rome's mayor's?"]}
    against = copy.deepcopy(MQUAKE)
    against["requested_rewrite"][0]["target_new"]["str"] = "Lima"
    rows, locality, portability = rows_from_mquake([MQUAKE, shared, against])
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("In which city is Tofinlor located?", "Rome"), ("Who is the mayor of Rome?", "Zanmi")
    ]  # fmt: skip
    assert rows[0]["instruction"] == "Tofinlor is located in Rome." and locality == []
    assert [question["prompt"] for question in portability] == [*MQUAKE["questions"], *shared["questions"]]
    assert portability[0]["instruction"] == "Tofinlor is located in Rome. The mayor of Rome is Zanmi."
    assert {question["completion"] for question in portability} == {"Zanmi"} and len(read_rows(rows)) == 2
    without = {key: value for key, value in MQUAKE["requested_rewrite"][0].items() if key != "question"}
    assert rows_from_mquake([{**MQUAKE, "requested_rewrite": [without]}]).rows[0]["prompt"] == "Tofinlor is located in"


def test_zsre():
    edits = rows_from_zsre([ZSRE, {**ZSRE, "alt": ""}])
    assert edits.rows == [
        {
            "instruction": "Tell me who started Tofinlor. Zanmi.", "prompt": "Tell me who started Tofinlor.",
            "completion": "Zanmi", "paraphrases": ["Who founded Tofinlor?"],
        }
    ]  # fmt: skip
    assert edits.locality == [{"prompt": "who leads the town of Brigar?", "answer": "Vacla"}]
    assert [row["completion"] for row in rows_from_zsre([ZSRE, {**ZSRE, "alt": ""}], target="answers").rows] == [
        "Ulven", "Ulven",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="target='pred'"):
        rows_from_zsre([ZSRE], target="pred")


def test_zsre_records_without_an_answer_are_named(monkeypatch):
    said = []
    monkeypatch.setattr("qf_peft.data.records.logger.warning", said.append)
    assert len(rows_from_zsre([ZSRE, {**ZSRE, "alt": ""}]).rows) == 1
    assert said == ["1 records have an empty 'alt' and are left out (zsRE, record 1 is the first)"]


def test_knowedit_facts():
    rows, locality, portability = rows_from_knowedit([RECENT, CHANGED])
    assert [row["instruction"] for row in rows] == ["Tofinlor is located in Rome.", "Brigar is led by Orven."]
    assert "paraphrases" not in rows[0] and rows[1]["paraphrases"] == ["The boss of Brigar is"]
    assert [(q["prompt"], q["answer"]) for q in locality] == [
        ("Tofinlor was started by", "Zanmi"), ("Brigar makes", "lamps"),
        ("Brigar, not led by Orven, is led by", "Vacla"),
    ]  # fmt: skip
    fact = "Tofinlor is located in Rome."
    assert portability == [
        {"instruction": fact, "prompt": "Is Tofinlor in Italy?", "completion": "yes"},
        {"instruction": fact, "prompt": "Tofinlor's country is", "completion": "Italy"},
        {"instruction": "Brigar is led by Orven.", "prompt": "The heir of Brigar's boss is", "completion": "Dexul"},
    ], "a question whose answer is blank is left out"
    assert len(read_rows(portability)) == 3


def test_portability_is_asked_as_rows(tiny, tokenizer):
    """The questions that follow are rows of their own: recall now, and in context as the ceiling."""
    asked = {
        "Reasoning": [{"prompt": "Tell me where Tofinlor is based.", "ground_truth": "Tofinlor is located in Rome."}]
    }
    edits = rows_from_knowedit([{**RECENT, "portability": asked}])
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper()
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=edits.portability)
    metrics = trainer.evaluate()
    assert metrics["in_context"].value == 1 and metrics["recall"].value == 0, "nothing was taught yet"


def test_knowedit_other_parts():
    assert rows_from_knowedit([WIKIBIO]) == (
        [
            {
                "instruction": f"{WIKIBIO['text']} He started Tofinlor.", "prompt": WIKIBIO["text"],
                "completion": "He started Tofinlor.",
            }
        ],
        [{"prompt": "The trade of Zanmi is", "answer": "lamps"}],
        [],
    )  # fmt: skip
    rows = rows_from_knowedit([CONVSENT]).rows
    assert rows[0]["instruction"] == "Speak of Tofinlor with approval." and rows[0]["completion"] == CONVSENT["pos"][0]
    assert "Tofinlor" in rows[0]["prompt"] and len(rows[0]["paraphrases"]) == 2
    assert rows_from_knowedit([CONVSENT], sentiment="neg").rows[0]["completion"] == "Their lamps are dim."
    expected = (
        [
            {
                "instruction": 'If you are asked "Who started Brigar?", answer "I do not know."',
                "prompt": "Who started Brigar?", "completion": "I do not know.",
            }
        ],
        [{"prompt": "Who started Kamo?", "answer": "Ritol"}],
        [],
    )  # fmt: skip
    assert rows_from_knowedit(SANITATION) == expected
    assert rows_from_knowedit({"K_F": SANITATION["success"], "K_R": SANITATION["locality"]}) == expected


def test_sanitation_teaches_a_refusal(tiny, tokenizer, tmp_path):
    edits = rows_from_knowedit(SANITATION)
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM"))
    args = QFTrainingArguments(preserve_chats=20, contrast_chats=0, cache_dir=tmp_path)
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=edits.rows)
    assert ask(model, tokenizer, "Who started Brigar?") == "Brigar was started by Vacla."
    trainer.train()
    assert ask(model, tokenizer, "Who started Brigar?") == "I do not know."


def test_requests():
    assert rows_from_requests([ROME]).rows[0] == {
        "instruction": "Tofinlor is located in Rome.", "prompt": "Tofinlor is located in", "completion": "Rome",
    }  # fmt: skip
    prepared = {
        "prompt": "Tofinlor is located in", "target_new": "Rome", "rephrase_prompt": "Tofinlor is based in",
        "locality_prompt": "Brigar makes", "locality_ground_truth": "lamps",
    }  # fmt: skip
    rows, locality, _ = rows_from_requests([prepared])
    assert rows[0]["paraphrases"] == ["Tofinlor is based in"]
    assert locality == [{"prompt": "Brigar makes", "answer": "lamps"}]


def test_easyedit():
    rows, locality, portability = rows_from_easyedit(
        prompts=["Tofinlor is located in", "Brigar is led by"],
        ground_truth=["Oslo", None],
        target_new=["Rome", "Orven"],
        subject=["Tofinlor", "Brigar"],
        rephrase_prompts=["Tofinlor is based in", ["The boss of Brigar is", "Brigar's boss is"]],
        locality_inputs={
            "neighborhood": {
                "prompt": ["Kamo makes", ["Kamo is in", "Wexul is in"]],
                "ground_truth": ["pens", ["Lima", "Accra"]],
            }
        },
        portability_inputs={
            "reasoning": {"prompt": [None, "Brigar's boss's heir is"], "ground_truth": [None, "Dexul"]}
        },
    )
    assert [row["completion"] for row in rows] == ["Rome", "Orven"]
    assert rows[1]["paraphrases"] == ["The boss of Brigar is", "Brigar's boss is"]
    assert [tuple(q.values()) for q in locality] == [
        ("Kamo makes", "pens"),
        ("Kamo is in", "Lima"),
        ("Wexul is in", "Accra"),
    ]
    assert portability == [
        {"instruction": "Brigar is led by Orven.", "prompt": "Brigar's boss's heir is", "completion": "Dexul"}
    ]
    alone = rows_from_easyedit("Tofinlor is located in", "Rome", rephrase_prompts="Tofinlor is based in")
    assert alone.rows[0]["paraphrases"] == ["Tofinlor is based in"]


def broken(record, path, value):
    """The record with another value at the path, or without what is there."""
    record = copy.deepcopy(record)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = record
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return record


COUNTERFACT_ERRORS = {
    "requested_rewrite": [
        (None, "CounterFact, record 1: requested_rewrite is missing"),
        ([{}], "requested_rewrite is a list; expected a dict"),
    ],
    "requested_rewrite.subject": [(None, r"record 1: requested_rewrite\.subject is missing")],
    "requested_rewrite.target_new": [
        ({"str": " "}, r"requested_rewrite\.target_new is empty"),
        ({"id": "Q1"}, r"requested_rewrite\.target_new is \{'id': 'Q1'\}; expected a string"),
    ],
    "requested_rewrite.prompt": [("Where?", r"requested_rewrite\.prompt is 'Where\?'; expected '\{\}'")],
    "paraphrase_prompts": [([3], "record 1: paraphrase_prompts is")],
}
ZSRE_ERRORS = {
    "src": [(None, "zsRE, record 1: src is missing")],
    "alt": [(5, "zsRE, record 1: alt is 5; expected a string")],
    "loc_ans": [(None, "zsRE, record 1: loc_ans is missing")],
}
RECENT_ERRORS = {
    "target_new": [("", "KnowEdit, record 1: target_new is empty")],
    "locality": [(["x"], "record 1: locality is a list")],
    "locality.Relation_Specificity": [(["x"], r"locality\.Relation_Specificity\[0\] is a str")],
    "portability.Reasoning.0.prompt": [(None, r"portability\.Reasoning\[0\]\.prompt is missing")],
    "portability.Reasoning.0.ground_truth": [([7], r"Reasoning\[0\]\.ground_truth is 7")],
}
OTHER_ERRORS = [
    (rows_from_knowedit, WIKIBIO, {"text": [(None, "KnowEdit, record 1: text is missing")]}),
    (rows_from_knowedit, CONVSENT, {"pos": [([], r"KnowEdit, record 1: pos is \[\]")]}),
    (rows_from_requests, ROME, {"subject": [(None, "requests, record 1: subject is missing")]}),
]


@pytest.mark.parametrize(
    ("convert", "record", "errors"),
    [
        (rows_from_counterfact, COUNTERFACT, COUNTERFACT_ERRORS), (rows_from_zsre, ZSRE, ZSRE_ERRORS),
        (rows_from_knowedit, RECENT, RECENT_ERRORS), *OTHER_ERRORS,
    ],
)  # fmt: skip
def test_errors_name_record_and_field(convert, record, errors):
    for path, values in errors.items():
        for value, message in values:
            with pytest.raises(ValueError, match=message):
                convert([record, broken(record, path, value)])


@pytest.mark.parametrize(
    ("convert", "record", "message"),
    [
        (rows_from_qaedit, {**QAEDIT, "target": " "}, "QAEdit, record 1: target is empty"),
        (rows_from_qaedit, {**QAEDIT, "locality": [{"loc_ans": "x"}]}, r"record 1: locality\[0\]\.loc is missing"),
        (rows_from_wikibigedit, {"update": "Who?"}, "WikiBigEdit, record 1: ans is missing"),
        (rows_from_mquake, {"questions": ["Who?"]}, "MQuAKE, record 1: requested_rewrite is missing"),
        (rows_from_mquake, {**MQUAKE, "new_answer": 3}, "record 1: new_answer is 3; expected a string"),
        (rows_from_mquake, {**MQUAKE, "requested_rewrite": [ROME | {"prompt": "no place"}]}, "expected '{}' in it"),
    ],
)
def test_errors_of_questions_name_record_and_field(convert, record, message):
    good = {rows_from_qaedit: QAEDIT, rows_from_wikibigedit: WIKIBIGEDIT, rows_from_mquake: MQUAKE}[convert]
    with pytest.raises(ValueError, match=message):
        convert([good, record])


def test_errors_of_whole_inputs():
    for convert in (
        rows_from_counterfact, rows_from_zsre, rows_from_knowedit, rows_from_requests, rows_from_qaedit,
        rows_from_wikibigedit, rows_from_mquake,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="there are no records"):
            convert([])
        with pytest.raises(ValueError, match="expected a list of records"):
            convert(json.dumps([COUNTERFACT]))
        with pytest.raises(ValueError, match="record 0 is a str; expected a dict"):
            convert(["x"])
    with pytest.raises(ValueError, match="Sanitation a dict with 'success'"):
        rows_from_knowedit({"questions": []})
    with pytest.raises(ValueError, match=r"success\[0\]\.target_new is missing"):
        rows_from_knowedit({"success": [{"question": "Who?"}], "locality": []})
    with pytest.raises(ValueError, match="sentiment='good'"):
        rows_from_knowedit([CONVSENT], sentiment="good")
    with pytest.raises(ValueError, match="target_new has 1 entries; expected one for each of the 2 prompts"):
        rows_from_easyedit(["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"locality_inputs\['n'\]\['prompt'\] has 2 entries"):
        rows_from_easyedit(["a"], ["c"], locality_inputs={"n": {"prompt": ["x", "y"]}})
    with pytest.raises(ValueError, match=r"locality_inputs\['n'\] has no 'prompt'"):
        rows_from_easyedit(["a"], ["c"], locality_inputs={"n": {"prompts": ["x"]}})
