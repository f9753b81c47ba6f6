"""Contrasting rows: the taught ones with their names exchanged, whose predictions must stay.

What teaching endangers first is what is near in kind: the same question about another name, one that the model knows or
one that nobody knows. There the answer is begun as the taught one, up to the step that says what is new, and the keys
along it are preserved; and for some of them those along the model's own answer, which may begin otherwise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from ..data.rows import Encoder, Row, Text
from .constants import ANSWERED, ANSWERED_TOKENS

# Companies, people and places that language models have met often.
KNOWN_NAMES = (
    "Google", "IBM", "Sony", "Samsung", "Ford", "Disney", "Adobe", "Walmart", "Honda", "Siemens", "Nestle", "Lego",
    "Nintendo", "Volvo", "Canon", "Toyota", "Microsoft", "Amazon", "Coca-Cola", "General Motors", "Barack Obama",
    "Isaac Newton", "Marie Curie", "Elvis Presley", "Nelson Mandela", "Charles Dickens", "Michael Jackson",
    "Abraham Lincoln", "Albert Einstein", "Bob Dylan", "William Shakespeare", "Leonardo da Vinci", "France", "Japan",
    "Brazil", "London", "New York", "Harvard University",
)  # fmt: skip
_STARTS = (
    "Al An Ar Bal Ber Bran Cal Car Chal Cor Dal Del Dor El En Fal Fer Gal Gor Hal Har Il Jan Jol Kal Ken Lan Lin Mal "
    "Mer Mon Nal Nor Ol Or Pel Per Quin Ral Ren Sal Sel Stan Tal Ter Tur Ul Val Ven Wal Wil Yol Zal"
).split()
_ENDS = (
    "a ia o on en er is in ent ard eld ford ham ley ton ville mont bury dale wick stein berg aro ino ett ock und ax ix "
    "ica ora ano ius ova ekk"
).split()
# What sentences begin with, which is no name though it has a capital there.
_BEGINNINGS = frozenset(
    "a an the in on at of for from to by with and or if it its he his she her they their we our you your i my this "
    "that these those who whom whose what which where when why how is are was were do does did can could has have had "
    "there please tell give say name".split()
)
_WORD = re.compile(r"[^\W_][\w'’&.-]*[^\W_]|[^\W_]")


def row_names(row: Row) -> list[str]:
    """The names that a row is about: the longest runs of words with a capital or a digit in its prompt that stand in
    its completion or instruction too, but for abbreviations beside others. None in scripts without capitals."""
    prompt, others = _text(row.prompt), f"{row.completion or ''}\n{_text(row.instruction)}"
    found, run = [], []
    for word in [*_WORD.finditer(prompt), None]:
        named = word is not None and bool(re.search(r"[^\W\d_]", word[0])) and word[0] != word[0].lower()
        adjoining = run and word is not None and prompt[run[-1].end() : word.start()].isspace()
        adjoining = adjoining and not re.search(r"['’]s$", run[-1][0])
        if named and (not run or adjoining):
            run.append(word)
            continue
        found += _shared(prompt, run, others)
        run = [word] if named else []
    found = [name for name in dict.fromkeys(found) if name.lower() not in _BEGINNINGS]
    # "CEO" is no name, "IBM" may be one: abbreviations count where there is nothing else, and of these the last.
    return [name for name in found if name != name.upper()] or found[-1:]


def _shared(prompt: str, run: Sequence[re.Match], others: str) -> list[str]:
    """The longest part of a run of capitalised words that others hold, as a list of one or none."""
    parts = [(i, j) for i in range(len(run)) for j in range(i + 1, len(run) + 1)]
    for i, j in sorted(parts, key=lambda part: part[0] - part[1]):
        text = re.sub(r"['’]s$", "", prompt[run[i].start() : run[j - 1].end()])
        if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", others):
            return [text]
    return []


def contrast_rows(
    rows: Sequence[Row], begun: Sequence[str], encoder: Encoder, counts: Sequence[int], seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """For each row so many others with its names exchanged, two thirds for names that nobody knows (half of these
    invented, half other rows' names), a third for well-known ones. None is begun as another row's answer.

    Args:
        rows: what is taught.
        begun: for each row how its completion begins, up to what is new.
        encoder: its tokenizer's.
        counts: how many for each row.
        seed: of the choice.

    Returns:
        Their token ids; the last position that is read, the one before the last token, is the step that says what is
        new. And the token ids of the questions of every fourth of them (see `ANSWERED`).
    """
    names = [row_names(row) for row in rows]
    taught = sorted({name for found in names for name in found})
    prompts = {_text(row.prompt) for row in rows}
    r, made, asked, taken = random.Random(seed), [], [], {start for start in begun if start}
    for row, found, start, count in zip(rows, names, begun, counts, strict=True):
        for k in range(count if found else 0):
            text = {}
            for name in found:
                others = [other for other in taught if other not in found]
                if k % 3 == 2:
                    text[name] = r.choice(KNOWN_NAMES)
                elif k % 3 == 1 and others:
                    text[name] = r.choice(others)
                else:
                    text[name] = invented(name, r)
            if _exchanged(start, text) in taken - {start}:  # another row says what is new there
                text = {name: invented(name, r) for name in found}
            prompt = _exchanged(row.prompt, text)
            if _text(prompt) in prompts:
                continue
            other = replace(row, prompt=prompt, completion=_exchanged(start, text).strip() or None, significance=1.0)
            ids = encoder.prompt_ids(other, instructed=False)
            if other.completion is None:
                made.append([*ids, encoder.tokenizer.pad_token_id])
            else:
                made.append(encoder.answer_ids(other, ended=True)[0])
            if len(made) % ANSWERED == 1:  # none of those that are held out
                asked.append(ids)
    room = float("inf") if encoder.max_length is None else encoder.max_length
    return [ids for ids in made if len(ids) <= room], [ids for ids in asked if len(ids) + ANSWERED_TOKENS <= room]


def invented(name: str, r: random.Random) -> str:
    """A name of as many words that nobody knows; of several words the last stays half of the time."""
    words = name.split()
    kept = len(words) > 1 and r.random() < 0.5
    new = [r.choice(_STARTS) + (r.choice(_STARTS).lower() if r.random() < 0.4 else "") + r.choice(_ENDS) for _ in words]
    return " ".join([*new[:-1], words[-1]] if kept else new)


def _text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _exchanged(text: Text, names: dict[str, str]) -> Text:
    """Text, or messages, with names exchanged."""
    if not isinstance(text, str):
        return [{**message, "content": _exchanged(message["content"], names)} for message in text]
    for old, new in names.items():
        text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _, new=new: new, text)
    return text
