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


def test_lifelong(tmp_path):
    """The example's own parts on a few facts: corrections, forgetting, and teaching one after another."""
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
from pathlib import Path
import lifelong
from compare import Comparison, preserve_set, teaching_set
compare, kept = Comparison(Path({str(tmp_path)!r})), preserve_set(0)
rows, _ = teaching_set(6, 0)
print(lifelong.corrections(compare, rows, kept, 0, count=2))
print(lifelong.forgetting(compare, rows, kept, count=2))
for learner in (lifelong.Learner(compare, kept), lifelong.FineTuner(compare)):
    print(lifelong.sequence(compare, learner, rows[:3], 1, kept[:8], None, every=3)["points"][0]["recall"])
"""
    corrected, forgot, taught, tuned = run("-c", script).splitlines()[-4:]
    corrected, forgot = eval(corrected), eval(forgot)
    assert corrected["new"] == 1 and corrected["old"] == 0 and corrected["rest"] >= 0.75
    assert forgot["forgotten"] == forgot["never_taught"] == 0 and forgot["rest"] >= 0.75
    assert float(taught) == 1 and 0 <= float(tuned) <= 1
