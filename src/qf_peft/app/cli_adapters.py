"""Commands about finished adapters: merge, export, push, diff, explain, info."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_common import (
    AdapterArgument,
    Debug,
    Json,
    Length,
    Model,
    Result,
    Tiny,
    calm,
    check_there,
    command,
    looks_like_path,
    open_session,
    target_folder,
)

Target = Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")]


def ledger(adapter: str) -> Sequence[Any]:
    """What an adapter's folder says it was taught; nothing if it keeps no list.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no adapter.
        ValueError: the list is damaged.
    """
    from ..data.ledger import LEDGER_NAME, from_lines
    from ..data.writing import INCOMING

    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter {adapter}: there is no such folder")
    if (folder / INCOMING).is_dir():
        from ..adapter.saving import finish_saving  # which takes seconds to import

        finish_saving(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter (no adapter_config.json)")
    path = folder / LEDGER_NAME
    return from_lines(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else ()


def shown(text: Any) -> str:
    """A prompt or instruction in one line."""
    return " ".join((text if isinstance(text, str) else " / ".join(m["content"] for m in text)).split())


@command
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="QF adapters: folders or Hub ids.")],
    output: Target,
    join: Annotated[bool, typer.Option("--join", help="Save one adapter that holds all of several.")] = False,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Merge adapters into the base model, or with --join into one adapter.

    \b
    Several are joined by their joint least squares, so that each goes on saying what it was taught.
    Examples:
      qf-peft merge taught -o model               # a plain model, with its tokenizer
      qf-peft merge hr sales -o company --join    # one adapter, which can be taught on
    """
    if join and len(adapters) < 2:
        raise typer.BadParameter("--join needs two adapters or more")
    if len(set(adapters)) < len(adapters):
        raise typer.BadParameter("the same adapter is given twice")
    folder = target_folder(output)
    session = open_session(model, adapters[0], tiny, as_stored=True)
    network = session.model
    if len(adapters) > 1:
        from ..adapter.joining import merge_taught

        names = ["default"]
        for number, adapter in enumerate(adapters[1:], 2):
            check_there(adapter)
            network.load_adapter(adapter, f"adapter{number}")
            names.append(f"adapter{number}")
        merge_taught(network, names, "joined")
        network.set_adapter("joined")
    if join:
        for name in names:
            network.delete_adapter(name)
        _saved_adapter(network, "joined", folder)
        return {"output": str(folder), "facts": len(network.base_model.taught["joined"].entries)}, (
            f"joined {len(adapters)} adapters in {folder}"
        )
    if len(adapters) > 1:
        for name in names:
            network.delete_adapter(name)
    merged = network.merge_and_unload()
    _saved_model(merged, session.tokenizer, folder)
    return {"output": str(folder)}, f"a {type(merged).__name__} with what was taught is in {folder}"


def _saved_adapter(network: Any, name: str, folder: Path) -> None:
    """Save an adapter under whatever name into the folder itself."""
    import tempfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".qf-peft-") as temporary:
        network.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
        _moved(Path(temporary, name), folder)


def _saved_model(network: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model whole or not at all."""
    import tempfile

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".qf-peft-") as temporary:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _moved(Path(temporary), folder)


def _moved(source: Path, folder: Path) -> None:
    """Move files into a folder, the configurations last: without them nothing is taken for a model."""
    folder.mkdir(exist_ok=True)
    for path in sorted((p for p in source.iterdir() if p.is_file()), key=lambda p: p.name.endswith("config.json")):
        path.replace(folder / path.name)


@command
def export(
    adapter: AdapterArgument,
    output: Target,
    format: Annotated[str, typer.Option(help="peft (vLLM, SGLang, ...), gguf (llama.cpp, Ollama) or mlx.")] = "peft",
    rank: Annotated[int | None, typer.Option(help="16, 32, 64, ...; by default the least without loss.")] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Zeros for blocks not edited (TGI, LoRAX).")] = False,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write an adapter as a plain LoRA adapter, for those who do not have qf_peft.

    \b
    Examples:
      qf-peft export taught -o lora --rank 16
      qf-peft export taught -o gguf --format gguf    # gguf/adapter.gguf, for llama.cpp's --lora
    """
    if format not in ("peft", "mlx", "gguf"):
        raise typer.BadParameter(f"--format {format}: expected peft, mlx or gguf")
    folder = target_folder(output)
    from ..share.lora_check import check_portable
    from ..share.lora_export import export_lora

    session = open_session(model, adapter, tiny, as_stored=True)
    written = export_lora(session.model, folder, rank=rank, all_layers=all_layers, format=format)
    problems = check_portable(folder) if format == "peft" else []
    text = f"rank {written['rank']}, {written['modules']} modules, loss {written['loss']:.2g}; in {folder}"
    return {**written, "problems": problems, "output": str(folder)}, "\n".join([text, *problems])


@command
def push(
    adapter: AdapterArgument,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    base_model: Annotated[str | None, typer.Option(help="Its Hub id, if it was loaded from a folder.")] = None,
    license: Annotated[str | None, typer.Option(help="The adapter's licence, such as apache-2.0.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Push an adapter to the Hub, with a model card and a plain LoRA copy. The taught texts are not pushed.

    \b
    Log in first: hf auth login. Example:
      qf-peft push taught me/what-my-company-does --private --license apache-2.0
    """
    session = open_session(model, adapter, tiny, as_stored=True)
    commit = session.push(
        repo_id, base_model=base_model, license=license, private=private, revision=revision, create_pr=create_pr
    )
    found = {"commit": commit.commit_url, "pull_request": commit.pr_url}
    return found, f"pushed: {commit.pr_url or commit.commit_url}"


@command
def diff(
    first: Annotated[str, typer.Argument(metavar="ADAPTER", help="A QF adapter: a folder or Hub id.")],
    second: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Another; by default the base model.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A question; by default those both were taught.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file or dataset of questions.")] = None,
    max_new_tokens: Length = 256,
    model: Model = None,
    tiny: Tiny = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """What two adapters of one base model answer differently.

    \b
    Examples:
      qf-peft diff monday friday
      qf-peft diff taught --prompt "Who founded Oxinnovate?"     # against the base model
    """
    from ..data.files import load_records
    from ..evaluate.metrics import normalise, prompt_rows
    from ..forward.generation import generate

    questions: list[Any] = [*(prompt or []), *(load_records(prompts) if prompts else [])]
    session = open_session(model, first, tiny)
    network = session.model
    if second is not None:
        check_there(second)
        network.load_adapter(second, "second")
        network.set_adapter("default")
    if not questions:
        taught = network.base_model.taught
        entries = [entry for name in taught for entry in taught[name].entries]
        questions = [{"prompt": p} for p in {json.dumps(e.prompt): e.prompt for e in entries}.values()]
    if not questions:
        raise typer.BadParameter("neither adapter keeps a list of what it was taught; give --prompt or --prompts")
    rows = prompt_rows(questions, "prompts")
    encoder = session.trainer.encoder
    ids = [encoder.prompt_ids(row, False) for row in rows]

    def answers() -> list[str]:
        found = generate(
            network.get_base_model(), encoder.tokenizer, ids, max_new_tokens=max_new_tokens,
            batch_tokens=session.args.batch_tokens,
        )  # fmt: skip
        return [text for text, _ in found]

    one = answers()
    if second is not None:
        network.set_adapter("second")
        other = answers()
    else:
        with network.base_model.without_adapters():
            other = answers()
    names = (first, second or "base model")
    differing = [
        {"prompt": row.prompt, "first": a, "second": b}
        for row, a, b in zip(rows, one, other, strict=True)
        if normalise(a) != normalise(b)
    ]
    lines = [f"{len(differing)} of {len(rows)} answers differ"]
    for found in differing:
        lines += [shown(found["prompt"]), f"  {names[0]}: {found['first']}", f"  {names[1]}: {found['second']}"]
    return {"first": names[0], "second": names[1], "asked": len(rows), "different": differing}, "\n".join(lines)


@command
def explain(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    adapter: Annotated[
        str, typer.Option(help="A QF adapter: a folder (what is pushed to the Hub has no list of facts).")
    ],
    model: Model = None,
    tiny: Tiny = False,
    max_new_tokens: Length = 256,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Which taught facts acted on an answer: a ranked list with shares, from the solved weights themselves.

    \b
    Example:
      qf-peft explain --adapter taught "Who founded Oxinnovate?"
    """
    ledger(adapter)
    found = open_session(model, adapter, tiny).explain(prompt, max_new_tokens=max_new_tokens)
    facts = [
        {"id": acted.entry.id, "share": acted.share, "prompt": acted.entry.prompt, "completion": acted.entry.completion}
        for acted in found.acting
    ]
    shares = {"strength": found.strength, "facts": facts}
    return {"prompt": prompt, "answer": found.answer, **shares}, str(found)


@command
def info(adapter: AdapterArgument, as_json: Json = False, debug: Debug = False) -> Result:
    """An adapter's rank, layers, size, facts and settings, without loading its model.

    \b
    Example:
      qf-peft info taught
    """
    calm()
    from huggingface_hub import snapshot_download
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    from ..adapter.statistics_file import STATISTICS_NAME
    from ..forward.blocks import block_of

    folder = Path(adapter).expanduser()
    if folder.is_dir() or looks_like_path(adapter):
        facts: Any = len(ledger(adapter))
    else:
        folder, facts = Path(snapshot_download(adapter, allow_patterns=["adapter_*"])), None
    config = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "QF":
        raise ValueError(f"{adapter} is a {kind} adapter, none of QF's")
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        statistics: dict[str, Any] = {}
        if (folder / STATISTICS_NAME).is_file():
            with safe_open(folder / STATISTICS_NAME, framework="pt") as file:
                statistics = json.loads((file.metadata() or {}).get("qf_peft", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{adapter}: its weights are damaged ({error})") from error
    ranks = {name.partition(".lora_A")[0]: shape[0] for name, shape in shapes.items() if ".lora_A" in name}
    plain = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
    found = {
        "base_model": config.base_model_name_or_path,
        "rank": max(plain.values(), default=0),
        "layers": sorted({block_of(name) for name in plain} - {-1}),
        "modules": sorted({name.rpartition(".")[2] for name in plain}),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "facts": facts,
        "can_be_taught_on": bool(statistics),
        "settings": statistics.get("settings", {}),
    }
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in found.items() if name != "settings"]
    lines += ["settings:", *(f"  {name}: {value}" for name, value in found["settings"].items())]
    return found, "\n".join(lines)
