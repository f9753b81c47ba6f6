"""Methods that put facts into the prompt and leave the weights alone: all of them, or those that a search finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bench import Bench, Unfit
from .learners import Learner, Rows

_ROOM = 256  # tokens left for a question and its answer
_BRIEF = "Answer with the answer alone, in as few words as possible."


def _instruction(facts: Sequence[str], brief: bool) -> str:
    """The system message that holds facts."""
    lines = "\n".join(f"- {fact}" for fact in facts)
    return f"You know these facts:\n{lines}" + (f"\n{_BRIEF}" if brief else "")


class InContext(Learner):
    """All facts in the system message, while they fit into the model's window.

    Setting:
        brief: whether the model is asked to answer with the bare answer.
    """

    def __init__(self, bench: Bench, preserved: list[Any] | None = None, brief: bool = False) -> None:
        super().__init__(bench, preserved, brief=brief)
        self.brief = brief
        self.rows: Rows = []

    def learn(self, rows: Rows) -> None:
        self.rows = [*self.rows, *rows]
        used = len(self.bench.prompt_ids("?", _instruction(self.facts(), self.brief)))
        if self.bench.window is not None and used + _ROOM > self.bench.window:
            raise Unfit(f"{len(self.rows)} facts take {used} tokens; the model's window has {self.bench.window}")

    def forget(self, row: dict[str, Any]) -> None:
        self.rows = [other for other in self.rows if other["prompt"] != row["prompt"]]

    def facts(self) -> list[str]:
        """What was taught, as statements. Instructions that are chats are joined."""
        return [
            text if isinstance(text, str) else " ".join(message["content"] for message in text)
            for text in (row["instruction"] for row in self.rows)
        ]

    def instructions(self, prompts: Sequence[str]) -> list[str | None]:
        return [_instruction(self.facts(), self.brief)] * len(prompts) if self.rows else [None] * len(prompts)


class Retrieval(InContext):
    """The facts found by BM25 (the library bm25s) in the system message; nothing where no word of a question is found.

    Settings:
        top: the most facts put into a prompt.
        brief: as in context.
    """

    def __init__(self, bench: Bench, preserved: list[Any] | None = None, top: int = 3, brief: bool = False) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise Unfit('retrieval needs bm25s: pip install ".[examples]"') from error
        super().__init__(bench, preserved, brief=brief)
        self.bm25, self.top, self.index = bm25s, top, None

    def learn(self, rows: Rows) -> None:
        self.rows = [*self.rows, *rows]
        self._index()

    def forget(self, row: dict[str, Any]) -> None:
        super().forget(row)
        self._index()

    def _index(self) -> None:
        """Index all facts anew; there is no index of facts without words to search by."""
        self.index, words = None, self._words(self.facts()) if self.rows else None
        if words is not None and any(words.ids):
            self.index = self.bm25.BM25()
            self.index.index(words, show_progress=False)

    def _words(self, texts: Sequence[str]) -> Any:
        return self.bm25.tokenize(list(texts), stopwords="en", show_progress=False)

    def instructions(self, prompts: Sequence[str]) -> list[str | None]:
        if self.index is None or not prompts:
            return [None] * len(prompts)
        facts, count = self.facts(), min(self.top, len(self.rows))
        nearest, scores = self.index.retrieve(self._words(prompts), k=count, show_progress=False)
        found = []
        for numbers, values in zip(nearest.tolist(), scores.tolist(), strict=True):
            best = [facts[n] for n, value in zip(numbers, values, strict=True) if value > 0]
            found.append(_instruction(best, self.brief) if best else None)
        return found
