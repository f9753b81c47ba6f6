"""A conversation with a session's model, and what of it is to be taught. Terminal chat and page share it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..data.rows import Text
from .session import Session

_ROOM = 128  # tokens for an answer, for which old exchanges are left out


@dataclass
class Exchange:
    """A question and the model's answer, perhaps broken off."""

    question: str
    answer: str


class Conversation:
    """Exchanges with the model, which sees those before when it answers.

    What was taught leaves the conversation, so that the answers to come are from the weights and not read above. A
    model without a chat template sees each question alone.
    """

    def __init__(self, session: Session, exchanges: list[Exchange] | None = None) -> None:
        self.session = session
        self.exchanges = exchanges if exchanges is not None else []

    def say(self, question: str, *, adapter: bool = True, max_new_tokens: int = 256) -> Iterator[str]:
        """The model's answer, in pieces; what of it has come is kept, also if it is broken off.

        Raises:
            ValueError: the question is empty or too long for the model.
        """
        pieces = self.session.stream(self._prompt(question), adapter=adapter, max_new_tokens=max_new_tokens)
        exchange = Exchange(question, "")
        self.exchanges.append(exchange)
        try:
            for piece in pieces:
                exchange.answer += piece
                yield piece
        finally:
            pieces.close()  # which stops the model
            exchange.answer = exchange.answer.strip()

    def teach(self, instruction: str = "", answer: str = "") -> dict[str, float]:
        """Teach something out of the conversation:

        - the `instruction`: the last question gets the answer that the model gives with the instruction in context;
        - the `answer`: the last question gets exactly this one;
        - neither: the last message corrected the answer before it; the question before it gets the answer that the
          model gives with question and correction in context.

        Returns:
            What [`QFTrainer.train`] returns.

        Raises:
            ValueError: there is no such question or correction, or the lesson cannot be taught.
        """
        if not self.exchanges:
            raise ValueError("nothing has been asked yet: ask the question first, so that it is clear what to teach")
        exchanges = self.exchanges[-1:]
        question = exchanges[0].question
        if not instruction and not answer:
            exchanges = self.exchanges[-2:]
            question, correction = exchanges[0].question, exchanges[-1].question
            if len(exchanges) < 2 or correction.rstrip().endswith("?"):
                raise ValueError("your last message corrects no answer: say what is right first, or with the command")
            instruction = f"{question} {correction}"
        metrics = self.session.teach(instruction=instruction or answer, prompt=question, completion=answer or None)
        del self.exchanges[-len(exchanges) :]
        return metrics

    def _prompt(self, question: str) -> Text:
        """The question with as many of the last exchanges before it as leave room for an answer."""
        if not self.session.trainer.encoder.chat:
            return question
        for first in range(len(self.exchanges) + 1):
            messages = []
            for exchange in self.exchanges[first:]:
                messages.append({"role": "user", "content": exchange.question})
                messages.append({"role": "assistant", "content": exchange.answer})
            messages.append({"role": "user", "content": question})
            if question.strip() and self.session.room(messages) >= _ROOM:
                return messages
        return question


def printable(text: str) -> str:
    """Text without control characters, which could move a terminal's cursor or change its title; line breaks and tabs
    stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)
