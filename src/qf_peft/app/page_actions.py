"""What one can do on the page: a talk and a stop for each visitor, and one model that all of them teach."""

from __future__ import annotations

import html
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from ..data.rows import text_of
from .conversation import Conversation, Exchange, printable
from .gauges import MARKS, as_html
from .session import Session

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'qf-peft[demo]'") from error


@dataclass
class View:
    """What one visitor sees."""

    exchanges: list[Exchange] = field(default_factory=list)
    """What the model sees of the talk."""
    shown: list[dict[str, str]] = field(default_factory=list)
    """The chat as it is shown, notes included."""
    seen: int = 0
    """How many changes of the adapter had been made when this talk was last gone on with."""

    def say(self, role: str, text: str) -> None:
        self.shown.append({"role": role, "content": as_text(text)})


class Page:
    """The page's actions on one session. Each returns new values of the components in its Gradio event."""

    def __init__(self, session: Session, folder: Path, max_new_tokens: int) -> None:
        self.session, self.folder, self.max_new_tokens = session, folder, max_new_tokens
        self.changes: list[tuple[str | None, str]] = []
        """Who changed the adapter, and what was done, in order."""
        self._states: dict[str, str] = {}
        """By fact's id how it was answered when it was last asked for."""
        self._stops: dict[str | None, list[Event]] = {}  # by visitor, of the answers under way
        self._lock = threading.Lock()

    def enter(self) -> tuple:
        """What was taught before this visit, and how much of it there is; the chat is left alone, which may have begun
        already."""
        return *self.taught("")[1:], len(self.changes)

    def hear(self, heard: int, request: gr.Request) -> tuple:
        """Tell a visitor what others have changed since: how much was heard, status, facts."""
        now, me = len(self.changes), _visitor(request)
        news = [done for who, done in self.changes[heard:now] if who != me]
        if not news:
            return now, gr.skip(), gr.skip()
        status, facts, _ = self.taught("Another visitor changed the adapter. " + " ".join(news))
        return now, status, facts

    def stop(self, request: gr.Request) -> None:
        """Stop this visitor's answers."""
        with self._lock:
            for stopped in self._stops.get(_visitor(request), []):
                stopped.set()

    @contextmanager
    def _stoppable(self, visitor: str | None) -> Iterator[Event]:
        """An event that `stop` sets meanwhile."""
        stopped = Event()
        with self._lock:
            self._stops.setdefault(visitor, []).append(stopped)
        try:
            yield stopped
        finally:
            with self._lock:
                self._stops[visitor].remove(stopped)
                if not self._stops[visitor]:
                    del self._stops[visitor]

    def ask(self, message: str, view: View, adapter: bool, request: gr.Request) -> Iterator[tuple]:
        """Answers piece by piece: view, chat, the message's field, the question to teach, status."""
        with self._stoppable(_visitor(request)) as stopped:
            yield from self._answer(message, view, adapter, stopped)

    def _answer(self, message: str, view: View, adapter: bool, stopped: Event) -> Iterator[tuple]:
        if view.seen < len(self.changes):  # by another visitor: what the model said before is not read as its own
            if view.exchanges:
                self.note(view, f"Another visitor changed the adapter. {self.changes[-1][1]}")
            view.seen = len(self.changes)
        view.say("user", message)
        view.say("assistant", "")
        yield view, view.shown, "", message, ""
        pieces = Conversation(self.session, view.exchanges).say(
            message, adapter=adapter, max_new_tokens=self.max_new_tokens
        )
        status = ""
        try:
            for piece in pieces:
                view.shown[-1]["content"] += as_text(piece)
                yield view, view.shown, "", message, ""
                if stopped.is_set():
                    status = "Stopped."
                    break
        except Exception as error:
            del view.shown[-2:]
            status = line(error)
        finally:
            pieces.close()
        yield view, view.shown, "", message, status

    def compare(self, message: str, view: View) -> tuple:
        def both(question: str) -> str:
            without, taught = self.session.compare(question, max_new_tokens=self.max_new_tokens)
            return f"Without the adapter: {without}\nWith the adapter: {taught}"

        return self._about(message, view, both)

    def explain(self, message: str, view: View) -> tuple:
        return self._about(
            message, view, lambda question: str(self.session.explain(question, max_new_tokens=self.max_new_tokens))
        )  # fmt: skip

    def _about(self, message: str, view: View, answer: Callable[[str], str]) -> tuple:
        """What is said about a question, or the last one: view, chat, the message's field, status."""
        question = message.strip() or (view.exchanges[-1].question if view.exchanges else "")
        if not question:
            return view, view.shown, message, "Write the question, or ask one first."
        try:
            text = answer(question)
        except Exception as error:
            return view, view.shown, message, line(error)
        view.say("user", question)
        view.say("assistant", text)
        return view, view.shown, "", ""

    def begin(self, view: View) -> tuple:
        view.exchanges.clear()
        view.shown.clear()
        return view, view.shown

    def switch(self, view: View, adapter: bool) -> tuple:
        return self.note(view, f"The adapter is {'on' if adapter else 'off'}.")

    def note(self, view: View, text: str) -> tuple:
        """Show a note and let the model forget the talk so far, so that its next answer is from the weights."""
        if view.shown:
            view.say("assistant", f"[{text} The model no longer sees the talk above.]")
        view.exchanges.clear()
        return view, view.shown

    def teach(self, view: View, instruction: str, question: str, answer: str, request: gr.Request) -> tuple:
        """What `change` gives, and the fields of what to know and the answer: empty for the next fact, once taught."""
        fields: tuple = (gr.skip(), gr.skip())

        def act() -> str:
            nonlocal fields
            self.session.teach(
                instruction=instruction.strip() or answer.strip(), prompt=question.strip(),
                completion=answer.strip() or None,
            )  # fmt: skip
            fact, fields = self.session.facts[-1], ("", "")
            return f"Taught: {text_of(fact.prompt)} → {fact.completion}"

        return *self.change(view, act, _visitor(request)), *fields

    def forget(self, view: View, chosen: list[str], request: gr.Request) -> tuple:
        def act() -> str:
            if not chosen:
                raise ValueError("tick the facts to forget first")
            return f"Forgot {self.session.forget(chosen)['forgotten']}."

        return self.change(view, act, _visitor(request))

    def undo(self, view: View, request: gr.Request) -> tuple:
        return self.change(view, lambda: self.session.undo() or "Undone.", _visitor(request))

    def change(self, view: View, act: Callable[[], str], visitor: str | None) -> tuple:
        """Change the adapter, and let the others know: view, chat, status, facts, gauges (not measured yet)."""
        try:
            done = act()
        except Exception as error:
            return view, view.shown, *self.taught(line(error))
        with self._lock:
            self.changes.append((visitor, printable(done)))
            view.seen = len(self.changes)
        return *self.note(view, done), *self.taught(done)

    def taught(self, status: str) -> tuple:
        self._states = {}
        return printable(status), gr.CheckboxGroup(**self._listed(), value=[]), as_html(None, self._budget)

    def _listed(self) -> dict:
        """The list of facts, each with how it was answered where it was asked for."""
        choices = []
        for e in self.session.facts:
            mark = f"{MARKS[self._states[e.id]]} " if e.id in self._states else ""
            fact = f"{mark}{text_of(e.prompt)} → {text_of(e.completion)} (from: {text_of(e.instruction)})"
            choices.append((printable(fact), e.id))
        return {"choices": choices, "label": f"Taught ({len(choices)})"}

    @property
    def _budget(self) -> float:
        return self.session.args.divergence_of(len(self.session.facts))

    def gauges(self, questions: str) -> tuple:
        """What is said of the facts and of other questions now: gauges, facts."""
        prompts = list(dict.fromkeys(filter(None, map(str.strip, questions.splitlines()))))
        if not self.session.facts:  # an earlier measurement may have listed a fact that is forgotten by now
            return as_html(None, self._budget), gr.CheckboxGroup(**self._listed())
        found = self.session.checkup(prompts)
        self._states = {fact.entry.id: fact.state for fact in found.facts}
        return as_html(found, self._budget), gr.CheckboxGroup(**self._listed())

    def save(self, name: str) -> str:
        """Save into a folder of the working folder."""
        try:
            if not re.fullmatch(r"\w[\w.-]*", name.strip()):
                raise ValueError("give the folder a name of letters, digits, '-', '_' and '.'")
            target = self.folder / name.strip()
            if target.is_symlink() or (target.exists() and not (target / "adapter_config.json").is_file()):
                raise ValueError(f"{name.strip()} is there already and is no adapter; take another name")
            self.session.save(target)
            return f"Saved to {name.strip()} in the folder the page was started in."
        except Exception as error:
            return line(error)


def _visitor(request: gr.Request) -> str | None:
    """Whose page a request comes from: one open tab."""
    return request.session_hash


def as_text(text: str) -> str:
    """Text for the chat, which takes what it is given as HTML even where it renders no Markdown."""
    return html.escape(printable(text), quote=False)


def line(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
