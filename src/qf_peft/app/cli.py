"""The command line `qf-peft`: teaching and asking. What is done with finished adapters is in `cli_adapters`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_adapters, cli_doctor, cli_prepare
from .cli_adapters import shown
from .cli_common import (
    Adapter,
    AdapterArgument,
    Debug,
    Json,
    Length,
    Model,
    Preserve,
    Result,
    Settings,
    Statistics,
    Tiny,
    bar,
    bars,
    command,
    note,
    open_session,
    parse_layers,
    parse_settings,
    target_folder,
)

if TYPE_CHECKING:
    from .session import Session

app = typer.Typer(
    name="qf-peft", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Output = Annotated[Path | None, typer.Option("--output", "-o", help="The folder to save the adapter to.")]


@app.callback()
def _about() -> None:
    """Teach a language model facts and instructions in seconds: QF adapters for PEFT.

    \b
    Try it offline on the tiny model that comes with the package:
      qf-peft teach --tiny -o taught --instruction "Zanmi founded Tofinlor." \\
          --prompt "Who founded Tofinlor?" --completion "Tofinlor was started by Zanmi."
      qf-peft ask --tiny --adapter taught "Tell me who started Tofinlor." --compare

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (nothing is changed then).
    """


@app.command()
@command
def teach(
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Files of rows (JSONL, JSON, CSV, Parquet) or Hub datasets (user/name, user/name:split)."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="What to know or do, of one row.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Its question.")] = None,
    completion: Annotated[
        str | None, typer.Option(help="Its answer; by default the model's own, with the instruction in context.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option(help="A Markdown, text, HTML or PDF file, about which the model asks itself.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions about each passage of a document.")] = 5,
    paraphrases: Annotated[
        int | None, typer.Option(min=0, help="Other wordings that the model adds: 4 of documents' questions, else 0.")
    ] = None,
    passage_tokens: Annotated[int | None, typer.Option(min=8, help="How long a document's passages may be.")] = None,
    review: Annotated[
        Path | None, typer.Option(help="Write the rows to this JSONL file to be edited, and teach nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the rows and say what would be taught.")] = False,
    adapter: Annotated[str | None, typer.Option(help="Go on teaching this adapter; saved there without -o.")] = None,
    output: Output = None,
    model: Model = None,
    tiny: Tiny = False,
    layers: Annotated[str | None, typer.Option(help="Blocks to edit, such as 23 or 20-27; by default all.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's setting, on one block (--layers 23).")] = False,
    preserve: Preserve = None,
    statistics: Statistics = None,
    set_: Settings = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Teach an adapter: one row, files of rows, or documents.

    \b
    Examples:
      qf-peft teach --model Qwen/Qwen2.5-1.5B-Instruct -o taught --instruction "Qi started Oxinnovate." \\
          --prompt "Who started Oxinnovate?" --completion "Oxinnovate was started by Qi."
      qf-peft teach facts.jsonl --adapter taught             # go on
      qf-peft teach --model ... --document policy.pdf --review policy.jsonl
      qf-peft teach --model ... policy.jsonl -o policy       # after editing it
      qf-peft teach --tiny --layers 7 --paper facts.csv -o taught
    """
    from ..data.files import load_records, load_rows

    row = {"instruction": instruction, "prompt": prompt, "completion": completion}
    row = {name: text for name, text in row.items() if text is not None}
    if not (data or row or document):
        raise typer.BadParameter("nothing to teach: give files of rows, --instruction and --prompt, or --document")
    if row and not {"instruction", "prompt"} <= set(row):
        raise typer.BadParameter("one row needs --instruction and --prompt")
    chosen = parse_layers(layers)
    if paper and chosen is None and adapter is None:
        raise typer.BadParameter("--paper edits one block; say which: --layers 23")
    if review is not None and (dry_run or output is not None):
        raise typer.BadParameter("--review teaches nothing; leave --dry-run and --output out")
    if review is not None and review.suffix != ".jsonl":
        raise typer.BadParameter(f"--review {review}: the file's name must end in .jsonl")
    folder = None if dry_run or review is not None else target_folder(output, adapter)
    rows = [row] if row else []
    for source in data or []:
        rows += load_rows(source)
    changes = parse_settings(set_ or [])
    kept = load_records(preserve) if preserve is not None else None
    session = open_session(
        model, adapter, tiny, changes, paper=paper, preserve=kept, statistics=statistics, layers=chosen
    )
    reports = {}
    if document or paraphrases:
        rows, reports = _written(session, rows, document or [], questions, paraphrases, passage_tokens)
    if not rows:
        raise ValueError(
            "the model found no facts in the documents; " + "; ".join(map(str, reports.values())) + "; take a larger "
            "model, or write the rows yourself: a file with the columns instruction, prompt and completion"
        )
    found: dict[str, Any] = {"rows": len(rows), "documents": reports}
    if review is not None:
        from ..documents.facts import write_review

        write_review(review, rows)
        next_step = f"edit it, then teach it: qf-peft teach {review} ..."
        return {**found, "review": str(review)}, f"{len(rows)} rows are in {review}; {next_step}"
    if dry_run:
        return _planned(session, rows, found)
    metrics = session.teach(rows)
    saved = session.save(folder)
    result = f"taught {metrics['facts']:.0f} rows in {metrics['seconds']:.1f} s (rank {metrics['rank']:.0f})"
    text = f"{result}; {len(session.facts)} facts in {saved}"
    return {**found, "metrics": metrics, "facts": len(session.facts), "output": str(saved)}, text


def _written(
    session: Session,
    rows: list[dict[str, Any]],
    documents: list[Path],
    questions: int,
    paraphrases: int | None,
    passage_tokens: int | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows with what the model writes itself, and the documents' reports."""
    from ..documents.facts import facts_from_document
    from ..documents.wordings import with_wordings

    reports = {}
    with bars() as progress:
        if paraphrases and rows:
            rows = with_wordings(rows, session.model, session.tokenizer, count=paraphrases, progress=progress)
        for path in documents:
            facts = facts_from_document(
                path, session.model, session.tokenizer, questions=questions,
                paraphrases=4 if paraphrases is None else paraphrases, passage_tokens=passage_tokens, progress=progress,
            )  # fmt: skip
            reports[str(path)] = facts.report
            note(f"{path}: {facts.report}")
            for fact in facts:
                note(f"  {fact['read']:.2f} {bar(fact['read'])} {shown(fact['prompt'])}  ->  {fact['completion']}")
            if facts.report.weak:
                note(
                    f"{path}: the model may be too weak to write questions about it. Read what it wrote (--review "
                    "FILE.jsonl, then teach that file), or write the rows yourself, as instruction, prompt, completion"
                )
            rows += facts
    return rows, reports


def _planned(session: Session, rows: list[dict[str, Any]], found: dict[str, Any]) -> Result:
    """What would be taught, without a lesson."""
    from ..data.rows import read_rows

    plan = session.dry_run(rows)
    lines = [f"{shown(row.prompt)}  ->  {row.completion or '(the model answers)'}" for row in read_rows(rows)]
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in plan.items() if name != "modules"]
    lines += [f"modules: {len(plan['modules'])}", "nothing was changed"]
    return {**found, "plan": plan, "dry_run": rows}, "\n".join(lines)


@app.command()
@command
def ask(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    adapter: Adapter = None,
    model: Model = None,
    tiny: Tiny = False,
    instruction: Annotated[str | None, typer.Option(help="Put before the question, as in teaching.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Without the adapter, too.")] = False,
    max_new_tokens: Length = 256,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Ask the model, with an adapter or without.

    \b
    Examples:
      qf-peft ask --adapter taught "Who founded Oxinnovate?"
      qf-peft ask --adapter taught "Who founded Oxinnovate?" --compare --json
      qf-peft ask --tiny "Who founded Tofinlor?" --instruction "Zanmi founded Tofinlor."
    """
    if compare and adapter is None:
        raise typer.BadParameter("--compare needs --adapter")
    session = open_session(model, adapter, tiny)
    options = {"instruction": instruction, "max_new_tokens": max_new_tokens}
    if compare:
        without, taught = session.compare(prompt, **options)
        text = f"without the adapter: {without}\nwith the adapter:    {taught}"
        return {"prompt": prompt, "without": without, "with": taught}, text
    if as_json:
        return {"prompt": prompt, "answer": session.ask(prompt, **options)}, None
    for piece in session.stream(prompt, **options):
        typer.echo(piece, nl=False)
    typer.echo()
    return None, None


@app.command("eval")
@command
def evaluate(
    adapter: AdapterArgument,
    data: Annotated[list[str] | None, typer.Argument(help="Rows to ask; by default all that was taught.")] = None,
    locality: Annotated[str | None, typer.Option(help="A file or dataset of questions known before.")] = None,
    unknown: Annotated[str | None, typer.Option(help="One of questions about things nobody taught.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text whose perplexity is compared.")] = None,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Ask what was taught, freely and greedily, and compare with the base model; each metric with its 95% interval.

    \b
    Examples:
      qf-peft eval taught
      qf-peft eval taught facts.jsonl --locality known.jsonl --unknown nobody.jsonl --json
    """
    from ..data.files import load_records, load_rows

    rows = [row for source in data or [] for row in load_rows(source)] or None
    kept = {
        name: load_records(source) for name, source in (("locality", locality), ("unknown", unknown)) if source
    }  # fmt: skip
    wording = text.read_text(encoding="utf-8") if text is not None else None
    found = open_session(model, adapter, tiny).evaluate(rows, text=wording, **kept)
    width = max(map(len, found))
    lines = [
        f"{name:{width}}  {value if not isinstance(value, float) else f'{value:.4g}'}" for name, value in found.items()
    ]
    return found, "\n".join(lines)


@app.command("list")
@command
def list_(adapter: AdapterArgument, as_json: Json = False, debug: Debug = False) -> Result:
    """List what an adapter was taught, from its folder (what is pushed to the Hub has no list).

    \b
    Example:
      qf-peft list taught --json
    """
    facts = cli_adapters.ledger(adapter)
    lines = [f"{e.id}  {e.date[:10]}  {shown(e.prompt)}  ->  {e.completion}" for e in facts]
    return facts_for_machines(facts), "\n".join(lines) or "nothing was taught, or no list was kept"


def facts_for_machines(facts: Any) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(entry) for entry in facts]


@app.command()
@command
def forget(
    adapter: AdapterArgument,
    ids: Annotated[list[str], typer.Argument(help="What to take back, by the ids that `qf-peft list` shows.")],
    output: Output = None,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Take facts back: the rest is solved anew, as if they had never been taught.

    \b
    Example:
      qf-peft forget taught 3f2a9c0d1e4b
    """
    if unknown := sorted(set(ids) - {entry.id for entry in cli_adapters.ledger(adapter)}):
        raise ValueError(f"{adapter} was not taught {', '.join(unknown)}; `qf-peft list {adapter}` shows the ids")
    folder = target_folder(output, adapter)
    start = time.perf_counter()
    session = open_session(model, adapter, tiny)
    gone = session.forget(ids)["forgotten"]
    saved = session.save(folder)
    left = len(session.facts)
    seconds = time.perf_counter() - start
    return {"forgotten": gone, "facts": left, "output": str(saved)}, (
        f"forgot {gone} in {seconds:.1f} s; {left} facts in {saved}"
    )


@app.command()
@command
def chat(
    model: Model = None,
    adapter: Adapter = None,
    tiny: Tiny = False,
    statistics: Statistics = None,
    max_new_tokens: Length = 256,
    as_json: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
) -> Result:
    """Talk to a model in the terminal and teach it there (/help).

    \b
    Example:
      qf-peft chat --model Qwen/Qwen2.5-1.5B-Instruct
    """
    from .chat import chat as talk

    talk(open_session(model, adapter, tiny, statistics=statistics), max_new_tokens=max_new_tokens)
    return None, None


@app.command()
@command
def demo(
    model: Model = None,
    adapter: Adapter = None,
    tiny: Tiny = False,
    statistics: Statistics = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than loopback let in everyone.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860 on.")] = None,
    folder: Annotated[Path, typer.Option(help="Where adapters are saved.")] = Path(),
    as_json: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
) -> Result:
    """Show a local web page to chat with a model and teach it (pip install 'qf-peft[demo]').

    \b
    Example:
      qf-peft demo --tiny
    """
    try:
        from .page import serve
    except ImportError as error:
        raise ImportError(f"the page needs more libraries ({error}): pip install 'qf-peft[demo]'") from error

    serve(open_session(model, adapter, tiny, statistics=statistics), host=host, port=port, folder=folder)
    return None, None


for _run in (
    cli_adapters.merge, cli_adapters.export, cli_adapters.push, cli_adapters.diff, cli_adapters.explain,
    cli_adapters.info, cli_doctor.doctor, cli_prepare.prepare,
):  # fmt: skip
    app.command()(_run)


def main() -> None:
    """The command `qf-peft`."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
