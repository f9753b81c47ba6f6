"""What both files of tests of the comparison teach and ask."""

import sys

from conftest import EXAMPLES, FACT, OTHER

sys.path.insert(0, str(EXAMPLES))

from comparison.tasks import Question, Task, question

KNOWN = "Please say who started Brigar."
CHATS = [KNOWN, "Who founded Ranixmo?", "Where is Molupal located?", "Tell me where Lupal is based."]


def task(rows=(FACT, OTHER), **more):
    """The facts of all tests, each with one other wording."""
    wording = {FACT["prompt"]: "Who founded Tofinlor?", OTHER["prompt"]: "Where is Tofinlor located?"}
    asked = {
        "reliability": [question(row) for row in rows],
        "generalisation": [question(row, wording[row["prompt"]]) for row in rows],
    }
    known = Question(KNOWN, ("Brigar was started by Vacla.",), ("Vacla",))
    return Task(list(rows), asked, [known], ["Who started Vexamo?"], CHATS, **more)
