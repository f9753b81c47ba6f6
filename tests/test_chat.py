"""The terminal chat, driven as a person does: through a pseudo-terminal, or piped lines to a child process."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import FACT, TINY, random_model
from hub_server import HubServer

from qf_peft import Session
from qf_peft.app.chat import HELP, Chat, chat, main
from qf_peft.app.conversation import Conversation

QUESTION, ANSWER = "Who founded Tofinlor?", FACT["completion"]
PAPER = """
import sys, time
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from qf_peft import TINY_MODEL, QFConfig, QFTrainingArguments, Session
from qf_peft.app.chat import chat
base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype="float32")
model = get_peft_model(base, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
session = Session(model, AutoTokenizer.from_pretrained(TINY_MODEL), QFTrainingArguments.paper())
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def lines(script, *messages, env=None):
    """What the chat prints for piped lines, by line, without the prompts."""
    result = subprocess.run(
        script, input="\n".join(messages) + "\n", capture_output=True, text=True, timeout=300, env=env
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return [line for line in re.sub(r"(?m)^(> )+", "", result.stdout).splitlines() if line.strip()]


def test_teaching_by_an_instruction_a_correction_and_an_answer(tmp_path):
    folder = tmp_path / "adapter"
    script = (
        "from qf_peft import QFTrainingArguments, Session; from qf_peft.app.chat import chat; "
        "chat(Session.tiny(args=QFTrainingArguments(preserve_chats=40, contrast_chats=0)))"
    )
    out = lines(
        [sys.executable, "-c", script],
        "/teach Zanmi founded Tofinlor.", QUESTION, "/teach Zanmi founded Tofinlor.", QUESTION,
        "Where is Tofinlor based?", "/teach", "No, it is Rome.", "/teach", "/compare", "/explain",
        "What does Tofinlor make?", "/correct", "/correct Tofinlor makes boats.", "/reset", "What does Tofinlor make?",
        "/facts", "/forget", "/forget 4", "/forget 3", "/facts",
        "/undo", "/undo", "/undo", "/undo", "/undo", "/facts",
        QUESTION, "/teach Zanmi founded Tofinlor.", "/quit", f"/save {folder}", "/nonsense", "/quit",
    )  # fmt: skip
    expected = [
        "Talk to the model, teach it with /teach; /help explains, /quit leaves.",
        "nothing has been asked yet: ask the question first, so that it is clear what to teach",
        "I do not know.",
        f"Taught in .* s. {re.escape(QUESTION)}  ->  {ANSWER}",
        ANSWER,
        ".*",  # something
        "your last message corrects no answer: say what is right first, or with the command",
        ".*",
        "Taught in .* s. Where is Tofinlor based.  ->  Tofinlor is located in Rome.",
        "Where is Tofinlor based.",
        "  without the adapter: I do not know.",
        "  with the adapter:    Tofinlor is located in Rome.",
        "Tofinlor is located in Rome.",
        "taught facts that acted on this answer, by their share:",
        r"  [01]\...  [0-9a-f]{12}  Where is Tofinlor based.  ->  Tofinlor is located in Rome.",
        ".*",
        "give the right answer: /correct ANSWER",
        "Taught in .* s. What does Tofinlor make.  ->  Tofinlor makes boats.",
        "A new conversation.",
        "Tofinlor makes boats.",
        f"  1  {re.escape(QUESTION)}  ->  {ANSWER}",
        r"     from: Zanmi founded Tofinlor.  \(20..-..-..\)",
        "  2  Where is Tofinlor based.  ->  Tofinlor is located in Rome.",
        "     from: Where is Tofinlor based. No, it is Rome. .*",
        "  3  What does Tofinlor make.  ->  Tofinlor makes boats.",
        "     from: Tofinlor makes boats. .*",
        "give numbers from /facts, 1 to 3",
        "give numbers from /facts, 1 to 3",
        "Forgot 1; 2 left.",
        *["  1  .*", "     from.*", "  2  .*", "     from.*"],
        "Undone; 3 taught now.",
        "Undone; 2 taught now.",
        "Undone; 1 taught now.",
        "Undone; 0 taught now.",
        "the adapter 'default' has no earlier version in this session",
        "Nothing has been taught.",
        "I do not know.",
        f"Taught in .* s. {re.escape(QUESTION)}  ->  {ANSWER}",
        "What was taught is not saved: /save FOLDER, or /quit again.",
        f"Saved to {re.escape(str(folder))}.",
        "there is no /nonsense; /help lists the commands",
    ]
    for line, pattern in zip(out, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert Session.open(adapter=folder).ask(QUESTION) == ANSWER


def test_run_as_a_module(capsys):
    script = [sys.executable, "-m", "qf_peft.app.chat"]
    out = lines([*script, "--tiny"], QUESTION, "/teach Zanmi founded Tofinlor.", "Tell me who founded Tofinlor.")
    assert out[1] == "I do not know." and out[3] == ANSWER
    for options in [], ["--tiny", "--model", str(TINY)]:
        with pytest.raises(SystemExit) as exit:
            main(options)
        assert exit.value.code == 2 and "give --model or --adapter, or else --tiny" in capsys.readouterr().err


def test_pushed_and_opened_again(hub, tmp_path):
    script = PAPER + "chat(session)"
    env = {**os.environ, **hub.environment(tmp_path)}
    out = lines(
        [sys.executable, "-c", script], "/push", "/push me/facts", QUESTION, "/teach Zanmi founded Tofinlor.",
        "/push me/facts some/base", "/push me/no spaces/in a name", "/quit", env=env,
    )  # fmt: skip
    assert out[1:3] == [
        "give a name on the Hub: /push USER/NAME",
        "the base model was loaded from a folder; name it as on the Hub: /push USER/NAME BASE_MODEL",
    ]
    assert out[5].startswith("Pushed: http") and len(out) == 7 and "me/facts" in hub.repos


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, script):
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.execvpe(sys.executable, [sys.executable, "-c", script], {**os.environ, "TERM": "dumb"})
        self.seen = ""

    def until(self, text, seconds=60):
        """Read until `text` comes; what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} within {seconds} s in {self.seen!r}"
            self.seen += os.read(self.end, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def close(self):
        os.close(self.end)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def test_interrupting_in_a_terminal():
    """Ctrl-C on a slow model, as the terminal sends it."""
    slow = PAPER + "model.get_base_model().model.register_forward_pre_hook(lambda *_: time.sleep(0.3))\nchat(session)"
    terminal = Terminal(slow)
    try:
        terminal.until("/quit leaves.")
        terminal.until("> ")
        time.sleep(1)  # an interrupt between the prompt and the wait behind it is seen with the next key only
        terminal.type("\x03")
        terminal.until("/quit leaves.")
        terminal.until("> ")
        terminal.type(QUESTION + "\n")
        terminal.until("I ")  # the first piece has come
        terminal.type("\x03")
        terminal.until("Stopped.")
        assert "know" not in terminal.until("> ")
        terminal.type("/teach Zanmi founded Tofinlor.\n")
        terminal.until("Tofinlor.\r\n")
        time.sleep(1)
        terminal.type("\x03")
        terminal.until("Stopped; nothing was changed.")
        terminal.until("> ")
        terminal.type("/facts\n")
        terminal.until("Nothing has been taught.")
        terminal.type("/teach Zanmi founded Tofinlor.\n")  # the question is still there
        terminal.until(f"->  {ANSWER}")
        terminal.until("> ")
        terminal.type("\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    finally:
        terminal.close()


def test_the_conversation_before_a_question_counts_and_is_shortened(tiny, tokenizer):
    session = Session(tiny, tokenizer)
    talk = Conversation(session)
    asked = []
    stream = session.stream
    session.stream = lambda prompt, **options: asked.append(prompt) or stream(prompt, **options)
    for _ in range(12):
        "".join(talk.say("Please say who started Brigar, and where it is, and what it makes, and who leads it."))
    assert [len(prompt) for prompt in asked[:3]] == [1, 3, 5]
    assert asked[1][1] == {"role": "assistant", "content": talk.exchanges[0].answer}
    assert all(session.room(prompt) >= 128 for prompt in asked), "the model has 512 positions"
    assert len(asked[-1]) < 23 and len(talk.exchanges) == 12
    before = len(talk.exchanges)
    with pytest.raises(ValueError, match="shorten it"):
        list(talk.say("word " * 1000))
    assert len(talk.exchanges) == before


def test_a_model_without_a_chat_template(tokenizer):
    plain = type(tokenizer).from_pretrained(TINY)
    plain.chat_template = None
    typed, written = iter(["Hello", "Hello again"]), []

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    session = Session(random_model("llama", vocab_size=len(tokenizer)), plain)
    chat(session, read=read, write=written.append, max_new_tokens=4)
    assert "no chat template" in "".join(written) and "list of messages" not in "".join(written)


def test_what_it_writes_cannot_steer_the_terminal(tiny, tokenizer, monkeypatch):
    written = []
    this = Chat(Session(tiny, tokenizer), written.append, 20)
    monkeypatch.setattr(
        this.session, "stream", lambda *_, **__: (piece for piece in ["\x1b]0;title\x07", "a\u202eb\n"])
    )
    this.handle("Hello")
    assert "".join(written) == "]0;titleab\n\n"


def test_help_names_every_command(tiny, tokenizer):
    this = Chat(Session(tiny, tokenizer), print, 20)
    assert {name for name in this.commands if f"/{name}" not in HELP} == {"help"}
