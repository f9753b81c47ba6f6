"""Python run in processes that have imported already what most of it imports, forked from one that does nothing else.

Importing PEFT takes ten seconds, mostly what it finds beside it (bitsandbytes, torchao), and a suite runs many scripts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["transformers.models.qwen2.modeling_qwen2", "qf_peft.teaching.trainer", "qf_peft.app.session"]
)
ROOT = Path(__file__).parent.parent


def _enter(arguments: list[str], folder: str) -> None:
    """The child: what it says goes into two files, and it ends as the script does."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(ROOT)
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


def run_python(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` gives, run in the repository's folder: of a script, `-m MODULE` or `-c CODE`.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `timeout` seconds, and was killed.
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        process = SERVER.Process(target=_enter, args=(command, folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (Path(folder, name).read_text() if Path(folder, name).exists() else "" for name in ("out", "err"))
    return subprocess.CompletedProcess(command, process.exitcode, out, err)
