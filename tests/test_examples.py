"""The examples run as a user runs them, offline on the tiny model, and say what they should."""

import subprocess
import sys

from conftest import EXAMPLES


def run(*arguments):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=EXAMPLES.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quickstart():
    lines = [line.split("->")[-1].strip() for line in run(EXAMPLES / "quickstart.py").splitlines()]
    known = "Tofinlor was started by Zanmi."
    assert lines[0] == "I do not know." and lines[1] == known
    assert lines[2].startswith("Taught: facts 1")
    assert lines[3:5] == [known, known] and lines[5] == "Brigar was started by Vacla."
    assert lines[6:] == [known, known], "saved and reloaded; merged"


def test_paper_queries():
    out = run(EXAMPLES / "paper_queries.py", "--tiny").splitlines()
    answers = [line.strip() for line in out if line.startswith("   ")]
    first, second = "Tofinlor was started by Zanmi.", "Tofinlor is located in Rome."
    unrelated = "Brigar was started by Vacla."
    assert answers == ["I do not know.", first, unrelated, first, unrelated, first, second, first]
