"""A local web page: chat on one side, what the model was taught on the other. `python -m qf_peft.app.page --tiny`."""

from __future__ import annotations

import argparse
import html
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from .conversation import Conversation, Exchange, printable, text_of
from .gauges import QUESTIONS, TINY_QUESTIONS, as_html, measure
from .session import Session
from .tiny import TINY_MODEL

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'qf-peft[demo]'") from error

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Nothing is loaded from elsewhere, sent elsewhere or framed by others; Gradio itself needs inline scripts and eval.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_CLOSED = re.compile(r"^(/gradio_api)?/(file=|file/|upload|proxy=|stream|component_server|deep_link|run/|api/|call/)")
_CSS = """
.gauge { display: grid; grid-template-columns: auto 1fr auto; gap: 0 .6em; align-items: center; margin: .3em 0 }
.gauge span { opacity: .7; font-size: .85em } .gauge meter { grid-column: 1 / 3; width: 100%; height: 1.2em }
"""


@dataclass
class View:
    """What one visitor sees."""

    exchanges: list[Exchange] = field(default_factory=list)
    """What the model sees of the talk."""
    shown: list[dict[str, str]] = field(default_factory=list)
    """The chat as it is shown, notes included."""

    def say(self, role: str, text: str) -> None:
        self.shown.append({"role": role, "content": as_text(text)})


class Page:
    """The page's actions on one session. Each returns new values of the components in its Gradio event."""

    def __init__(self, session: Session, folder: Path, max_new_tokens: int) -> None:
        self.session, self.folder, self.max_new_tokens = session, folder, max_new_tokens
        self.stopped = Event()

    def enter(self) -> tuple:
        """What was taught before this visit; the chat is left alone, which may have begun already."""
        return self.taught("")[1:]

    def ask(self, message: str, view: View, adapter: bool) -> Iterator[tuple]:
        """Answers piece by piece: view, chat, the message's field, the question to teach, status."""
        self.stopped.clear()
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
                if self.stopped.is_set():
                    status = "Stopped."
                    break
        except Exception as error:
            del view.shown[-2:]
            status = line(error)
        finally:
            pieces.close()
        yield view, view.shown, "", message, status

    def compare(self, message: str, view: View) -> tuple:
        question = message.strip() or (view.exchanges[-1].question if view.exchanges else "")
        if not question:
            return view, view.shown, message, "Write the question to compare on, or ask one."
        try:
            without, taught = self.session.compare(question, max_new_tokens=self.max_new_tokens)
        except Exception as error:
            return view, view.shown, message, line(error)
        view.say("user", question)
        view.say("assistant", f"Without the adapter: {without}\nWith the adapter: {taught}")
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

    def teach(self, view: View, instruction: str, question: str, answer: str) -> tuple:
        def act() -> str:
            self.session.teach(
                instruction=instruction.strip() or answer.strip(), prompt=question.strip(),
                completion=answer.strip() or None,
            )  # fmt: skip
            fact = self.session.facts[-1]
            return f"Taught: {text_of(fact.prompt)} → {fact.completion}"

        return self.change(view, act)

    def forget(self, view: View, chosen: list[str]) -> tuple:
        def act() -> str:
            if not chosen:
                raise ValueError("tick the facts to forget first")
            return f"Forgot {self.session.forget(chosen)['forgotten']}."

        return self.change(view, act)

    def undo(self, view: View) -> tuple:
        return self.change(view, lambda: self.session.undo() or "Undone.")

    def change(self, view: View, act: Callable[[], str]) -> tuple:
        """Change the adapter: view, chat, status, facts, gauges (not measured yet)."""
        try:
            done = act()
        except Exception as error:
            return view, view.shown, *self.taught(line(error))
        return *self.note(view, done), *self.taught(done)

    def taught(self, status: str) -> tuple:
        choices = [
            (printable(f"{text_of(e.prompt)} → {text_of(e.completion)} (from: {text_of(e.instruction)})"), e.id)
            for e in self.session.facts
        ]
        facts = gr.CheckboxGroup(choices=choices, value=[], label=f"Taught ({len(choices)})")
        return printable(status), facts, as_html({})

    def gauges(self, questions: str) -> str:
        asked = list(dict.fromkeys(filter(None, map(str.strip, questions.splitlines()))))
        return as_html(measure(self.session, asked))

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


def as_text(text: str) -> str:
    """Text for the chat, which takes what it is given as HTML even where it renders no Markdown."""
    return html.escape(printable(text), quote=False)


def line(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def build(
    session: Session,
    *,
    folder: str | Path = ".",
    questions: Sequence[str] | None = None,
    max_new_tokens: int = 256,
) -> gr.Blocks:
    """The page, as Gradio blocks; `serve` shows it.

    Args:
        session: the model; all visitors share it and what it is taught, each has a talk of its own.
        folder: where adapters are saved, each in a folder of its own; nothing else is read or written.
        questions: whose answers teaching should leave alone, for the locality gauge; they can be edited on the page.
        max_new_tokens: how long an answer may be.
    """
    page = Page(session, Path(folder), max_new_tokens)
    base = str(session.model.get_base_model().config.name_or_path or "a model")
    if questions is None:
        questions = TINY_QUESTIONS if base == str(TINY_MODEL) else QUESTIONS
    title = "the tiny model" if base == str(TINY_MODEL) else Path(base).name if Path(base).is_dir() else base
    hidden: dict[str, Any] = {"api_visibility": "private"}

    with gr.Blocks(title="qf_peft", analytics_enabled=False, fill_width=True) as blocks:
        view = gr.State(View())
        gr.HTML(f"<h2>Teach {html.escape(title)}</h2>")
        with gr.Row():
            with gr.Column(scale=3):
                # What a model says, or a stranger's fact, is never markup here: see `as_text`.
                chat = gr.Chatbot(
                    label="Chat", height=430, render_markdown=False, sanitize_html=True, allow_tags=False,
                    latex_delimiters=[], buttons=[], feedback_options=None, elem_id="chat",
                    allow_file_downloads=False, group_consecutive_messages=False,
                )  # fmt: skip
                message = gr.Textbox(label="Message", placeholder="Ask something", max_lines=6, elem_id="message")
                with gr.Row():
                    send = gr.Button("Send", variant="primary")
                    stop = gr.Button("Stop")
                    compare = gr.Button("Compare")
                    begin = gr.Button("New talk")
                adapter = gr.Checkbox(True, label="Adapter on", elem_id="adapter")
                status = gr.Textbox(label="Status", interactive=False, elem_id="status", max_lines=4)
            with gr.Column(scale=2):
                with gr.Group():
                    instruction = gr.Textbox(
                        label="What to know", placeholder="Qi started Oxinnovate.", elem_id="instruction"
                    )
                    question = gr.Textbox(label="Question (your last one)", elem_id="question")
                    answer = gr.Textbox(
                        label="Answer", placeholder="empty: the model's own, knowing the above", elem_id="answer"
                    )
                teach = gr.Button("Teach", variant="primary")
                facts = gr.CheckboxGroup(label="Taught", elem_id="facts")
                with gr.Row():
                    forget = gr.Button("Forget ticked")
                    undo = gr.Button("Undo")
                gauges = gr.HTML(as_html({}), elem_id="gauges")
                with gr.Accordion("Questions for the locality gauge", open=False):
                    asked = gr.Textbox("\n".join(questions), show_label=False, lines=6, elem_id="questions")
                    again = gr.Button("Measure")
                with gr.Row():
                    name = gr.Textbox(label="Save as", value="my-adapter", elem_id="name")
                    save = gr.Button("Save")

        changed = [view, chat, status, facts, gauges]
        blocks.load(page.enter, None, [facts, gauges], **hidden)
        gr.on(
            [send.click, message.submit], page.ask, [message, view, adapter], [view, chat, message, question, status],
            concurrency_limit=4, **hidden,
        )  # fmt: skip
        stop.click(page.stopped.set, None, None, **hidden)
        compare.click(page.compare, [message, view], [view, chat, message, status], **hidden)
        gr.on([begin.click, chat.clear], page.begin, [view], [view, chat], **hidden)
        adapter.change(page.switch, [view, adapter], [view, chat], **hidden)
        # One at a time, in order, and once more where something changed meanwhile: what is shown was measured last.
        measuring = {
            "fn": page.gauges, "inputs": [asked], "outputs": [gauges], "concurrency_id": "gauges",
            "trigger_mode": "always_last", **hidden,
        }  # fmt: skip
        teach.click(page.teach, [view, instruction, question, answer], changed, **hidden).then(**measuring)
        forget.click(page.forget, [view, facts], changed, **hidden).then(**measuring)
        undo.click(page.undo, [view], changed, **hidden).then(**measuring)
        again.click(**measuring)
        save.click(page.save, [name], [status], **hidden)
    return blocks


class _Guard:
    """Refuses what the page has no use for, and tells the browser to load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if _CLOSED.match(scope["path"]):
                return await PlainTextResponse("This page has no files.", 403)(scope, receive, send)
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                # Another site, open in the same browser, must not teach the model.
                return await PlainTextResponse("This page takes requests from itself only.", 403)(scope, receive, send)

        async def marked(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []), (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        return await self.app(scope, receive, marked)


def serve(
    session: Session,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    folder: str | Path = ".",
    questions: Sequence[str] | None = None,
    max_new_tokens: int = 256,
    browser: bool = False,
    block: bool = True,
) -> str:
    """Show the page on this machine.

    Args:
        session, folder, questions, max_new_tokens: as for `build`.
        host: the address to listen at; others than loopback let everyone who reaches it teach the model.
        port: by default the first free one from 7860 on.
        browser: open it in the browser.
        block: wait until interrupted.

    Returns:
        The page's address.

    Raises:
        OSError: the port is taken.
    """
    names = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    font = ["system-ui", "sans-serif"]  # Gradio's own are fetched from elsewhere
    blocks = build(session, folder=folder, questions=questions, max_new_tokens=max_new_tokens)
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, inbrowser=browser, quiet=True, prevent_thread_lock=True,
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        blocked_paths=[Path(path.anchor) for path in [Path.cwd()]], max_file_size="1kb", css=_CSS,
        theme=gr.themes.Default(font=font, font_mono=["monospace"]),
        app_kwargs={
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Guard)],
            "docs_url": None, "redoc_url": None, "openapi_url": None,
        },
    )  # fmt: skip
    if block:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        blocks.block_thread()
    return address


def main(argv: Sequence[str] | None = None) -> None:
    """The page for a model from the Hub or a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m qf_peft.app.page", description="A page to chat with and teach a model."
    )
    parser.add_argument("--model", help="a chat model's Hub id or folder; by default the one the adapter names")
    parser.add_argument("--adapter", help="a QF adapter's Hub id or folder; by default a new one")
    parser.add_argument("--tiny", action="store_true", help="the tiny model that comes with the package")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--folder", default=".", help="where adapters are saved (default: here)")
    options = parser.parse_args(argv)
    if options.tiny == (options.model is not None or options.adapter is not None):
        parser.error("give --model or --adapter, or else --tiny")
    session = Session.tiny() if options.tiny else Session.open(options.model, options.adapter)
    serve(session, host=options.host, port=options.port, folder=options.folder)


if __name__ == "__main__":
    main()
