"""What the commands of `qf-peft` share: options, opening a session, output for people or machines, errors."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .session import Session

# Nothing here or in the commands' modules imports torch before a command runs: the help must come at once.

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "--gguf", help="The base: a Hub id, folder or GGUF file. By default the one that the adapter names."
    ),
]  # fmt: skip
Adapter = Annotated[str | None, typer.Option(help="A QF adapter: a folder or Hub id.")]
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A QF adapter: a folder or Hub id.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="The tiny model that comes with the package; offline.")]
Preserve = Annotated[str | None, typer.Option(help="A file or dataset of what the model must go on saying.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of QFTrainingArguments."),
]
Statistics = Annotated[
    str | None, typer.Option(help="What `qf-peft prepare -o` saved of this model: a folder or Hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Length = Annotated[int, typer.Option(min=1, help="How many tokens an answer may have.")]

Result = tuple[Any, str | None]
"""What a command returns: for machines, and for people (None if it has printed already)."""


def command(run: Callable[..., Result]) -> Callable[..., None]:
    """A command of functions that return a `Result`: prints it, and errors as one line with exit code 1 (130 when
    interrupted). Its parameters must include `as_json` and `debug`."""

    @functools.wraps(run)
    def wrapped(*args: Any, **options: Any) -> None:
        machine, debug, stdout = options["as_json"], options["debug"], sys.stdout
        hush()
        try:
            with contextlib.redirect_stdout(sys.stderr) if machine else contextlib.nullcontext():
                data, text = run(*args, **options)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was changed", 130, machine)
        except Exception as error:
            if debug or isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter)):
                raise
            _fail(describe(error), 1, machine)
        if machine:
            stdout.write(json.dumps(data, ensure_ascii=False, default=_plain) + "\n")
        elif text is not None:
            stdout.write(text + "\n")
        stdout.flush()

    return wrapped


def describe(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)):
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


def _fail(message: str, code: int, machine: bool) -> None:
    typer.echo(f"error: {message}", err=True)
    if machine:
        typer.echo(json.dumps({"error": message}, ensure_ascii=False))
    raise typer.Exit(code)


def note(text: str) -> None:
    """Tell people what is going on, on standard error."""
    typer.echo(text, err=True)


def bar(share: float) -> str:
    """A share from 0 to 1 as ten squares."""
    return f"{'█' * round(10 * share):░<10}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.item() if hasattr(value, "item") else str(value)


def on_screen() -> bool:
    """Whether somebody watches standard error, where progress is shown."""
    return sys.stderr.isatty()


def hush() -> None:
    """Keep other libraries from telling what they will change one day, or which optional kernels they do not find; to
    be called before they are imported."""
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def calm() -> None:
    """Register QF with PEFT, and show no progress bars where nobody watches."""
    from transformers.utils.logging import disable_progress_bar

    from ..registration import register

    register()

    if not on_screen():
        disable_progress_bar()


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings of QFTrainingArguments from NAME=VALUE pairs.

    Raises:
        typer.BadParameter: a pair is none, or names no setting.
        ValueError: a value is out of range.
    """
    from ..teaching.arguments import QFTrainingArguments

    given: dict[str, Any] = {}
    names = set(QFTrainingArguments.__dataclass_fields__)
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in names:
            raise typer.BadParameter(f"--set {pair}: expected NAME=VALUE with NAME one of {', '.join(sorted(names))}")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
    QFTrainingArguments(**given)
    return given


def open_session(
    model: str | None,
    adapter: str | None,
    tiny: bool,
    changes: dict[str, Any] | None = None,
    *,
    paper: bool = False,
    preserve: list[Any] | None = None,
    statistics: str | None = None,
    layers: list[int] | None = None,
    as_stored: bool = False,
) -> Session:
    """The session of a command.

    Args:
        model, adapter, tiny: which model.
        changes: of the settings; the others are those that the adapter was taught with, or the defaults.
        paper: the paper's setting instead.
        preserve, statistics: what the model must go on saying, or a folder or Hub id of what was measured of that.
        layers: the blocks of a new adapter; by default all.
        as_stored: whether the model is in the dtype of its files, to write weights, and not in the one that runs best.

    Raises:
        typer.BadParameter: the options do not say which model, or say two.
        ValueError, OSError: see [`Session.open`].
    """
    if tiny and model is not None:
        raise typer.BadParameter("give --model or --tiny, not both")
    if not tiny and model is None and adapter is None:
        raise typer.BadParameter("give --model, an adapter that names its base model, or --tiny")
    if preserve is not None and statistics is not None:
        raise typer.BadParameter("give --preserve or --statistics, not both")
    if layers is not None and adapter is not None:
        raise typer.BadParameter("--layers is of new adapters; the one given by --adapter has its own")
    check_there(adapter)
    calm()
    from ..teaching.arguments import QFTrainingArguments
    from .session import Session
    from .tiny import TINY_MODEL

    session = Session.open(str(TINY_MODEL) if tiny else model, adapter, **({"dtype": "auto"} if as_stored else {}))
    network = session.model
    if layers is not None:
        from peft import get_peft_model

        from ..adapter.config import QFConfig

        network = get_peft_model(network.unload(), QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
    taught = network.base_model.taught.get(session.trainer.adapter_name)
    if taught is not None and not paper:
        given = {k: v for k, v in taught.settings.items() if k in QFTrainingArguments.__dataclass_fields__}
    elif tiny and not paper:
        given = {"preserve_chats": 100, "contrast_chats": 0}  # as Session.tiny: within seconds
    else:
        given = {}
    make = QFTrainingArguments.paper if paper else QFTrainingArguments
    args = make(**{**given, "disable_tqdm": not on_screen(), **(changes or {})})
    if statistics is not None:
        from ..teaching.preserved_statistics import PreservedStatistics

        preserve = PreservedStatistics.from_pretrained(statistics)
    return Session(network, session.tokenizer, args, preserve)


def check_there(adapter: str | None) -> None:
    """Refuse the path of an adapter's folder that is not there.

    Raises:
        FileNotFoundError: it is not there, and can be no Hub id.
    """
    if adapter is not None and looks_like_path(adapter) and not Path(adapter).expanduser().is_dir():
        raise FileNotFoundError(f"no adapter {adapter}: there is no such folder")


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a folder's and not a Hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def parse_layers(text: str | None) -> list[int] | None:
    """Blocks from "23", "20-27" or "5,7,20-27".

    Raises:
        typer.BadParameter: it is none of these.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise typer.BadParameter(f"--layers {text}: expected blocks such as 23, 20-27 or 5,7,20-27")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def target_folder(output: Path | None, source: str | None = None) -> Path:
    """Where a command shall write: the folder given, or the adapter's own if it is one.

    Raises:
        typer.BadParameter: neither is a folder.
        FileNotFoundError: the adapter's folder is not there.
        ValueError: it holds other things that would be replaced.
    """
    check_there(source)
    if output is None:
        if source is None or not Path(source).expanduser().is_dir():
            raise typer.BadParameter("give --output, the folder to save to")
        return Path(source).expanduser()
    output = output.expanduser()
    if output.is_file():
        raise ValueError(f"{output} is a file; give a folder")
    same = source is not None and output.resolve() == Path(source).expanduser().resolve()
    taken = [n for n in ("adapter_config.json", "adapters.safetensors", "config.json") if (output / n).exists()]
    if taken and not same:
        raise ValueError(f"{output} holds a model or adapter already ({taken[0]}); give another folder")
    return output


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress function (what, done, total) that shows a bar for each thing that is done, on standard error."""
    from tqdm.auto import tqdm

    shown: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in shown:
            close()
            shown[what] = tqdm(desc=what.capitalize(), total=total, leave=False, disable=not on_screen())
        shown[what].total = total
        shown[what].update(done - shown[what].n)
        if done >= total:
            shown.pop(what).close()

    def close() -> None:
        while shown:
            shown.popitem()[1].close()

    try:
        yield progress
    finally:
        close()
