"""Every command of README.md and of the guides runs, on the tiny model and against a Hub on loopback.

A fenced block tagged `python` or `bash` is run, in the document's order, all in one process and one folder. Comments
right before it may say

    <!-- not run: why -->        it is not run
    <!-- run with A as B -->     with B in place of the text A
    <!-- given CODE -->          this Python first, which readers do not see

`base` and `tokenizer` are there from the start: the tiny model's. Blocks with another tag or none are no commands.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^((?:<!--(?:(?!-->).)*-->\s*)*)^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.S)


def commands(text):
    """The blocks to be run: (language, hidden code, code, line number of the code)."""
    for match in BLOCK.finditer(text):
        comments, language, code = match.groups()
        given, run = [], language in ("python", "bash")
        for comment in COMMENT.findall(comments):
            if comment.startswith("not run:"):
                run = False
            elif comment.startswith("run with "):
                old, new = comment.removeprefix("run with ").split(" as ")
                assert old in code, f"{old!r} is not in the block it is said to be in"
                code = code.replace(old, new)
            elif comment.split(None, 1)[0] == "given":
                given.append(comment.removeprefix("given").strip())
        if run:
            yield language, "\n".join(given), code, text.count("\n", 0, match.start(3))


def run_all(document):
    """Run in a process of its own, in an empty folder that has the repository's files as links."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {
        "base": AutoModelForCausalLM.from_pretrained("someone/tiny-world", dtype="float32"),
        "tokenizer": AutoTokenizer.from_pretrained("someone/tiny-world"),
    }
    for language, given, code, line in commands(document.read_text()):
        exec(compile(given, "given", "exec"), names)
        if language == "bash":
            subprocess.run(["bash", "-euc", code], check=True)
        else:  # the blank lines before it make tracebacks name the document's line
            exec(compile("\n" * line + code, str(document), "exec"), names)
        print(f"ran {document.name}:{line}", flush=True)


@pytest.mark.parametrize(
    ("document", "least"), [("README.md", 3), ("examples/features.md", 7), ("examples/README.md", 6)]
)
def test_commands_run(document, least, tmp_path, tmp_path_factory):
    from conftest import TINY
    from hub_server import HubServer

    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    with HubServer() as hub:
        hub.add("someone/tiny-world", TINY)
        home = tmp_path_factory.getbasetemp() / "guide-home"  # the chats that the model writes are cached for both
        result = subprocess.run(
            [sys.executable, __file__, ROOT / document], capture_output=True, text=True, timeout=1200, cwd=tmp_path,
            env={**os.environ, **hub.environment(home)},
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"ran {Path(document).name}:") >= least


RULES = """
<!-- run with 1 as 2 -->
<!-- given a = 3 -->
```python
b = 1
```
<!-- not run: why -->
```bash
false
```
<!-- given
c = 4
-->

```python
d = c
```
```text
nothing
```
```
plain
```
"""


def test_rules():
    assert list(commands(RULES)) == [("python", "a = 3", "b = 2\n", 4), ("python", "c = 4", "d = c\n", 15)]


@pytest.mark.parametrize(
    "document", ["README.md", "examples/features.md", "examples/README.md", "examples/results/README.md"]
)
def test_what_is_named_is_there(document):
    """Example files that the text names exist, and so do settings in `QFTrainingArguments(...)`; links to headings lead
    somewhere."""
    from qf_peft import QFTrainingArguments

    text = (ROOT / document).read_text()
    tags = {language for _, language, _ in BLOCK.findall(text)}
    assert tags <= {"python", "bash", "bibtex", ""}, "commands are tagged python or bash"
    for path in set(re.findall(r"(?:examples|model_cards|tests)/[\w/]+\.\w+", text)):
        assert (ROOT / path).exists(), path
    for settings in re.findall(r"QFTrainingArguments\(([\w=., ]+)\)", text):
        for name in re.findall(r"(\w+)=", settings):
            assert name in QFTrainingArguments.__dataclass_fields__, name
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def anchors(text):
    """What links may name: the headings in lower case, with dashes."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
