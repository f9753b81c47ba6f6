"""The command `qf-peft prepare`: what teaching a model needs once, made ahead, and saved for other machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    Debug,
    Json,
    Model,
    Preserve,
    Result,
    Settings,
    Tiny,
    command,
    note,
    open_session,
    parse_settings,
)


@command
def prepare(
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Save what was measured there too (pretrained models)."),
    ] = None,
    preserve: Preserve = None,
    tiny: Tiny = False,
    set_: Settings = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Make ahead what teaching a model needs once; with -o as a file, which spares other machines the work.

    \b
    Examples:
      qf-peft prepare --model Qwen/Qwen2.5-1.5B-Instruct
      qf-peft prepare --model Qwen/Qwen2.5-1.5B-Instruct -o preserved     # perhaps: hf upload me/preserved preserved
      qf-peft teach facts.jsonl --model Qwen/Qwen2.5-1.5B-Instruct --statistics me/preserved -o taught
    """
    from ..data.files import load_records
    from ..data.writing import check_folder

    if output is not None:
        check_folder(output.expanduser())
    chats = load_records(preserve) if preserve is not None else None
    session = open_session(model, None, tiny, parse_settings(set_ or []), preserve=chats)
    start = time.perf_counter()
    statistics = session.trainer.prepare()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "cache": str(session.args.cache.path), "output": None}
    text = f"prepared in {seconds:.1f} s; it is kept in {found['cache']}"
    if output is None:
        return found, text
    if statistics is None:
        raise ValueError(
            "only what the default lesson of pretrained models preserves can be saved; this model is prepared, in "
            f"{found['cache']}"
        )
    if preserve is not None:
        note("the file holds a tenth of the chats given, to be read by whoever has it")
    file = statistics.save_pretrained(output)
    return {**found, "output": str(file)}, f"{text}, and in {file} ({file.stat().st_size / 1e6:.1f} MB)"
