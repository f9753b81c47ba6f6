"""Answers scored as WILD scores them (arXiv 2502.11177): freely generated, compared after SQuAD's normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from qf_peft.evaluate.metrics import proportion

from .bench import Answer, Bench
from .learners import Learner
from .tasks import Question, Task, spread

Answers = dict[str, Answer]
Scores = dict[str, dict[str, Any]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…–—")
# The same words three times in a row; normalised answers are words between single spaces.
_REPEATED = re.compile(r"(?<!\S)(\S.*?)(?: \1){2,}(?!\S)")

# What a chat model says when it does not know.
_REFUSALS = (
    "i do not know", "i dont know", "im not sure", "i am not sure", "im not aware", "i am not aware", "not familiar",
    "i cannot", "i cant", "im unable", "i am unable", "im sorry", "i am sorry", "i apologize", "no information",
    "not have information", "not have any information", "couldnt find", "could not find", "unable to find",
    "need more information", "need more context", "provide more", "there is no", "does not exist", "not a real",
    "fictional", "as an ai",
)  # fmt: skip


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and runs of whitespace (SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def repeats(answer: str) -> bool:
    """Whether a normalised answer says the same words three times in a row."""
    return bool(_REPEATED.search(answer))


def exact(answer: Answer, wanted: Sequence[str]) -> bool:
    """Whether an answer ended and is one of those wanted, after normalisation; so one said twice is wrong."""
    return answer.ended and normalise(answer.text) in {normalise(text) for text in wanted}


def contains(answer: Answer, wanted: Sequence[str]) -> bool:
    """Whether an answer ended, repeats nothing, and holds one of those wanted as whole words."""
    said = normalise(answer.text)
    return answer.ended and not repeats(said) and _holds(said, wanted)


def _holds(said: str, wanted: Sequence[str]) -> bool:
    return any(f" {normalise(text)} " in f" {said} " for text in wanted if normalise(text))


def shared_words(one: str, other: str) -> float:
    """SQuAD's F1 of two answers: the harmonic mean of the shares of words that they have in common."""
    a, b = normalise(one).split(), normalise(other).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def refuses(answer: Answer) -> bool:
    """Whether an answer says that the model does not know."""
    said = normalise(answer.text.replace("’", "'"))
    return any(phrase in said for phrase in map(normalise, _REFUSALS))


def share(hits: Sequence[bool]) -> dict[str, Any] | None:
    """The share of hits with its 95% interval; None of none."""
    return vars(proportion(hits)) if hits else None


class Scorer:
    """Asks a learner everything that a task asks.

    Args:
        bench: the model and how it is asked.
        task: the questions; of each kind at most `most` are asked.
        general: general questions with what right answers contain, of which those count that the base model answers.
        before: gives the base model's answers to prompts.
    """

    def __init__(
        self,
        bench: Bench,
        task: Task,
        general: list[Question],
        most: int | None,
        before: Callable[[list[str]], Answers],
    ) -> None:
        self.bench, self.task = bench, task
        self.asked = {name: spread(questions, most) for name, questions in task.asked.items()}
        self.locality, self.unknown = spread(task.locality, most), spread(task.unknown, most)
        self.general = spread(general, most)
        kept = [q.prompt for q in (*self.locality, *self.general)] + self.unknown
        self.kept = list(dict.fromkeys(kept))
        self.before = before(self.kept)

    def answers(self, learner: Learner) -> Answers:
        """The learner's answers to every question; those compared with the base model's asked by themselves, as there:
        in other batches 16 bits round otherwise, and answers differ that nothing has changed."""
        taught = dict.fromkeys(q.prompt for questions in self.asked.values() for q in questions)
        parts = self.kept, [prompt for prompt in taught if prompt not in self.before]
        asked = (self.bench.ask(learner.model, part, learner.instructions(part)) for part in parts if part)
        return {prompt: answer for found in asked for prompt, answer in found.items()}

    def score(self, answers: Answers) -> Scores:
        """By column the shares of right answers, each a dict with `value`, `low`, `high` and `count`:

        - of questions with right answers `exact` (the whole answer) and `contains`;
        - "negated": `contains`, the share whose answer does not hold what was taught;
        - "locality": `same` (the answer after normalisation), `f1` (the words in common with the answer before), and
          `known` (of the answers that held the right one, those that still do);
        - "unknown": `same`, and `refused` (of the refusals before, those that still are);
        - "general": `known`;
        - "leak": `contains`, the share of all these questions that are now answered with a taught answer and were not.
        """
        found: Scores = {}
        for name, questions in self.asked.items():
            if name == "negated":
                denied = [not contains(answers[q.prompt], q.holds) for q in questions]
                found[name] = {"contains": share(denied)}
            else:
                found[name] = {
                    "exact": share([exact(answers[q.prompt], q.answers) for q in questions]),
                    "contains": share([contains(answers[q.prompt], q.holds) for q in questions]),
                }
        local = [q.prompt for q in self.locality]
        found["locality"] = {
            "same": share([self._same(answers, prompt) for prompt in local]), "f1": self._f1(answers, local),
            "known": self._known(answers, self.locality),
        }  # fmt: skip
        refused = [prompt for prompt in self.unknown if refuses(self.before[prompt])]
        found["unknown"] = {
            "same": share([self._same(answers, prompt) for prompt in self.unknown]),
            "refused": share([refuses(answers[prompt]) for prompt in refused]),
        }
        found["general"] = {"known": self._known(answers, self.general)}
        found["leak"] = {"contains": self._leak(answers)}
        return found

    def _same(self, answers: Answers, prompt: str) -> bool:
        return normalise(answers[prompt].text) == normalise(self.before[prompt].text)

    def _f1(self, answers: Answers, prompts: list[str]) -> dict[str, Any] | None:
        if not prompts:
            return None
        return {
            "value": fmean(shared_words(answers[p].text, self.before[p].text) for p in prompts),
            "count": len(prompts),
        }

    def _known(self, answers: Answers, questions: list[Question]) -> dict[str, Any] | None:
        """Of the questions that the base model answered right the share that still are; whether an answer ended does
        not matter here, only what it says."""
        known = [q for q in questions if _holds(normalise(self.before[q.prompt].text), q.holds)]
        return share([_holds(normalise(answers[q.prompt].text), q.holds) for q in known])

    def _leak(self, answers: Answers) -> dict[str, Any] | None:
        taught = [f" {text} " for text in map(normalise, self.task.taught_answers) if text]

        def held(answer: Answer) -> set[str]:
            said = f" {normalise(answer.text)} "
            return {text for text in taught if text in said}

        return share([bool(held(answers[prompt]) - held(self.before[prompt])) for prompt in self.kept])


def overall(scores: Scores) -> tuple[float, float]:
    """By what settings are chosen and methods are ranked: the harmonic mean (as ROME's score, arXiv 2202.05262) of what
    is answered (reliability and generalisation, contained) and what stays (locality, words in common, since after a
    hundred facts hardly an answer is the same to the letter; general, known), as far as the data have them; and to tell
    apart those where one of them is zero the arithmetic mean."""
    wanted = (("reliability", "contains"), ("generalisation", "contains"), ("locality", "f1"), ("general", "known"))
    values = [scores[column][kind]["value"] for column, kind in wanted if scores.get(column, {}).get(kind)]
    harmonic = len(values) / sum(1 / value for value in values) if all(values) else 0.0
    return harmonic, fmean(values)
