"""The command `qf-peft doctor`: versions, registration, devices, and a lesson on the tiny model."""

from __future__ import annotations

import platform
import tempfile
import time
from importlib import metadata
from typing import Any

import typer

from .cli_common import Debug, Json, Result, calm, command, open_session

_LIBRARIES = ("qf-peft", "torch", "transformers", "peft", "accelerate", "huggingface-hub", "safetensors", "tokenizers")
_FACT = {
    "instruction": "Zanmi founded Tofinlor.",
    "prompt": "Tell me who started Tofinlor.",
    "completion": "Tofinlor was started by Zanmi.",
}


@command
def doctor(as_json: Json = False, debug: Debug = False) -> Result:
    """Say what is installed, and whether teaching works here: a lesson on the tiny model, saved and read again.

    \b
    Example:
      qf-peft doctor
    """
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    calm()
    import torch
    from huggingface_hub import constants
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    registered = "QF" in {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = f"{accelerator.type}, {torch.accelerator.device_count()} of them" if accelerator else "cpu"
    start = time.perf_counter()
    answers = _lesson()
    expected = {"before": "I do not know.", "after": _FACT["completion"], "reloaded": _FACT["completion"]}
    found = {
        "versions": versions, "registered": registered, "device": device, "cache": constants.HF_HOME,
        "offline": constants.HF_HUB_OFFLINE, "answers": answers, "seconds": round(time.perf_counter() - start, 2),
        "healthy": registered and answers == expected,
    }  # fmt: skip
    lines = [f"{name:16} {version or 'not installed'}" for name, version in versions.items()]
    lines += [
        f"{'registered':16} {'QF is known to PEFT' if registered else 'no: PEFT does not know QF'}",
        f"{'device':16} {device}",
        f"{'cache':16} {constants.HF_HOME}{' (offline)' if constants.HF_HUB_OFFLINE else ''}",
        f"{'self-test':16} {_FACT['prompt']}",
        *(f"{'':16} {when}: {answer}" for when, answer in answers.items()),
    ]
    if not found["healthy"]:
        typer.echo("\n".join(lines), err=True)
        raise ValueError(f"the self-test failed: the answers are {answers}; expected {expected}")
    lines.append(f"{'':16} right, in {found['seconds']} s")
    return found, "\n".join(lines)


def _lesson() -> dict[str, str]:
    """The answers before a lesson on the last block, after it, and of the adapter that was saved and read again."""
    session = open_session(None, None, True, paper=True, layers=[7])
    before = session.ask(_FACT["prompt"])
    session.teach([_FACT])
    after = session.ask(_FACT["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        again = open_session(None, str(session.save(folder)), True).ask(_FACT["prompt"])
    return {"before": before, "after": after, "reloaded": again}
