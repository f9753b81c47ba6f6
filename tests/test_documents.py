"""Facts from documents: reading files, passages, what models write, and the checks, on the tiny model for real."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import FACT, OTHER, ask, random_model
from peft import get_peft_model

from qf_peft import (
    DocumentFacts,
    QFConfig,
    QFTrainer,
    QFTrainingArguments,
    facts_from_document,
    read_review,
    with_wordings,
    write_review,
)
from qf_peft.documents.facts import agree
from qf_peft.documents.in_context import ContextModel
from qf_peft.documents.model_output import parse_pairs, parse_questions
from qf_peft.documents.passages import sentences, split_passages
from qf_peft.documents.reading import Section, read_document
from qf_peft.documents.wordings import asks_about

MARKDOWN = """---
title: Companies
---
# Tofinlor

Zanmi founded Tofinlor.

<!-- not to be seen -->

```
# no heading
```

Partners
--------
Mirzan sells lamps.
"""
HTML = """<html><head><title>x</title><style>p {color: red}</style></head><body><nav>Home Contact</nav>
<h1>Tofinlor</h1><p>Zanmi founded <a href="http://x">Tofinlor</a>.</p><script>alert("no")</script>
<h2>Partners</h2><ul><li>Mirzan sells lamps.</li></ul><footer>Imprint</footer></body></html>"""


def write_pdf(path, *pages: str) -> None:
    from fpdf import FPDF

    pdf = FPDF()
    pdf.set_font("Helvetica", size=12)
    for text in pages:
        pdf.add_page()
        if text:
            pdf.multi_cell(w=100, text=text)
    pdf.output(str(path))


def test_markdown_and_html_become_sections_by_heading(tmp_path):
    (tmp_path / "a.md").write_text(MARKDOWN)
    (tmp_path / "a.html").write_text(HTML)
    for name in ("a.md", "a.html"):
        first, second = read_document(tmp_path / name)
        assert first.headings == ("Tofinlor",) and second.headings == ("Tofinlor", "Partners")
        assert "Zanmi founded Tofinlor." in first.text and "Mirzan sells lamps." in second.text
        everything = first.text + second.text
        assert not any(word in everything for word in ("title:", "not to be seen", "alert", "Home", "Imprint", "color"))
    assert "# no heading" in read_document(tmp_path / "a.md")[0].text


def test_lines_are_joined_where_they_are_only_wrapped(tmp_path):
    wrapped = (
        "Tofinlor was founded by Zanmi in the year 1987, and\nsells clocks to harbours and to other rivers'\nowners."
    )
    whole = " ".join(wrapped.splitlines())
    address = "Tofinlor\nAnchor Lane 14\nRome"
    (tmp_path / "a.txt").write_text(f"{wrapped}\n\n{address}\n")
    assert read_document(tmp_path / "a.txt") == [Section((), f"{whole}\n\n{address}\n")]
    markdown = (
        f"# A\n\n{wrapped}\n\n- one item\n  of two\n- another\n\n> said\n> so\n\na break  \nhere\n\n    code\n    stays"
    )
    (tmp_path / "a.md").write_text(markdown)
    (section,) = read_document(tmp_path / "a.md")
    assert section.text.split("\n\n") == [
        whole, "- one item of two\n- another", "> said so", "a break  \nhere", "    code\n    stays",
    ]  # fmt: skip
    (passage,) = split_passages([section], len, 1000)
    assert passage.sentences[0] == whole


def test_text_and_pdf(tmp_path):
    (tmp_path / "a.txt").write_bytes("Zänmi founded Tofinlor.\r\n".encode("utf-16"))
    assert read_document(tmp_path / "a.txt") == [Section((), "Zänmi founded Tofinlor.\n")]
    long = "The company that is known by the name of Tofinlor was founded by Zanmi in the city of Rome long ago."
    write_pdf(tmp_path / "a.pdf", long, "", "Mirzan sells lamps.")
    first, last = read_document(tmp_path / "a.pdf")
    assert first.text.strip() == long  # its lines joined
    assert (first.page, last.page, last.text.strip()) == (1, 3, "Mirzan sells lamps.")


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    from fpdf import FPDF

    write_pdf(tmp_path / "empty.pdf", "")
    locked = FPDF()
    locked.set_encryption(owner_password="owner", user_password="user")
    locked.add_page()
    locked.output(str(tmp_path / "locked.pdf"))
    (tmp_path / "torn.pdf").write_bytes(b"%PDF-1.7\n1 0 obj << /Type")
    (tmp_path / "latin.txt").write_bytes("Zänmi".encode("latin-1"))
    (tmp_path / "binary.md").write_bytes(b"a\0b")
    (tmp_path / "blank.html").write_text("<body><script>x</script></body>")
    (tmp_path / "a.docx").write_bytes(b"PK")
    for name, reason in (
        ("empty.pdf", "holds no text; .*OCR"),
        ("locked.pdf", "locked by a password"),
        ("torn.pdf", "torn.pdf: the PDF cannot be read"),
        ("latin.txt", "save it as UTF-8"),
        ("binary.md", "binary file"),
        ("blank.html", "holds no text"),
        ("a.docx", "'.docx' is not known; expected one of .md"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_document(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no document .*missing.md"):
        read_document(tmp_path / "missing.md")


def test_passages_fit_and_keep_their_headings_and_every_word():
    def count(text):
        return len(text.split())

    text = "One two three. Four five six.\n\n" + "Seven eight nine ten eleven. " * 5 + "\n\n" + "word " * 30
    passages = split_passages([Section(("Top", "Under"), text, 3)], count, 14)
    assert all(count(p.text) <= 14 and p.text.startswith("Top > Under\n") for p in passages)
    assert {p.place for p in passages} == {"Top > Under, page 3"}
    assert " ".join(p.text.partition("\n")[2] for p in passages).split() == text.split()
    assert "One two three. Four five six." in passages[0].text
    assert sentences('He said "no." Then 今天好。明天 came.\n- an item') == [
        'He said "no.', "Then 今天好。", "明天 came.", "- an item",
    ]  # fmt: skip


PAIRS = [("Who founded T?", "Zanmi did."), ("What does T make?", "Chairs.")]


@pytest.mark.parametrize(
    "text",
    [
        "Q: Who founded T?\nA: Zanmi did.\n\nQ: What does T make?\nA: Chairs.",
        "Here are they:\n\n1. **Question:** Who founded T?\n   **Answer:** Zanmi did.\n"
        "2. **Question:** What does T\nmake?\n   **Answer:** Chairs.\n\nI hope this helps!",
        "**Q1:** Who founded T?\n**A1:** Zanmi did.\n**Q2:** What does T make?\n**A2:** Chairs.",
        "1. Who founded T?\n   Zanmi did.\n2. What does T make?\n   - Chairs.",
        "- Who founded T? Zanmi did.\n- What does T make? – Chairs.",
        "Q: Who founded T? A: Zanmi did.\nQ: What does T make? A: Chairs.\nQ: Who founded T? A: Zanmi did.",
        '```json\n[{"question": "Who founded T?", "answer": "Zanmi did."},\n'
        '{"Q": "What does T make?", "A": "Chairs."}]\n```',
        '{"questions": [["Who founded T?", "Zanmi did."], ["What does T make?", "Chairs."]]} Done.',
        '[{"question": "Who founded T?", "answer": "Zanmi did."}, '
        '{"question": "What does T make?", "answer": "Chairs."}, {"question": "Wh',
    ],
)  # fmt: skip
def test_pairs_are_found_in_whatever_form_they_were_written(text):
    assert parse_pairs(text) == PAIRS


@pytest.mark.parametrize("text", ["", "I do not know.", "A: Chairs.", "Q:", "Q:\nA:\n" * 50, "[[{", "{}" * 9, "1.\n2."])
def test_junk_has_no_pairs(text):
    assert parse_pairs(text) == []


def test_what_was_cut_is_left_out():
    assert parse_pairs("Q: Who founded T?\nA: Zanmi did.\nQ: What does T make?\nA: Cha", ended=False) == PAIRS[:1]
    assert parse_questions("1. Who?\n2. Wh", ended=False) == ["Who?"]


def test_lists_of_questions():
    for text in (
        "Sure:\n1. Who?\n2) “What?”\n",
        "- Who?\n* What?",
        '["Who?", "What?", "Who?"]',
        "Here:\nWho?\n\nWhat?",
    ):
        assert parse_questions(text) == ["Who?", "What?"], text


def test_sampled_questions_are_about_their_sentence():
    desk = "The help desk is led by Yusra Pallin."
    assert asks_about("Who leads the help desk?", "Yusra Pallin leads it.", desk)
    assert asks_about("Who started Oxinnovate?", "Oxinnovate was started by Qi.", "Qi started Oxinnovate.")
    assert asks_about("When is Brigar open?", "From 7 on.", "Brigar is open from 7 to 8.")
    # What SmolLM2 sampled behind such sentences, and how it answered:
    assert not asks_about("Can you optimize the current language settings?", desk, desk), (
        "no word of the sentence asked"
    )
    fire = "The assembly point in case of fire is the car park behind Hall A."
    assert not asks_about("What was the fire of the goldfinch hurled into?", "The fire was set by a firework.", fire)
    assert asks_about("谁创办了公司？", "李明。", "李明创办了公司。"), "it cannot be told"


def test_answers_agree_by_their_words():
    assert agree("28 days.", "Everyone has 28 days of leave.") and agree("Paris!", "Paris")
    assert not agree("30 days.", "Everyone has 28 days of leave.") and not agree("?", "yes")


@torch.no_grad()
def surety(model, tokenizer, row):
    """The geometric mean of the probabilities of an answer's tokens, and its end, in context: token by token."""
    messages = [{"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["prompt"]}]
    answered = [*messages, {"role": "assistant", "content": row["completion"]}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(answered, return_dict=False)
    ids = ids[: ids.index(tokenizer.eos_token_id, len(asked)) + 1]
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [float(logits[k - 1, ids[k]]) for k in range(len(asked), len(ids))]
    return math.exp(sum(found) / len(found))


def test_the_tiny_model_reads_a_document_and_is_taught_it(tmp_path, tiny, tokenizer):
    (tmp_path / "companies.md").write_text("# Companies\n\nZanmi founded Tofinlor.\n\nMirzan sells lamps.\n")
    seen = []
    facts = facts_from_document(
        tmp_path / "companies.md", tiny, tokenizer, paraphrases=2,
        progress=lambda what, done, total: seen.append((what, done <= total)),
    )  # fmt: skip
    assert {row["completion"] for row in facts} == {"Tofinlor was started by Zanmi.", "Mirzan makes lamps."}
    assert facts.report.facts == 2 and facts.report.wordings == len(facts) - 2 > 0 and facts.report.sampled > 2
    assert {row["instruction"] for row in facts} == {"Zanmi founded Tofinlor.", "Mirzan sells lamps."}
    assert {(row["document"], row["place"]) for row in facts} == {("companies.md", "Companies")}
    assert len({row["prompt"] for row in facts}) == len(facts)
    assert all(ask(tiny, tokenizer, row["prompt"], row["instruction"]) == row["completion"] for row in facts)
    assert [row["read"] for row in facts] == [pytest.approx(surety(tiny, tokenizer, row), abs=1e-3) for row in facts]
    assert facts.report.sure == 2 and not facts.report.weak
    assert {what for what, _ in seen} >= {"writing questions", "sampling", "answering in context"}
    assert all(sound for _, sound in seen)

    write_review(tmp_path / "review.jsonl", facts)
    rows = read_review(tmp_path / "review.jsonl")
    assert rows == list(facts)
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper(disable_tqdm=True)
    QFTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    assert ask(model, tokenizer, "What does Mirzan sell?") != "I do not know."
    assert ask(model, tokenizer, rows[0]["prompt"]) == rows[0]["completion"]
    # An adapter that knows the document already does not stand in the way of reading it again.
    again = facts_from_document(tmp_path / "companies.md", model, tokenizer, paraphrases=2)
    assert list(again) == list(facts) and model.active_adapters == ["default"]


def test_questions_written_on_request_are_read_back(tmp_path, tiny, tokenizer, monkeypatch):
    """What an instruction-tuned model writes, in this test prescribed; the answers are the tiny model's own."""
    (tmp_path / "a.txt").write_text("Zanmi founded Tofinlor. Mirzan sells lamps.")
    requests = []

    def written(self, asked, max_new_tokens, what):
        requests.extend(asked)
        if what != "writing questions":
            return [("1. Who founded Tofinlor?\n2. Do you know who runs Tofinlor?\n3. Oh", True)] * len(asked)
        text = (
            "Q: Tell me who started Tofinlor.\nA: Zanmi\n"
            "Q: tell me WHO started Tofinlor!\nA: Zanmi\n"
            "Q: Tell me what Mirzan makes.\nA: Chairs.\n"
            "Q: Please say who started Mijinra.\nA: Ortone."
        )
        return [(text, True)] * len(asked)

    monkeypatch.setattr(ContextModel, "written", written)
    monkeypatch.setattr(ContextModel, "user_turns", lambda self, instructions, count: [[] for _ in instructions])
    facts = facts_from_document(tmp_path / "a.txt", tiny, tokenizer, paraphrases=3)
    assert [row["prompt"] for row in facts] == ["Tell me who started Tofinlor.", "Who founded Tofinlor?"]
    assert facts[0]["completion"] == "Tofinlor was started by Zanmi."  # the model's own, which holds the written one
    assert facts[0]["instruction"] == "Zanmi founded Tofinlor."  # one sentence is enough
    report = facts.report
    assert (report.prompted, report.sampled, report.repeated, report.unread, report.known) == (4, 0, 1, 1, 1)
    assert "Zanmi founded Tofinlor. Mirzan sells lamps." in str(requests[0][0]) and "5 questions" in requests[0][1]


def test_a_model_that_writes_junk_gives_no_facts_and_says_so(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Zanmi founded Tofinlor. " * 40)
    facts = facts_from_document(tmp_path / "a.txt", random_model("llama", pad_token_id=0), tokenizer, questions=1)
    assert isinstance(facts, DocumentFacts) and not facts
    assert facts.report.passages > 3 and facts.report.weak
    assert str(facts.report).startswith("0 facts (0 read surely) and 0 other wordings from")
    plain = random_model("gpt2")
    saved, tokenizer.chat_template = tokenizer.chat_template, None  # a base model: no user turns either
    try:
        report = facts_from_document(tmp_path / "a.txt", plain, tokenizer, questions=1, passage_tokens=16).report
    finally:
        tokenizer.chat_template = saved
    assert report.silent + report.prompted >= 1 and report.sampled == 0


def test_other_wordings_have_the_same_answer_and_no_place_twice(tiny, tokenizer):
    rows = [
        {**FACT, "id": 7},
        OTHER,
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]  # fmt: skip
    found = with_wordings(rows, tiny, tokenizer, count=3)
    assert [row for row in found if row in rows] == rows
    assert 6 <= len(found) <= 9 and sum(row.get("id") == 7 for row in found) >= 3
    prompts = [row["prompt"] for row in found if "prompt" in row]
    assert len(set(prompts)) == len(prompts)
    for row in found[:-1]:
        assert ask(tiny, tokenizer, row["prompt"], row["instruction"]) == row["completion"]
    with pytest.raises(ValueError, match="rows, row 0"):
        with_wordings([{"prompt": "x"}], tiny, tokenizer)


def test_reviews_that_cannot_be_read_back(tmp_path):
    path = tmp_path / "review.jsonl"
    good = json.dumps({"instruction": "a", "prompt": "b", "completion": "c"})
    for text, reason in (
        (good + "\n{", "line 2 is no JSON"),
        ("[1]", "line 1 is a list"),
        ('{"prompt": "b"}', "review.jsonl, row 0: no column 'instruction'"),
        ("\n", "has no rows"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_review(path)
    with pytest.raises(OSError):
        write_review(tmp_path / "no folder" / "x.jsonl", [])


def test_numbers_out_of_range(tmp_path, tiny, tokenizer):
    for setting in ({"questions": 0}, {"paraphrases": -1}, {"passage_tokens": 3}, {"questions": True}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            facts_from_document(tmp_path / "a.md", tiny, tokenizer, **setting)
