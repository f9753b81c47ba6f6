"""Facts, preserved questions and probes of the tiny world, which the tiny model that comes with the package knows."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from .tasks import TAUGHT, Question, Task, question

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_world"))
import world

_DEVELOPMENT_SEED = 99


def teaching_set(count: int, seed: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Facts about novel companies: one relation each, asked in one phrasing; four other phrasings as paraphrases."""
    r, seen, rows = random.Random(f"facts {seed}"), set(), []
    while len(rows) < count:
        company = world.novel(r)
        if company in seen:
            continue
        seen.add(company)
        relation = r.choice(world.NAMES)
        value = world.value(r, relation)
        asks = world.RELATIONS[relation]["asks"]
        questions = r.sample([world.phrase(lead, ask, company) for lead in world.LEADS for ask in asks], 5)
        rows.append(
            {
                "instruction": world.state(r, relation, company, value),
                "prompt": questions[0],
                "completion": world.answer(relation, company, value),
                "paraphrases": questions[1:],
            }
        )
    return rows, seen


def preserve_set(seed: int, count: int = 200) -> list[str]:
    """Ordinary questions: three quarters about known companies, a quarter about unknown ones."""
    r = random.Random(f"preserve {seed}")
    return [
        world.question(r, r.choice(world.NAMES), r.choice(world.KNOWN)[0] if i % 4 else world.novel(r))
        for i in range(count)
    ]


def probe_sets(
    seed: int, companies: set[str], preserved: set[str], count: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions about known companies and about unknown ones, none of them preserved or taught."""
    r, known, unknown = random.Random(f"probes {seed}"), [], []
    while len(known) < count:
        relation, (company, facts) = r.choice(world.NAMES), r.choice(world.KNOWN)
        asked = world.question(r, relation, company)
        if asked not in preserved:
            known.append({"prompt": asked, "completion": world.answer(relation, company, facts[relation])})
    while len(unknown) < count:
        company = world.novel(r)
        asked = world.question(r, r.choice(world.NAMES), company)
        if company not in companies and asked not in preserved:
            unknown.append({"prompt": asked, "completion": world.UNKNOWN})
    return known, unknown


class TinyWorld:
    """The tiny world as data: known facts as locality, questions about nobody as unknown, 200 questions preserved."""

    name, most, held = "tiny world", None, None

    def task(self, facts: int, seed: int, development: bool = False) -> Task:
        seed = _DEVELOPMENT_SEED + seed if development else seed
        rows, companies = teaching_set(facts, seed)
        kept = preserve_set(seed)
        known, unknown = probe_sets(seed, companies, set(kept), 100)
        value = [row["completion"].rsplit(" ", 1)[1].rstrip(".") for row in rows]
        return Task(
            rows=[{key: row[key] for key in TAUGHT if key in row} for row in rows],
            asked={
                "reliability": [question(row, None, (v,)) for row, v in zip(rows, value, strict=True)],
                "generalisation": [
                    question(row, other, (v,))
                    for row, v in zip(rows, value, strict=True)
                    for other in row["paraphrases"]
                ],
            },
            locality=[Question(row["prompt"], (row["completion"],), (row["completion"],)) for row in known],
            unknown=[row["prompt"] for row in unknown],
            preserved=kept,
        )
