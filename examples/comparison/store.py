"""What a comparison has found so far, in files that are whole at any moment: a run broken off goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .bench import Answer, Bench
from .scoring import Answers


class Store:
    """`compare.json`, the results; `base.json`, what the base model answers; `answers.jsonl`, what was answered.

    Args:
        folder: where they lie; made where it is not there.
        header: what all results have in common: the model, the data, how answers are given.

    Raises:
        ValueError: the folder holds results of something else.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.base_path, self.answers_path = (
            folder / name for name in ("compare.json", "base.json", "answers.jsonl")
        )
        self.found: dict[str, Any] = {"header": header, "development": [], "runs": []}
        if self.path.exists():
            self.found = _read(self.path)
            if not isinstance(self.found, dict) or "header" not in self.found:
                raise ValueError(f"{self.path} holds no results of this comparison; give another --out")
            for name, value in header.items():
                if self.found["header"].get(name) != value:
                    was = self.found["header"].get(name)
                    raise ValueError(
                        f"{self.path} was measured with {name} {was!r}, not {value!r}; give another --out, or remove it"
                    )
        self.base: dict[str, dict[str, list]] = _read(self.base_path) if self.base_path.exists() else {}

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.found["runs"]

    @property
    def development(self) -> list[dict[str, Any]]:
        """What the settings were chosen by: one entry for each tried."""
        return self.found["development"]

    def drop_skipped(self) -> None:
        """Forget what could not be done."""
        for name in ("development", "runs"):
            self.found[name] = [entry for entry in self.found[name] if "skipped" not in entry]

    def save(self) -> None:
        _write(self.path, json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")

    def before(self, bench: Bench, prompts: list[str]) -> Answers:
        """The base model's answers, kept by the questions asked together: in 16 bits what else is in the batch rounds
        them otherwise, and a third of long answers changes."""
        together = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        if together not in self.base:
            asked = bench.ask(bench.base(), prompts) if prompts else {}
            self.base[together] = {prompt: list(answer) for prompt, answer in asked.items()}
            _write(self.base_path, json.dumps(self.base, indent=0, ensure_ascii=False))
        return {prompt: Answer(*answer) for prompt, answer in self.base[together].items()}

    def write_answers(self, job: dict[str, Any], answers: Answers) -> None:
        """Add a run's answers, to be read; a run that was broken off behind this stands there twice."""
        with self.answers_path.open("a", encoding="utf-8") as file:
            for prompt, (text, ended) in answers.items():
                line = {**job, "prompt": prompt, "answer": text, "ended": ended}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it or give another --out") from error


def _write(path: Path, text: str) -> None:
    """Write a file under a temporary name first, so that it is never half there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
