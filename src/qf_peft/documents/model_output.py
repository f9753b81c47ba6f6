"""What a model wrote when it was asked for questions: pairs and lists, whatever form they came in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_QUESTION_KEYS = ("question", "q", "prompt", "query")
_ANSWER_KEYS = ("answer", "a", "completion", "response")
_BULLET = r"[\s>*#\-•·]*(?:\(?\d{1,3}[.):]\s*)?[\s*_]*"
_ITEM = re.compile(r"^\s*(?:>\s*)?(?:[*\-•·]\s+|\(?\d{1,3}[.):]\s*)(.+)$")
_LABEL = r"\s*\d{0,3}[*_\s]*[:：.)]+[\s*_]*(.*)$"
_ASKED = re.compile(rf"^{_BULLET}(?:questions?|q|frage|pregunta|问题|问){_LABEL}", re.IGNORECASE)
_SAID = re.compile(rf"^{_BULLET}(?:answers?|a|antwort|réponse|respuesta|答案|答){_LABEL}", re.IGNORECASE)
_SPLIT_ANSWER = re.compile(r"\s(?:answer|a)\s*[:：]\s*", re.IGNORECASE)
_CLOSED = re.compile(r"^(.*?[?？])[\s*_\"”]*[-–—:：]*\s*(.*)$", re.DOTALL)


def parse_pairs(text: str, ended: bool = True) -> list[tuple[str, str]]:
    """Questions with their answers: JSON (also fenced, or cut off), `Q: … A: …`, or lists of questions ending in a
    question mark with the answer behind or below.

    Args:
        text: the model's output.
        ended: whether the model ended it itself; else the last pair, which may be cut, is left out.

    Returns:
        The pairs in order, each once; empty where there is nothing of these forms.
    """
    pairs = list(_json_pairs(text))
    if not pairs:
        pairs = _labelled(text) or _listed(text)
        if not ended:
            pairs = pairs[:-1]
    clean = [(_clean(question), _clean(answer)) for question, answer in pairs]
    return list(dict.fromkeys(pair for pair in clean if all(pair)))


def parse_questions(text: str, ended: bool = True) -> list[str]:
    """A list of questions: JSON strings, numbered or bulleted items, or lines. Introductions (lines that end with a
    colon) are left out, and the last item of an output that was cut."""
    found = [item for value in _json_values(text) for item in _strings(value)]
    if not found:
        lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("```")]
        items = [match.group(1) for line in lines if (match := _ITEM.match(line))]
        found = items or [line for line in lines if not line.rstrip().endswith((":", "："))]
        labels = [_ASKED.match(line) for line in found]
        found = [match.group(1) if match else line for match, line in zip(labels, found, strict=True)]
        if not ended:
            found = found[:-1]
    return [item for item in dict.fromkeys(_clean(item) for item in found) if item]


def _json_values(text: str) -> Iterator[Any]:
    """Every JSON list or object that is whole, outermost first: a list that was cut off yields its whole items."""
    decoder, at = json.JSONDecoder(), 0
    while match := re.compile(r"[\[{]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
            yield value
        except (ValueError, RecursionError):
            at = match.end()


def _json_pairs(text: str) -> Iterator[tuple[str, str]]:
    for value in _json_values(text):
        yield from _pairs_in(value)


def _pairs_in(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(v, str) for v in value):
            yield value[0], value[1]
        else:
            for item in value:
                yield from _pairs_in(item)
    elif isinstance(value, dict):
        lower = {str(key).strip().lower(): item for key, item in value.items()}
        question = next((lower[key] for key in _QUESTION_KEYS if key in lower), None)
        answer = next((lower[key] for key in _ANSWER_KEYS if key in lower), None)
        if isinstance(question, str) and isinstance(answer, (str, int, float)):
            yield question, str(answer)
        else:
            for item in value.values():
                yield from _pairs_in(item) if isinstance(item, (list, dict)) else ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def _labelled(text: str) -> list[tuple[str, str]]:
    """`Q: …` and `A: …`, on lines of their own or on one, answers perhaps over several lines."""
    pairs: list[list[str]] = []
    part = None  # of the last pair: what a further line belongs to
    for line in text.splitlines():
        if match := _ASKED.match(line):
            question, *answer = _SPLIT_ANSWER.split(match.group(1), maxsplit=1)
            pairs.append([question, *answer] if answer else [question, ""])
            part = 1 if answer else 0
        elif (match := _SAID.match(line)) and pairs:
            if not pairs[-1][1]:
                pairs[-1][1] = match.group(1)
            part = 1
        elif not line.strip() or line.strip().startswith("```"):
            part = None if pairs and pairs[-1][1] else part
        elif part is not None:
            pairs[-1][part] = f"{pairs[-1][part]} {line.strip()}".strip()
    return [(question, answer) for question, answer in pairs]


def _listed(text: str) -> list[tuple[str, str]]:
    """Items that are a question up to its mark and an answer behind it or on the lines below."""
    pairs: list[list[str]] = []
    for line in text.splitlines():
        bare = re.sub(rf"^{_BULLET}", "", line).strip()
        if not bare or bare.startswith("```"):
            continue
        if match := _CLOSED.match(bare):
            pairs.append([match.group(1), match.group(2)])
        elif pairs and not pairs[-1][1]:
            marked = _SAID.match(line)
            pairs[-1][1] = marked.group(1) if marked else bare
    return [(question, answer) for question, answer in pairs]


def _clean(text: str) -> str:
    """Without emphasis, quotation marks around it and runs of whitespace."""
    text = " ".join(re.sub(r"\*\*|__|`", "", text).split()).strip("*_ ")
    for left, right in ('""', "''", "“”", "«»", "„“"):
        if len(text) > 1 and text[0] == left and text[-1] == right:
            text = text[1:-1].strip()
    return text.rstrip(",").strip()
