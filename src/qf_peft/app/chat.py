"""A chat in the terminal, in which the model is taught: `python -m qf_peft.app.chat --tiny`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence

from transformers.utils import logging

from ..adapter.description import base_model_id
from ..data.rows import text_of
from ..evaluate.metrics import normalise
from .conversation import Conversation, printable
from .session import Session

logger = logging.get_logger(__name__)

HELP = """\
Write a message to talk to the model. Teaching changes the adapter at once; what was taught leaves the conversation, so
that the next answer comes from the weights.

  /teach INSTRUCTION   Teach what the model should have known or done when you asked your last question. It answers the
                       question with the instruction in context, and learns this answer.
                           > Who started Oxinnovate?
                           I do not know.
                           > /teach Qi started Oxinnovate.
  /teach               The same with your last message as the instruction, if it corrected the answer before it.
                           > Who started Oxinnovate?
                           Oxinnovate was started by Ann.
                           > No, it was Qi.
                           Thank you, it was Qi.
                           > /teach
  /correct ANSWER      Teach exactly this answer to your last question.
  /facts               List what was taught.
  /forget N ...        Take back facts, by their numbers in /facts.
  /undo                Go back to before the last /teach, /correct or /forget.
  /compare [QUESTION]  The answers without and with the adapter; by default to your last question.
  /explain [QUESTION]  Which taught facts acted on the answer.
  /save FOLDER         Save the adapter.
  /push USER/NAME [BASE_MODEL]
                       Push the adapter to the Hub. Name the base model's id if it was loaded from a folder.
  /reset               Begin a new conversation; what was taught stays.
  /quit                Leave (or Ctrl-D).

Ctrl-C stops an answer, or a lesson, which then changes nothing."""


class _Leave(Exception):
    pass


def _out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Chat:
    """One chat: a conversation and the commands of `HELP`, each a method of its name."""

    def __init__(self, session: Session, write: Callable[[str], object], max_new_tokens: int) -> None:
        self.session, self._write, self.max_new_tokens = session, write, max_new_tokens
        self.talk = Conversation(session)
        self.question = ""  # the last question, also of a conversation that was taught or ended
        self.kept = session.facts
        self.warned = False
        self.commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, name)
            for name in "help teach correct facts forget undo compare explain save push reset quit".split()
        }

    def line(self, text: str) -> None:
        """Write a line; the model's and strangers' words in it cannot steer the terminal."""
        self._write(printable(text) + "\n")

    def handle(self, message: str) -> None:
        """Answer a message or carry out a command. Errors become a line."""
        message = message.strip()
        teaching = message.startswith(("/teach", "/correct", "/forget"))
        try:
            if not message.startswith("/"):
                if message:
                    self.answer(message)
                return
            name, _, rest = message[1:].partition(" ")
            if name not in self.commands:
                raise ValueError(f"there is no /{name}; /help lists the commands")
            self.commands[name](rest.strip())
        except KeyboardInterrupt:
            self.line("\nStopped; nothing was changed." if teaching else "\nStopped.")
        except _Leave:
            raise
        except Exception as error:  # whatever it is, the chat goes on
            logger.debug("in the chat", exc_info=True)
            self.line(f"{_kind(error)}{' '.join(str(error).split())}")

    def answer(self, question: str) -> None:
        self.question, self.warned = question, False
        pieces = self.talk.say(question, max_new_tokens=self.max_new_tokens)
        with contextlib.closing(pieces):
            for piece in pieces:
                self._write(printable(piece))
        self._write("\n")

    def help(self, rest: str) -> None:
        self.line(HELP)

    def teach(self, instruction: str, answer: str = "") -> None:
        start = time.perf_counter()
        self.talk.teach(instruction, answer)
        taught, seconds = self.session.facts[-1], time.perf_counter() - start
        self.question = text_of(taught.prompt)
        now = self.session.ask(taught.prompt, max_new_tokens=self.max_new_tokens)
        self.line(f"Taught in {seconds:.1f} s. {text_of(taught.prompt)}  ->  {now}")
        if normalise(now) != normalise(taught.completion):
            self.line(f"This is not yet what was taught ({taught.completion}). /undo takes it back.")

    def correct(self, answer: str) -> None:
        if not answer:
            raise ValueError("give the right answer: /correct ANSWER")
        self.teach("", answer)

    def facts(self, rest: str) -> None:
        for number, fact in enumerate(self.session.facts, 1):
            self.line(f"{number:3}  {text_of(fact.prompt)}  ->  {text_of(fact.completion)}")
            self.line(f"     from: {text_of(fact.instruction)}  ({fact.date[:10]})")
        if not self.session.facts:
            self.line("Nothing has been taught.")

    def forget(self, rest: str) -> None:
        facts = self.session.facts
        numbers = rest.replace(",", " ").split()
        if not numbers or not all(n.isdecimal() and 1 <= int(n) <= len(facts) for n in numbers):
            raise ValueError(f"give numbers from /facts, 1 to {len(facts)}" if facts else "nothing has been taught")
        gone = self.session.forget({facts[int(n) - 1].id for n in numbers})["forgotten"]
        self.line(f"Forgot {gone}; {len(self.session.facts)} left.")

    def undo(self, rest: str) -> None:
        self.session.undo()
        self.line(f"Undone; {len(self.session.facts)} taught now.")

    def compare(self, question: str) -> None:
        question = question or self.question
        if not question:
            raise ValueError("nothing has been asked yet: /compare QUESTION")
        without, taught = self.session.compare(question, max_new_tokens=self.max_new_tokens)
        self.line(f"{question}\n  without the adapter: {without}\n  with the adapter:    {taught}")

    def explain(self, question: str) -> None:
        question = question or self.question
        if not question:
            raise ValueError("nothing has been asked yet: /explain QUESTION")
        self.line(printable(str(self.session.explain(question, max_new_tokens=self.max_new_tokens))))

    def save(self, folder: str) -> None:
        if not folder:
            raise ValueError("give a folder: /save FOLDER")
        folder = self.session.save(folder)
        self.kept = self.session.facts
        self.line(f"Saved to {folder}.")

    def push(self, rest: str) -> None:
        repo_id, _, base = rest.partition(" ")
        if not repo_id:
            raise ValueError("give a name on the Hub: /push USER/NAME")
        if not base and base_model_id(self.session.model, self.session.trainer.adapter_name, None) is None:
            raise ValueError(
                "the base model was loaded from a folder; name it as on the Hub: /push USER/NAME BASE_MODEL"
            )
        commit = self.session.push(repo_id, **({"base_model": base.strip()} if base else {}))
        self.kept = self.session.facts
        self.line(f"Pushed: {commit.commit_url}")

    def reset(self, rest: str) -> None:
        self.talk.exchanges.clear()
        self.line("A new conversation.")

    def quit(self, rest: str) -> None:
        if self.session.facts != self.kept and not self.warned:
            self.warned = True
            self.line("What was taught is not saved: /save FOLDER, or /quit again.")
            return
        raise _Leave


def chat(
    session: Session,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] = _out,
    max_new_tokens: int = 256,
) -> None:
    """Talk to a session's model and teach it, until the user leaves. The commands are those of `HELP`.

    Args:
        session: the model; it keeps what was taught.
        read: asks for a line with a given prompt; raises `EOFError` at the end.
        write: writes text as it comes.
        max_new_tokens: how long an answer may be.
    """
    if read is input and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
    this = Chat(session, write, max_new_tokens)
    this.line("Talk to the model, teach it with /teach; /help explains, /quit leaves.")
    if not session.trainer.encoder.chat:
        this.line("The model has no chat template: it sees each message alone, as text to be continued.")
    while True:
        try:
            message = read("> ")
        except EOFError:
            this.line("")
            return
        except KeyboardInterrupt:
            this.line("\n/quit leaves.")
            continue
        try:
            this.handle(message)
        except _Leave:
            return


def _kind(error: Exception) -> str:
    """What kind of error it is, where its message does not say."""
    return "" if isinstance(error, ValueError) else f"{type(error).__name__}: "


def main(argv: Sequence[str] | None = None) -> None:
    """The chat with a model from the Hub or a folder."""
    parser = argparse.ArgumentParser(prog="python -m qf_peft.app.chat", description="Talk to a model and teach it.")
    parser.add_argument("--model", help="a chat model's Hub id or folder; by default the one the adapter names")
    parser.add_argument("--adapter", help="a QF adapter's Hub id or folder; by default a new one")
    parser.add_argument("--tiny", action="store_true", help="the tiny model that comes with the package")
    options = parser.parse_args(argv)
    if options.tiny == (options.model is not None or options.adapter is not None):
        parser.error("give --model or --adapter, or else --tiny")
    session = Session.tiny() if options.tiny else Session.open(options.model, options.adapter)
    chat(session)


if __name__ == "__main__":
    main()
