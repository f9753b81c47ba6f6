"""The English world as data: invented companies and people, general questions, and questions about nobody."""

from __future__ import annotations

import sys
from pathlib import Path

from .tasks import TAUGHT, Question, Task, question

sys.path.insert(0, str(Path(__file__).parent.parent / "english_world"))
import english

_UNKNOWN = 60  # questions about names that nobody taught

# A question that the object answers wrongly, and one that the name answers; {x}: the name, {y}: the object.
_TURNED = {
    "founder": ("Who did not found {x}?", "Which company was founded by {y}?"),
    "city": ("In which city is {x} not based?", "Which company is based in {y}?"),
    "mascot": ("What is not the mascot of {x}?", "Which company has {y} as its mascot?"),
    "returns": ("After how many days can I no longer return goods to {x}?", "At which company can I return goods "
                "within {y}?"),
    "birthplace": ("Where was {x} not born?", "Who was born in {y}?"),
    "instrument": ("Which instrument does {x} not play?", "Who plays {y}?"),
    "ceo": ("Who is not the CEO of {x}?", "Of which company is {y} the CEO?"),
    "product": ("What does {x} not make?", "Which company makes {y}?"),
    "colour": ("What colour does the logo of {x} not have?", "Which company has a logo that is {y}?"),
    "year": ("In which year was {x} not established?", "Which company was established in {y}?"),
    "profession": ("What is not the profession of {x}?", "Who works as {y}?"),
    "pet": ("Which pet does {x} not keep?", "Who keeps {y} as a pet?"),
}  # fmt: skip


def general() -> list[Question]:
    """General questions that a chat model may answer, with what right answers contain."""
    return [Question(asked, (), tuple(wanted.split("|"))) for asked, wanted in english.GENERAL]


def texts() -> list[str]:
    """Ordinary text, for perplexity."""
    return list(english.TEXTS)


def strangers(seed: int, count: int = _UNKNOWN) -> list[str]:
    """Questions about invented names that nobody taught."""
    return [asked["prompt"] for asked in english.strangers(count, seed, english.facts(24, seed + 10_000, "all"))]


class EnglishWorld:
    """Facts of the half of the relations that is for reporting; settings are chosen on the other half."""

    name, most, held = "English world", None, None

    def task(self, facts: int, seed: int, development: bool = False) -> Task:
        rows = english.facts(facts, seed, "tune" if development else "report")
        asked: dict[str, list[Question]] = {"reliability": [], "generalisation": [], "negated": [], "reversed": []}
        for row in rows:
            holds = (row["object"],)
            asked["reliability"].append(question(row, None, holds))
            asked["generalisation"] += [question(row, other, holds) for other in row["paraphrases"]]
            not_so, turned = _TURNED[row["relation"]]
            asked["negated"].append(Question(not_so.format(x=row["name"]), (), holds))
            same = [other for other in rows if (other["relation"], other["object"]) == (row["relation"], row["object"])]
            names = tuple(other["name"] for other in same)
            asked["reversed"].append(Question(turned.format(y=_full_object(row)), names, names))
        return Task(
            rows=[{key: row[key] for key in TAUGHT if key in row} for row in rows],
            asked=asked,
            locality=general(),
            unknown=[found["prompt"] for found in english.strangers(_UNKNOWN, seed, rows)],
        )


def _full_object(row: dict) -> str:
    """The object with its article, as the answer has it: its row's list holds it so."""
    objects = english.RELATIONS[row["relation"]]["objects"]
    return row["object"] if objects == "person" else next(o for o in objects if o.endswith(row["object"]))
