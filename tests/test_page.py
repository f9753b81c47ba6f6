"""The page in a real headless Chromium: chat, teach, forget, undo, gauges; and what it must not do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gradio as gr
import pytest
from browser import find_chromium
from conftest import FACT, TINY
from peft import get_peft_model
from playwright.sync_api import expect, sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import QFConfig, QFTrainingArguments, Session
from qf_peft.app.page import serve
from qf_peft.app.page_actions import Page

QUESTION, ANSWER = "Who founded Tofinlor?", FACT["completion"]
EVIL = '<img src=x onerror="window.hacked=1"><b>Zanmi</b> ![](http://192.0.2.1/a.png)'
SECRET = "hf_" + "Secret" * 5
elsewhere = []


def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        elsewhere.append(arguments[1])
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", "::1", None):
        elsewhere.append(arguments[0])


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(playwright), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address, the session and the working folder."""
    sys.addaudithook(watch)
    os.environ["HF_TOKEN"] = SECRET
    folder = tmp_path_factory.mktemp("work")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY), QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM")
    )
    session = Session(model, AutoTokenizer.from_pretrained(TINY), QFTrainingArguments.paper())
    yield serve(session, folder=folder, max_new_tokens=60, block=False), session, folder
    gr.close_all()
    del os.environ["HF_TOKEN"]


@pytest.fixture
def page(browser, served):
    """A fresh visit of the page, on a model that was taught nothing."""
    address, session, _ = served
    while session.facts:
        session.forget(lambda entry: True)
    context = browser.new_context(viewport={"width": 1280, "height": 950})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    expect(page.locator("#message textarea")).to_be_visible(timeout=60_000)
    expect(page.get_by_text("Taught (0)")).to_be_visible(timeout=60_000)
    yield page
    assert page.wrong == []
    assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {address.split("/")[2]}
    assert page.evaluate("window.hacked") is None
    assert elsewhere == []
    context.close()


def seen(page, selector, text):
    expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def status(page, text):
    page.wait_for_function("text => document.querySelector('#status textarea').value.includes(text)", arg=text)


def ask(page, question):
    page.fill("#message textarea", question)
    page.press("#message textarea", "Enter")
    expect(page.locator("#message textarea")).to_have_value("", timeout=60_000)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def teach(page, instruction, question, answer=""):
    page.fill("#instruction textarea", instruction)
    page.fill("#question textarea", question)
    page.fill("#answer textarea", answer)
    press(page, "Teach")


def last(page):
    return page.locator("#chat .bot").last


def test_teach_compare_forget_undo(page, served):
    _, session, _ = served
    ask(page, QUESTION)
    seen(page, "#chat", "I do not know.")
    assert page.input_value("#question textarea") == QUESTION, "what was asked is ready to be taught"
    page.fill("#instruction textarea", FACT["instruction"])
    press(page, "Teach")
    status(page, f"Taught: {QUESTION} → {ANSWER}")
    expect(page.locator("#instruction textarea")).to_have_value("")  # for the next fact
    seen(page, "#facts", f"{QUESTION} → {ANSWER} (from: {FACT['instruction']})")
    seen(page, "#recall", "1 of 1")
    seen(page, "#locality", " of 7 answers")
    assert float(page.locator("#recall meter").get_attribute("value")) == 1
    seen(page, "#facts", f"✓ {QUESTION} → {ANSWER}")
    expect(page.locator("#others tr")).to_have_count(4)
    seen(page, "#divergence", "–")  # the paper's setting preserves nothing
    assert [e.completion for e in session.facts] == [ANSWER]
    ask(page, "Tell me who founded Tofinlor.")
    expect(last(page)).to_contain_text(ANSWER, timeout=60_000)

    page.locator("#adapter input").uncheck()
    seen(page, "#chat", "The adapter is off.")
    ask(page, QUESTION)
    expect(last(page)).to_contain_text("I do not know.", timeout=60_000)
    press(page, "Compare")
    seen(page, "#chat", "Without the adapter: I do not know.")
    seen(page, "#chat", f"With the adapter: {ANSWER}")
    press(page, "Explain")
    seen(page, "#chat", "taught facts that acted on this answer, by their share:")
    page.locator("#adapter input").check()

    press(page, "Forget ticked")
    status(page, "tick the facts to forget first")
    page.locator("#facts input[type=checkbox]").first.check()
    press(page, "Forget ticked")
    status(page, "Forgot 1.")
    seen(page, "#facts", "Taught (0)")
    seen(page, "#recall", "–")
    assert session.facts == () and session.ask(QUESTION) == "I do not know."
    press(page, "Undo")
    status(page, "Undone.")
    seen(page, "#facts", "Taught (1)")
    seen(page, "#recall", "1 of 1")
    assert session.ask(QUESTION) == ANSWER
    press(page, "New talk")
    expect(page.locator("#chat .bot")).to_have_count(0, timeout=60_000)


def test_the_gauges_count_what_was_lost(page, served):
    page.get_by_text("Questions for the locality gauge").click()
    page.wait_for_timeout(1000)  # Gradio makes what is inside only now, and sets its value once more
    page.fill("#questions textarea", f"{QUESTION}\n\nPlease say who started Brigar.\n{QUESTION}\n")
    teach(page, FACT["instruction"], QUESTION)
    seen(page, "#recall", "1 of 1")
    seen(page, "#locality", "% of 2 answers")
    assert 0.5 <= float(page.locator("#locality meter").get_attribute("value")) < 0.7, "the other one is as before"
    page.fill("#questions textarea", QUESTION)
    press(page, "Measure")
    seen(page, "#locality", "0% of 1 answers")


def test_the_last_measurement_lists_the_facts_even_if_there_are_none(page, served):
    """One that was begun before the facts were forgotten may show its list after theirs."""
    _, session, folder = served
    _, facts = Page(session, folder, 60).gauges(QUESTION)
    assert (facts.label, facts.choices) == ("Taught (0)", [])


def test_html_in_facts_and_answers_is_text(page, served, monkeypatch):
    _, session, _ = served
    # The tiny model cannot be brought to write HTML; its words stand in for what another would say.
    monkeypatch.setattr(session, "stream", lambda *_, **__: (EVIL[i : i + 7] for i in range(0, len(EVIL), 7)))
    monkeypatch.setattr(session, "ask", lambda *_, **__: EVIL)
    session.teach(instruction=EVIL, prompt="What is " + EVIL, completion=EVIL)
    page.reload()
    seen(page, "#facts", EVIL)
    ask(page, "What is " + EVIL)
    expect(last(page)).to_contain_text(EVIL, timeout=60_000)
    press(page, "Compare")
    seen(page, "#chat", "With the adapter: " + EVIL)
    teach(page, EVIL, "Who is it?", EVIL)
    status(page, EVIL)
    seen(page, "#chat", "[Taught: Who is it? → " + EVIL)
    page.wait_for_timeout(500)
    assert page.locator("img[src=x], #chat b, #facts b, [src*='192.0.2.1']").count() == 0


def test_errors_are_a_line(page):
    press(page, "Send")
    status(page, "prompt is empty")
    press(page, "Compare")
    status(page, "Write the question")
    teach(page, "", "")
    status(page, "instruction is empty")
    teach(page, FACT["instruction"], "word " * 1000, ANSWER)
    status(page, "shorten it")
    assert page.input_value("#answer textarea") == ANSWER, "what was not taught stays to be mended"
    ask(page, "word " * 1000)
    status(page, "shorten it")
    ask(page, "Please say who started Brigar.")
    expect(last(page)).to_contain_text("Brigar was started by Vacla.", timeout=60_000)


def test_an_answer_can_be_stopped(page, served, monkeypatch):
    _, session, _ = served

    def slow(*_, **__):
        for i in range(600):
            time.sleep(0.1)
            yield f"word{i} "

    monkeypatch.setattr(session, "stream", slow)
    page.fill("#message textarea", QUESTION)
    press(page, "Send")
    seen(page, "#chat", "word2")
    press(page, "Stop")
    status(page, "Stopped.")
    assert "word500" not in page.locator("#chat").inner_text()


def test_saving_stays_in_the_working_folder(page, served, tmp_path):
    _, _, folder = served
    teach(page, FACT["instruction"], QUESTION)
    status(page, "Taught")
    (folder / "mine").mkdir()
    (folder / "out").symlink_to(tmp_path)
    for name in "../other", str(tmp_path / "x"), "mine", "out", "", ".hidden":
        page.fill("#name textarea", name)
        press(page, "Save")
        status(page, "give the folder a name" if name in ("", ".hidden") or "/" in name else "is there already")
        page.fill("#message textarea", "x")
        press(page, "Compare")
        for field in "#message", "#status":  # both are emptied by the comparison's last output
            expect(page.locator(f"{field} textarea")).to_have_value("", timeout=60_000)
    page.fill("#name textarea", "facts")
    press(page, "Save")
    status(page, "Saved to facts")
    press(page, "Save")
    assert {p.name for p in folder.iterdir()} == {"mine", "out", "facts"} and not list(tmp_path.iterdir())
    assert Session.open(adapter=folder / "facts").ask(QUESTION) == ANSWER


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status, response.headers, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode(errors="replace")


def test_no_files_no_secrets_no_strangers(served, tmp_path):
    address, _, folder = served
    (folder / "here.txt").write_text(SECRET)
    (tmp_path / "there.txt").write_text(SECRET)
    (TINY / "config.json").read_text()
    for path in folder / "here.txt", tmp_path / "there.txt", "/etc/passwd", TINY / "config.json", "http://127.0.0.1:1/":
        for prefix in "gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/proxy=", "gradio_api//file=":
            code, _, body = get(f"{address}{prefix}{path}")
            assert code in (403, 404) and SECRET not in body and "root:" not in body, (prefix, path, body[:200])
    for path in "", "config", "gradio_api/info", "gradio_api/startup-events", "theme.css", "docs", "openapi.json":
        _, headers, body = get(address + path)
        assert SECRET not in body and str(folder) not in body and str(TINY) not in body, path
        assert "default-src 'self'" in headers["content-security-policy"]
    assert get(address, Host="evil.example")[0] == 400, "no rebinding of names"
    assert get(address + "config", Origin="http://evil.example")[0] == 403
    assert get(address + "config", Origin="null")[0] == 403
    assert get(address + "config", Origin=address.rstrip("/"))[0] == 200
    (folder / "here.txt").unlink()


def test_it_listens_on_loopback_only(served):
    port = int(served[0].rstrip("/").rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # this machine's own address; nothing is sent
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    elsewhere.clear()
    if own != "127.0.0.1":
        with socket.socket() as client, pytest.raises(OSError):
            client.settimeout(5)
            client.connect((own, port))
    elsewhere.clear()


@pytest.mark.parametrize(
    "command", [["-m", "qf_peft.app.page"], ["-c", "from qf_peft.app.cli import main; main()", "demo"]]
)
def test_started_from_the_shell(tmp_path, command):
    command = [sys.executable, *command, "--tiny", "--folder", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = child.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http"))
        assert get(address)[0] == 200
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
    finally:
        child.kill()


@pytest.fixture
def another(browser, served, page):
    """A second visitor, of the same page."""
    context = browser.new_context(viewport={"width": 1280, "height": 950})
    other = context.new_page()
    other.set_default_timeout(60_000)
    other.goto(served[0])
    expect(other.get_by_text("Taught (0)")).to_be_visible(timeout=60_000)
    yield other
    context.close()


def test_each_visitor_stops_their_own_answer(page, another, served, monkeypatch):
    _, session, _ = served

    def slow(*_, **__):
        for i in range(600):
            time.sleep(0.1)
            yield f"word{i} "

    monkeypatch.setattr(session, "stream", slow)
    for visitor in page, another:
        visitor.fill("#message textarea", QUESTION)
        press(visitor, "Send")
        seen(visitor, "#chat", "word2 ")
    press(page, "Stop")
    status(page, "Stopped.")
    so_far = another.locator("#chat").inner_text().count("word")
    seen(another, "#chat", f"word{so_far + 10} ")
    press(another, "Stop")
    status(another, "Stopped.")


def test_the_others_hear_of_a_lesson(page, another, served):
    ask(another, QUESTION)
    seen(another, "#chat", "I do not know.")
    teach(page, FACT["instruction"], QUESTION)
    status(page, "Taught: ")
    status(another, f"Another visitor changed the adapter. Taught: {QUESTION} → {ANSWER}")
    seen(another, "#facts", f"{QUESTION} → {ANSWER}")
    assert "Another visitor" not in page.locator("#status").inner_text()
    expect(another.locator("#chat")).not_to_contain_text(ANSWER)
    ask(another, QUESTION)
    seen(another, "#chat", "[Another visitor changed the adapter. Taught:")
    seen(another, "#chat", "The model no longer sees the talk above.]")
    expect(last(another)).to_contain_text(ANSWER, timeout=60_000)
    page.wait_for_timeout(2500)
    assert "Another visitor" not in page.input_value("#status textarea")


def test_who_leaves_is_answered_no_longer(browser, served, page, monkeypatch):
    address, session, _ = served
    left = []

    def slow(*_, **__):
        try:
            for i in range(600):
                time.sleep(0.1)
                yield f"word{i} "
        finally:
            left.append(i)

    monkeypatch.setattr(session, "stream", slow)
    context = browser.new_context()
    visitor = context.new_page()
    visitor.goto(address)
    visitor.fill("#message textarea", QUESTION)
    press(visitor, "Send")
    seen(visitor, "#chat", "word2 ")
    context.close()
    for _ in range(100):
        if left:
            break
        time.sleep(0.1)
    assert left and left[0] < 120
