"""A local web page: chat on one side, what the model was taught on the other. `python -m qf_peft.app.page --tiny`."""

from __future__ import annotations

import argparse
import html
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .gauges import QUESTIONS, TINY_QUESTIONS, as_html
from .page_actions import Page, View, gr
from .page_guard import guards
from .session import Session
from .tiny import TINY_MODEL

_NEWS = 2.0  # seconds after which a visitor hears what others taught
_CSS = """
.gauge { display: grid; grid-template-columns: auto 1fr auto; gap: 0 .6em; align-items: center; margin: .3em 0 }
.gauge span { opacity: .7; font-size: .85em } .gauge meter { grid-column: 1 / 3; width: 100%; height: 1.2em }
#others { font-size: .85em; width: 100%; border-collapse: collapse } #others td, #others th { padding: .2em .4em }
#others { text-align: left; vertical-align: top } #others .moved td:last-child { color: #b00 }
"""


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
    with gr.Blocks(title="qf_peft", analytics_enabled=False, fill_width=True) as blocks:
        _connect(page, blocks, _lay_out(title, questions))
    return blocks


def _lay_out(title: str, questions: Sequence[str]) -> SimpleNamespace:
    """Put what is on the page into the blocks that are being built: its parts by name."""
    on = SimpleNamespace()
    on.view = gr.State(View())
    gr.HTML(f"<h2>Teach {html.escape(title)}</h2>")
    with gr.Row():
        with gr.Column(scale=3):
            # What a model says, or a stranger's fact, is never markup here: see `as_text`.
            on.chat = gr.Chatbot(
                label="Chat", height=430, render_markdown=False, sanitize_html=True, allow_tags=False,
                latex_delimiters=[], buttons=[], feedback_options=None, elem_id="chat",
                allow_file_downloads=False, group_consecutive_messages=False,
            )  # fmt: skip
            on.message = gr.Textbox(label="Message", placeholder="Ask something", max_lines=6, elem_id="message")
            with gr.Row():
                on.send = gr.Button("Send", variant="primary")
                on.stop = gr.Button("Stop")
                on.compare = gr.Button("Compare")
                on.explain = gr.Button("Explain")
                on.begin = gr.Button("New talk")
            on.adapter = gr.Checkbox(True, label="Adapter on", elem_id="adapter")
            on.status = gr.Textbox(label="Status", interactive=False, elem_id="status", max_lines=4)
        with gr.Column(scale=2):
            with gr.Group():
                on.instruction = gr.Textbox(
                    label="What to know", placeholder="Qi started Oxinnovate.", elem_id="instruction"
                )
                on.question = gr.Textbox(label="Question (your last one)", elem_id="question")
                on.answer = gr.Textbox(
                    label="Answer", placeholder="empty: the model's own, knowing the above", elem_id="answer"
                )
            on.teach = gr.Button("Teach", variant="primary")
            on.facts = gr.CheckboxGroup(
                label="Taught", elem_id="facts", info="✓ said, ≈ said in other words, ✗ not said"
            )  # fmt: skip
            with gr.Row():
                on.forget = gr.Button("Forget ticked")
                on.undo = gr.Button("Undo")
            on.gauges = gr.HTML(as_html(None, 1.0), elem_id="gauges")
            with gr.Accordion("Questions for the locality gauge", open=False):
                on.questions = gr.Textbox("\n".join(questions), show_label=False, lines=6, elem_id="questions")
                on.again = gr.Button("Measure")
            with gr.Row():
                on.name = gr.Textbox(label="Save as", value="my-adapter", elem_id="name")
                on.save = gr.Button("Save")
    return on


def _connect(page: Page, blocks: gr.Blocks, on: SimpleNamespace) -> None:
    """Let the parts `on` the page do what the page's actions are."""
    hidden: dict[str, Any] = {"api_visibility": "private"}
    changed = [on.view, on.chat, on.status, on.facts, on.gauges]
    heard = gr.State(0)
    blocks.load(page.enter, None, [on.facts, on.gauges, heard], **hidden)
    gr.Timer(_NEWS).tick(
        page.hear, [heard], [heard, on.status, on.facts], show_progress="hidden", concurrency_limit=None, **hidden
    )
    gr.on(
        [on.send.click, on.message.submit], page.ask, [on.message, on.view, on.adapter],
        [on.view, on.chat, on.message, on.question, on.status], concurrency_limit=4, **hidden,
    )  # fmt: skip
    on.stop.click(page.stop, None, None, concurrency_limit=None, **hidden)
    blocks.unload(page.stop)
    for button, action in ((on.compare, page.compare), (on.explain, page.explain)):
        button.click(action, [on.message, on.view], [on.view, on.chat, on.message, on.status], **hidden)
    gr.on([on.begin.click, on.chat.clear], page.begin, [on.view], [on.view, on.chat], **hidden)
    on.adapter.change(page.switch, [on.view, on.adapter], [on.view, on.chat], **hidden)
    # One at a time, in order, and once more where something changed meanwhile: what is shown was measured last.
    measuring = {
        "fn": page.gauges, "inputs": [on.questions], "outputs": [on.gauges, on.facts], "concurrency_id": "gauges",
        "trigger_mode": "always_last", **hidden,
    }  # fmt: skip
    given = [on.view, on.instruction, on.question, on.answer]
    on.teach.click(page.teach, given, [*changed, on.instruction, on.answer], **hidden).then(**measuring)
    on.forget.click(page.forget, [on.view, on.facts], changed, **hidden).then(**measuring)
    on.undo.click(page.undo, [on.view], changed, **hidden).then(**measuring)
    on.again.click(**measuring)
    on.save.click(page.save, [on.name], [on.status], **hidden)


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
    font = ["system-ui", "sans-serif"]  # Gradio's own are fetched from elsewhere
    blocks = build(session, folder=folder, questions=questions, max_new_tokens=max_new_tokens)
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, inbrowser=browser, quiet=True, prevent_thread_lock=True,
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        blocked_paths=[Path(path.anchor) for path in [Path.cwd()]], max_file_size="1kb", css=_CSS,
        theme=gr.themes.Default(font=font, font_mono=["monospace"]),
        app_kwargs={
            "middleware": guards(host),
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
