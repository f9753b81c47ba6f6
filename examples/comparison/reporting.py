"""What a comparison found: tables, one line that says which method serves best, and curves."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from .methods import METHODS
from .scoring import overall

Run = dict[str, Any]

# Title, column and kinds of the scores in the table, those with a slash beside each other.
COLUMNS = (
    ("reliability", "reliability", ("exact", "contains")),
    ("generalisation", "generalisation", ("exact", "contains")),
    ("portability", "portability", ("exact", "contains")),
    ("multi-hop", "multi_hop", ("exact", "contains")),
    ("reversed", "reversed", ("contains",)),
    ("negated, not said", "negated", ("contains",)),
    ("locality", "locality", ("same", "f1")),
    ("known", "general", ("known",)),
    ("refusals kept", "unknown", ("refused",)),
    ("leaks", "leak", ("contains",)),
)
FORCED = ("token_accuracy", "token_accuracy_generalisation", "ES", "PS", "NS")
_CLOSE = 0.02  # of the overall score: methods so near to each other count as equally good, and the quicker is named


def of_kind(runs: list[Run], kind: str) -> list[Run]:
    return [run for run in runs if run["job"]["kind"] == kind]


def groups(runs: list[Run], *names: str) -> dict[tuple, list[Run]]:
    """Runs by what their jobs have in common, in the order of that."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run["job"][name] for name in names), []).append(run)
    methods = list(METHODS)
    rank = {name: methods.index(name) if name in methods else len(methods) for (*_, name) in found}
    return dict(sorted(found.items(), key=lambda item: (*item[0][:-1], rank[item[0][-1]])))


def score(runs: list[Run], column: str, kind: str) -> tuple[float, int] | None:
    """The mean over seeds, and how many answers it is of."""
    found = [run["scores"][column][kind] for run in runs if run.get("scores", {}).get(column, {}).get(kind)]
    return (fmean(f["value"] for f in found), sum(f["count"] for f in found)) if found else None


def interval(value: float, count: int) -> tuple[float, float]:
    """How far a share's 95% interval (Wilson) reaches below and above it."""
    z = 1.959964
    centre, half = value + z * z / (2 * count), z * (value * (1 - value) / count + z * z / (4 * count * count)) ** 0.5
    low, high = (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)
    return max(0.0, value - low), max(0.0, high - value)


def _shown(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("0.", ".", 1) if digits == 2 and 0 < value < 0.995 else f"{value:.{digits}f}"


def _mean(runs: list[Run], *path: str) -> float | None:
    found = []
    for run in runs:
        for name in path:
            run = run.get(name) if isinstance(run, dict) else None
        if isinstance(run, (int, float)):
            found.append(run)
    return fmean(found) if found else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table without the columns that are empty in all rows."""
    kept = [i for i in range(len(head)) if any(row[i].strip("– /") for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _taught(facts: int, step: int) -> str:
    return f"{facts:,}" + (f" by {step}" if step else "")


def scores_table(runs: list[Run]) -> str:
    """Free answers, general ability and cost; methods that could not be taught have dashes."""
    head = ["facts", "method", *(title for title, *_ in COLUMNS), "× perplexity", "seconds", "MB", "ms an answer"]
    rows = []
    for (facts, step, method), some in groups(of_kind(runs, "lesson"), "facts", "step", "method").items():
        cells = [_taught(facts, step), METHODS[method].title]
        for _, column, kinds in COLUMNS:
            values = [score(some, column, kind) for kind in kinds]
            cells.append(" / ".join(_shown(v[0] if v else None) for v in values) if any(values) else "–")
        asked = _mean(some, "ask_seconds")
        cells += [_shown(_mean(some, "perplexity")), _shown(_mean(some, "seconds"), 1)]
        cells += [_shown(_mean(some, "memory_mb"), 0), _shown(None if asked is None else 1000 * asked, 0)]
        rows.append(cells)
    return _table(head, rows)


def forced_table(runs: list[Run]) -> str:
    """Teacher-forced scores, and tasks of the LM Evaluation Harness where they were run."""
    lessons = of_kind(runs, "lesson")
    tasks = sorted({name for run in lessons for name in run.get("harness", {}) if name != "skipped"})
    titles = ["token accuracy", "token accuracy, generalisation", "ES", "PS", "NS"]
    rows = []
    for (facts, step, method), some in groups(lessons, "facts", "step", "method").items():
        cells = [_taught(facts, step), METHODS[method].title]
        cells += [_shown(_mean(some, "forced", name, "value")) for name in FORCED]
        rows.append(cells + [_shown(_mean(some, "harness", name), 3) for name in tasks])
    return _table(["facts", "method", *titles, *tasks], rows)


def stability_table(runs: list[Run]) -> str:
    """Three orders of the same facts, and a fact taken back; empty where neither was measured."""
    rows = []
    some = of_kind(runs, "orders") + of_kind(runs, "deletion")
    for (facts, step, method), found in groups(some, "facts", "step", "method").items():
        cells = [_taught(facts, step), METHODS[method].title]
        for kind in ("orders", "deletion"):
            cells += [_shown(_mean(of_kind(found, kind), name), 4) for name in ("distance", "equal_answers")]
        rows.append(cells)
    head = ["facts", "method", "orders: distance", "orders: equal answers", "taken back: distance",
            "taken back: equal answers"]  # fmt: skip
    return _table(head, rows) if rows else ""


def skipped(runs: list[Run]) -> list[str]:
    """Why methods have dashes."""
    found = {}
    for run in runs:
        if "skipped" in run:
            job = run["job"]
            found[f"{METHODS[job['method']].title}, {job['facts']:,} facts, {job['kind']}: {run['skipped']}"] = None
        reason = run.get("harness", {}).get("skipped")
        if reason:
            found[f"LM Evaluation Harness: {reason}"] = None
    return list(found)


def verdict(runs: list[Run], model: str, data: str) -> str:
    """One line: which method serves best for the most facts taught at once, and why."""
    lessons = [run for run in of_kind(runs, "lesson") if run["job"]["step"] == 0 and run["job"]["method"] != "base"]
    if not lessons:
        return f"No method was measured yet that teaches facts of {data} at once on {model}."
    facts = max(run["job"]["facts"] for run in lessons)
    by_method: dict[str, list[Run]] = {}
    for run in lessons:
        if run["job"]["facts"] == facts and "scores" in run:
            by_method.setdefault(run["job"]["method"], []).append(run)
    if not by_method:
        return f"No method could be taught {facts} facts of {data} on {model}."
    points = {name: fmean(overall(run["scores"])[0] for run in some) for name, some in by_method.items()}
    best = _quickest(points, by_method)
    others = {name: value for name, value in points.items() if name != best}
    line = f"Best for these {facts:,} facts of {data} on {model}: {METHODS[best].title}. {_why(by_method[best])}"
    if others:
        second = max(others, key=others.get)
        line += f" Overall {points[best]:.2f}; next {METHODS[second].title} {points[second]:.2f}."
    if not METHODS[best].weights:
        line += " Its facts must stay in every prompt"
        inside = {name: value for name, value in points.items() if METHODS[name].weights}
        name = _quickest(inside, by_method) if inside else None
        line += f"; in the weights: {METHODS[name].title}, {points[name]:.2f}." if name else "."
    return line


def _quickest(points: dict[str, float], by_method: dict[str, list[Run]]) -> str:
    """Of the methods whose overall score is about the best the one that teaches in the least time."""
    top = max(points.values())
    near = [name for name, value in points.items() if value >= top - _CLOSE]
    return min(near, key=lambda name: _mean(by_method[name], "seconds"))


def _why(some: list[Run]) -> str:
    parts = []
    for column, kind, what in (
        ("reliability", "contains", "answers {:.0%} of the questions"),
        ("generalisation", "contains", "{:.0%} of their other wordings"),
        ("locality", "same", "leaves {:.0%} of other answers as they were"),
        ("general", "known", "keeps {:.0%} of the general knowledge"),
    ):
        found = score(some, column, kind)
        if found is not None:
            parts.append(what.format(found[0]))
    return f"It {', '.join(parts)}, and takes {_mean(some, 'seconds'):.0f} seconds."


def report(found: dict[str, Any]) -> str:
    """The whole report, in Markdown."""
    runs, header = found["runs"], found["header"]
    parts = [
        verdict(runs, header["model"], header["data"]),
        "Free greedy answers; two figures are exact / contained, of locality the same answer / words in common.",
        scores_table(runs),
        "Teacher-forced (the right tokens before each are given, which no user does):",
        forced_table(runs),
    ]
    table = stability_table(runs)
    if table:
        parts += ["Three orders of the same facts, and one fact taken back against never taught:", table]
    parts += [f"- {reason}" for reason in skipped(runs)]
    return "\n\n".join(parts) + "\n"


def plot(runs: list[Run], path: Path) -> None:
    """Curves over the number of facts taught at once, one panel a metric, with 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lessons = [run for run in of_kind(runs, "lesson") if run["job"]["step"] == 0 and "scores" in run]
    panels = [(title, c, kinds[-1] if c not in ("locality",) else kinds[0]) for title, c, kinds in COLUMNS]
    panels = [panel for panel in panels if score(lessons, *panel[1:])]
    costs = [("perplexity of text over the base model's", "perplexity"), ("seconds of the lesson", "seconds"),
             ("peak memory of the lesson, MB", "memory_mb")]  # fmt: skip
    rows = -(-(len(panels) + len(costs)) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, 3.4 * rows + 0.6), layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab20")
    for number, method in enumerate(m for m in METHODS if any(run["job"]["method"] == m for run in lessons)):
        some = [run for run in lessons if run["job"]["method"] == method]
        sizes = sorted({run["job"]["facts"] for run in some})
        by_size = [[run for run in some if run["job"]["facts"] == size] for size in sizes]
        style = {
            "marker": "o",
            "ms": 4,
            "lw": 1.4,
            "color": colours(number),
            "label": METHODS[method].title.replace("`", ""),
        }
        for axis, (_, column, kind) in zip(axes.flat, panels, strict=False):
            values = [(size, score(part, column, kind)) for size, part in zip(sizes, by_size, strict=True)]
            values = [(size, *value) for size, value in values if value]
            if values:
                spans = list(zip(*(interval(value, count) for _, value, count in values), strict=True))
                axis.errorbar([v[0] for v in values], [v[1] for v in values], yerr=spans, capsize=2, **style)
        for axis, (_, name) in zip(axes.flat[len(panels) :], costs, strict=False):
            values = [(size, _mean(part, name)) for size, part in zip(sizes, by_size, strict=True)]
            values = [(size, value) for size, value in values if value and method != "base"]
            axis.plot([v[0] for v in values], [v[1] for v in values], **style)
    for axis, (title, *_) in zip(axes.flat, [*panels, *costs], strict=False):
        axis.set(title=title, xlabel="facts taught at once", xscale="log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[: len(panels)]:
        axis.set_ylim(-0.03, 1.03)
    for axis in axes.flat[len(panels) : len(panels) + len(costs)]:
        axis.set_yscale("log")
    for axis in axes.flat[len(panels) + len(costs) :]:
        axis.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)
