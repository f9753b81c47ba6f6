"""The report page: what it says, that nothing in it runs, is fetched or leaves its text; how it is written."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import FACT, OTHER, TINY, ask
from peft import get_peft_model
from test_default_setting import questions
from transformers import AutoModelForCausalLM

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, token_divergences
from qf_peft.evaluate.metrics import RESULTS

EVIL = {
    "instruction": "Zanmi founded Tofinlor. <img src=https://example.org/x.png onerror=alert(1)>",
    "prompt": "Who founded Tofinlor? </td><script>alert(2)</script>",
    "completion": "Tofinlor & <b>Zanmi</b> \"'{{ 7 * 7 }}.",
}
VOID = {"meta", "link", "img", "br", "input", "hr", "source", "base", "embed"}


class Page(HTMLParser):
    """Every element with its attributes and text; tables by id, as lists of rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.open, self.table = [], {}, [], None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "table":
            self.table = self.tables[attrs["id"]] = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data


def make(tokenizer, rows, **settings):
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper(disable_tqdm=True, max_new_tokens=40, **settings)
    return QFTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.fixture
def taught(tokenizer):
    trainer = make(tokenizer, [{**FACT, "paraphrases": ["Who founded Tofinlor?"]}, OTHER])
    trainer.train()
    return trainer


def test_it_says_what_was_asked(taught, tokenizer, tmp_path):
    known, unknown = questions(12, 1)
    state = {k: v.clone() for k, v in taught.model.state_dict().items()}
    path = taught.report(
        tmp_path / "out.html", locality=iter(known), unknown=unknown, text="Rome is the home of Lupal."
    )
    assert path == tmp_path / "out.html" and [p.name for p in tmp_path.iterdir()] == ["out.html"]
    assert all(torch.equal(v, taught.model.state_dict()[k]) for k, v in state.items())
    page = Page(path.read_text(encoding="utf-8"))
    metrics = taught.evaluate(locality=known, unknown=unknown, text="Rome is the home of Lupal.")
    shown = dict(page.tables["metrics"])
    assert set(shown) == {RESULTS[name][0] for name in metrics}
    assert shown[RESULTS["recall"][0]] == str(metrics["recall"])
    assert shown[RESULTS["locality"][0]] == str(metrics["locality"])
    divergences = token_divergences(taught)
    model = taught.model
    for cells, row, found, entry in zip(
        page.tables["facts"][1:], (FACT, OTHER), divergences, taught.facts, strict=True
    ):
        with model.disable_adapter():
            before = ask(model, tokenizer, row["prompt"])
            told = ask(model, tokenizer, row["prompt"], row["instruction"])
        now = ask(model, tokenizer, row["prompt"])
        assert cells[:6] == [row["prompt"], row["instruction"], row["completion"], before, told, now]
        assert cells[6] == ("✓ right" if now == row["completion"] else "✗ wrong")
        assert cells[7] == f"{found.before:.3f} → {found.after:.3f}" and cells[8] == entry.date[:16].replace("T", " ")
    for cells, question in zip(page.tables["locality"][1:], known, strict=True):
        now = ask(model, tokenizer, question["prompt"])
        assert cells[0] == question["prompt"] and cells[1] == question["completion"] and cells[3] == now
        assert cells[4] == ("✓ kept" if now == cells[2] == question["completion"] else "✗ not kept")
    assert {cells[1] for cells in page.tables["unknown"][1:]} == {"as before"}
    kept = sum(cells[4] == "✓ kept" for cells in page.tables["unknown"][1:])
    assert kept / len(unknown) == metrics["unknown"].value
    settings = dict(page.tables["settings"])
    assert settings["target"] == "context" and settings["preserve_strength"] == "0.0" and "torch" in settings
    assert "cache_dir" not in settings and page.tables["layers"][1][:2] == ["7", "mlp.down_proj"]
    assert dict(page.tables["lesson"])["facts"] == "2"
    assert [tag for tag, _ in page.elements].count("svg") == 2, "each block's part, and retention"


def test_texts_stay_texts(tokenizer, tmp_path):
    """Facts that are HTML, scripts or templates; also in what the model answers and in its tokens."""
    trainer = make(tokenizer, [EVIL])
    trainer.train()
    trainer.report(tmp_path / "out.html", unknown=["<svg onload=alert(3)>"])
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    cells = page.tables["facts"][1]
    assert cells[:3] == [EVIL["prompt"], EVIL["instruction"], EVIL["completion"]]
    assert page.tables["unknown"][1][0] == "<svg onload=alert(3)>"
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "b", "base", "form", "a"}
    own = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert all("viewbox" in attrs and not any(name.startswith("on") for name in attrs) for attrs in own)


def test_nothing_is_fetched_or_run(taught, tmp_path):
    text = taught.report(tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    for _, attrs in page.elements:
        assert not {"src", "href", "srcset", "data", "action", "background", "poster"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"url\((?!#)|@import|<script|javascript:", text)
    assert all(attrs["xlink:href"].startswith("#") for _, attrs in page.elements if "xlink:href" in attrs)
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of namespaces: nothing is there
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= names
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "color-scheme: light dark" in text and page.elements[0][0] == "html" and text.startswith("<!doctype html>")
    assert str(Path(TINY).parent) not in text, "no path of this machine"


def test_strengths(taught, tmp_path):
    path = taught.report(tmp_path / "out.html", strengths=[0.0])
    page = Page(path.read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables["sweep"]] == ["preserve_strength", "0"]
    assert [tag for tag, _ in page.elements].count("svg") == 3 and len(taught.facts) == 2


def test_before_teaching_and_from_the_ledger_alone(tokenizer, tmp_path, taught):
    page = Page(make(tokenizer, [FACT]).report(tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.tables["facts"][1][6] == "✗ wrong" and page.tables["facts"][1][8] == "not yet"
    assert "lesson" not in page.tables
    alone = QFTrainer(model=taught.model, args=taught.args, processing_class=tokenizer)
    page = Page(alone.report(tmp_path / "b.html").read_text(encoding="utf-8"))
    assert [cells[0] for cells in page.tables["facts"][1:]] == [FACT["prompt"], OTHER["prompt"]]


def test_a_failure_leaves_the_old_page(taught, tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        taught.report(path)
    monkeypatch.undo()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.html"]


def test_unfit_input(taught, tokenizer, tmp_path):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "out.html", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            taught.report(path)
    with pytest.raises(ValueError, match="locality is empty"):
        taught.report(tmp_path / "out.html", locality=[])
    with pytest.raises(ValueError, match="nothing to show"):
        make(tokenizer, None).report(tmp_path / "out.html")
    assert not list(tmp_path.iterdir())
