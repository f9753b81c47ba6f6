"""From a dataset's row to token ids: the context pass's and the bare pass's, the taught positions, the significance."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, str]
Text = str | Sequence[Message]

FIELDS = ("instruction", "prompt", "completion", "significance", "messages", "wordings")
# Columns that other parts of the package or common datasets use: not misspelt.
_KNOWN = (*FIELDS, "paraphrases", "id", "text", "source", "question", "answer")
_SENTINEL = "\u2060qf\u2060"  # stands for the completion while the chat template is asked what surrounds it


@dataclass(frozen=True)
class Row:
    """One piece of knowledge, checked."""

    index: int
    """Its place in the dataset, from 0."""
    instruction: Text
    """What the model should do or know: a string, or the messages before the prompt."""
    prompt: Text
    completion: str | None
    """None: the model answers in context."""
    significance: tuple[float, ...] | float = 1.0
    """How much each whitespace-separated word of the completion counts, or all of them."""
    wordings: tuple[str, ...] = ()
    """Other wordings of the prompt (of its last message), taught along."""
    standing: bool = False
    """Whether it was taught before as an example of a standing instruction."""
    date: str = ""
    """When it was taught before, if it was."""
    settled: bool = False
    """Whether it was taught before others changed the adapter's weights, so that it is part of what they hold."""


@dataclass(frozen=True)
class Example:
    """A row as token ids. Both sequences end with the same `len(significance)` tokens, which are those predicted."""

    context_ids: list[int]
    """Instruction + prompt + completion + end of turn."""
    bare_ids: list[int]
    """Prompt + completion + end of turn."""
    significance: list[float]
    """Of the taught positions in order: the last `len(significance)` steps, each of which predicts the next token."""
    header: int = 0
    """How many of them, the first ones, predict the assistant header, which at inference is given and not predicted."""

    @property
    def taught(self) -> int:
        """The number of taught positions."""
        return len(self.significance)

    @property
    def targets(self) -> list[int]:
        """The tokens that the taught positions predict."""
        return self.bare_ids[-self.taught :]


def read_rows(dataset: Iterable[Mapping[str, Any]], name: str = "train_dataset") -> list[Row]:
    """Check a dataset's rows: dicts with `instruction`, `prompt` and `completion`, or with `messages`.

    Raises:
        ValueError: there are no rows, or a column is missing or misspelt, empty or of the wrong form. The message names
            the row and the column.
    """
    if isinstance(dataset, (str, bytes, Mapping)) or not isinstance(dataset, Iterable):
        raise ValueError(f"{name} is a {type(dataset).__name__}; expected a list of dicts or a datasets.Dataset")
    rows = []
    for index, raw in enumerate(dataset):
        where = f"{name}, row {index}"
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where} is a {type(raw).__name__}; expected a dict")
        row = {key: value for key, value in raw.items() if value is not None}
        for key in row:
            close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.8)
            if key not in _KNOWN and close:
                raise ValueError(f"{where}: unknown column {key!r}; did you mean {close[0]!r}?")
        rows.append(_from_messages(row, index, where) if "messages" in row else _from_columns(row, index, where))
    if not rows:
        raise ValueError(f"{name} is empty; give at least one row with 'instruction', 'prompt' and 'completion'")
    return rows


def _from_columns(row: Mapping[str, Any], index: int, where: str) -> Row:
    for key in ("instruction", "prompt"):
        if key not in row:
            raise ValueError(
                f"{where}: no column {key!r} (it has {sorted(row)}); a row needs 'instruction' and 'prompt', and a "
                "'completion' unless the model shall answer itself; or else 'messages'"
            )
    completion = row.get("completion")
    if completion is not None and not isinstance(completion, str):
        messages = read_messages(completion, f"{where}: completion")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise ValueError(
                f"{where}: completion has the roles {[m['role'] for m in messages]}; expected one assistant message"
            )
        completion = messages[0]["content"]
    texts = {}
    for key in ("instruction", "prompt"):
        value = row[key]
        texts[key] = value if isinstance(value, str) else read_messages(value, f"{where}: {key}")
        if not (value.strip() if isinstance(value, str) else value):
            raise ValueError(f"{where}: {key} is empty")
    return _checked(index, texts["instruction"], texts["prompt"], completion, row, where)


def _from_messages(row: Mapping[str, Any], index: int, where: str) -> Row:
    messages = read_messages(row["messages"], f"{where}: messages")
    instruction = [m for m in messages if m["role"] == "system"]
    if len(instruction) != 1 or messages[0]["role"] != "system":
        raise ValueError(f"{where}: messages must begin with one system message, the instruction to be taught")
    completion = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if len(messages) < 2:
        raise ValueError(f"{where}: messages has no prompt between the system message and the last assistant message")
    text = instruction[0]["content"]
    if not text.strip():
        raise ValueError(f"{where}: the system message (the instruction) is empty")
    return _checked(index, text, messages[1:], completion, row, where)


def _checked(
    index: int, instruction: Text, prompt: Text, completion: str | None, raw: Mapping[str, Any], where: str
) -> Row:
    significance, wordings = raw.get("significance", 1.0), raw.get("wordings", ())
    if isinstance(wordings, str) or not isinstance(wordings, Iterable):
        raise ValueError(f"{where}: wordings is a {type(wordings).__name__}; expected a list of strings")
    wordings = tuple(dict.fromkeys(wordings))
    for wording in wordings:
        if not isinstance(wording, str) or not wording.strip():
            raise ValueError(f"{where}: wordings holds {wording!r}; expected other wordings of the prompt, as strings")
    if completion is not None:
        completion = completion.strip()
        if not completion:
            raise ValueError(f"{where}: completion is empty; leave the column out to let the model answer in context")
    many = isinstance(significance, Sequence) and not isinstance(significance, str)
    values = tuple(significance) if many else (significance,)
    for value in values:
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: significance {value!r} is not a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{where}: significance {value!r}; expected a finite number from 0 up")
    if not any(values):
        raise ValueError(f"{where}: significance is all zero, so nothing would be taught; leave the row out instead")
    if many:
        words = len(completion.split()) if completion is not None else None
        if words is None:
            raise ValueError(f"{where}: significance per word needs a completion; give one number instead")
        if len(values) != words:
            raise ValueError(
                f"{where}: significance has {len(values)} numbers; the completion has {words} words between whitespace"
            )
    return Row(index, instruction, prompt, completion, values if many else float(values[0]), wordings)


def text_of(part: Text) -> str:
    """An instruction or prompt on one line, for lists."""
    if not isinstance(part, str):
        part = " / ".join(f"{message['role']}: {message['content']}" for message in part)
    return " ".join(part.split())


def read_messages(value: Any, where: str) -> list[dict[str, str]]:
    """Check a list of chat messages with text in them; `where` names it in errors."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{where} is a {type(value).__name__}; expected a string or a list of messages")
    out = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: {message!r} is not a message; expected {{'role': …, 'content': …}}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: the content of a {message['role']} message is not a string")
        out.append({"role": message["role"], "content": message["content"]})
    if not out:
        raise ValueError(f"{where} is empty")
    return out


class Encoder:
    """Turns rows into token ids with one tokenizer, in its chat template if it has one, else as plain text.

    Plain text (base models): the instruction on a line of its own before the prompt, the completion after a space.

    Args:
        tokenizer: the model's tokenizer, or a processor that has one.
        max_length: the model's number of positions, if limited.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "processing_class has no padding token, which batches need; set it first, for instance "
                "`tokenizer.pad_token = tokenizer.eos_token`"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def chat(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def prompt_ids(self, row: Row, instructed: bool) -> list[int]:
        """The prompt as the model meets it at inference, up to where its answer begins; with or without instruction."""
        return self._prompt(row, instructed)[1]

    def encode(self, row: Row) -> Example:
        """The row's two sequences and taught positions; its completion must be known.

        The taught positions are the steps that predict the assistant header after its first token, the completion and
        the end-of-turn token, as in the paper's reference code; where the template has no header (or there is no
        template), the steps that predict the completion and what ends it.

        Raises:
            ValueError: the template cannot express the row, or the row is too long for the model.
        """
        context, bare = self._sequence(row, True), self._sequence(row, False)
        if context[1:] != bare[1:]:
            raise ValueError(
                f"row {row.index}: the completion is not tokenised alike with and without the instruction; begin it "
                "with a letter, or give the instruction as messages"
            )
        if self.max_length is not None and len(context[0]) > self.max_length:
            raise ValueError(
                f"row {row.index} has {len(context[0])} tokens with its instruction; the model has {self.max_length} "
                "positions: shorten it or split it into several rows"
            )
        return Example(context[0], bare[0], bare[2], bare[3])

    def answer_ids(self, row: Row, ended: bool) -> tuple[list[int], int]:
        """A row's bare sequence and the number of steps that predict its completion (and the end, if it `ended`)."""
        _, prompt_ids, _ = self._prompt(row, False)
        ids, *_ = self._sequence(row, False)
        ids = ids if ended else ids[:-1]
        return ids, len(ids) - len(prompt_ids)

    def text_ids(self, text: str) -> tuple[list[int], int]:
        """A plain text's sequence and the number of its steps."""
        ids = self.tokenizer(text)["input_ids"]
        if self.max_length is not None:
            ids = ids[: self.max_length]
        return ids, len(ids) - 1

    def user_opening(self, instruction: Text = "") -> list[int] | None:
        """The token ids after which a user's turn begins, behind the instruction if there is one; None without a chat
        template."""
        if not self.chat:
            return None
        row = Row(0, instruction, _SENTINEL, None)
        messages = _conversation(row, bool(instruction))
        opening, found, _ = self._render(row, messages, bool(instruction)).partition(_SENTINEL)
        ids = self._ids(opening)
        return ids if found and ids else None

    def identity(self) -> list[str]:
        """What makes this encoder's output: the template and a sample of its vocabulary."""
        return [
            str(getattr(self.tokenizer, "chat_template", None)),
            str(len(self.tokenizer)),
            str(self._ids("Qi, 2507")),
        ]

    def _sequence(self, row: Row, instructed: bool) -> tuple[list[int], list[int], list[float], int]:
        """Token ids; the tokens predicted at taught positions; their significance; how many of them are header."""
        prompt_text, prompt_ids, header = self._prompt(row, instructed)
        lead, completion, tail = self._surroundings(row, instructed, prompt_text)
        text = lead + completion + tail
        ids, spans = self._continuation(prompt_text, prompt_ids, text)
        begin, end = len(lead), len(lead) + len(completion)
        inside = [i for i, (_, stop) in enumerate(spans) if stop > end]
        # Of what follows the completion only the token that ends the turn is taught, not the line break behind it.
        specials = set(self.tokenizer.all_special_ids)
        close = next((i for i in inside if ids[i] in specials), None)
        if close is not None:
            ids, spans = ids[: close + 1], spans[: close + 1]
        elif self.tokenizer.eos_token_id is not None:
            keep = len(spans) - len(inside)
            ids, spans = [*ids[:keep], self.tokenizer.eos_token_id], [*spans[:keep], (end, end)]
        weights = _word_weights(row, completion)
        significance = [1.0] * max(header - 1, 0)
        for start, stop in spans:
            covered = weights[max(start - begin, 0) : stop - begin] if stop > begin and start < end else []
            words = [w for w in covered if w is not None]
            significance.append(words[0] if words else 1.0)
        targets = prompt_ids[len(prompt_ids) - max(header - 1, 0) :] + ids
        return prompt_ids + ids, targets, significance, max(header - 1, 0)

    def _prompt(self, row: Row, instructed: bool) -> tuple[str, list[int], int]:
        """The prompt's text, its token ids and how many of them are the assistant header."""
        if not self.chat:
            for key in ("instruction", "prompt"):
                if not isinstance(getattr(row, key), str):
                    raise ValueError(
                        f"row {row.index}: {key} is a list of messages, but the tokenizer has no chat template; give a "
                        "string"
                    )
            text = f"{row.instruction.rstrip()}\n{row.prompt}" if instructed else row.prompt
            ids = self.tokenizer(text)["input_ids"]
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            return text, ids, 0
        messages = _conversation(row, instructed)
        text = self._render(row, messages, instructed, add_generation_prompt=True)
        ids = self._ids(text)
        before = self._ids(self._render(row, messages, instructed, add_generation_prompt=False))
        header = len(ids) - len(before) if ids[: len(before)] == before else 0
        return text, ids, header

    def _surroundings(self, row: Row, instructed: bool, prompt_text: str) -> tuple[str, str, str]:
        """What the template writes between prompt and completion, the completion, and what it writes after it."""
        completion = row.completion
        if not self.chat:
            glue = "" if prompt_text[-1:].isspace() else " "
            return glue, completion, ""
        messages = [*_conversation(row, instructed), {"role": "assistant", "content": _SENTINEL}]
        before, found, after = self._render(row, messages, instructed).partition(_SENTINEL)
        if not found:
            raise ValueError(f"row {row.index}: the chat template does not show the assistant's message")
        lead = before[len(prompt_text) :] if before.startswith(prompt_text) else ""
        return lead, completion, after

    def _continuation(
        self, prompt_text: str, prompt_ids: list[int], text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` behind the prompt, and each token's span of characters in `text`."""
        fast = self.tokenizer.is_fast
        if fast:
            whole = self.tokenizer(prompt_text + text, add_special_tokens=not self.chat, return_offsets_mapping=True)
            n, shift = len(prompt_ids), len(prompt_text)
            spans = [(a - shift, b - shift) for a, b in whole["offset_mapping"]]
            if spans and spans[-1][1] < len(text):  # a tokenizer that closes every text with a special token
                spans.pop()
            if whole["input_ids"][:n] == prompt_ids and len(spans) > n:
                return whole["input_ids"][n : len(spans)], spans[n:]
            alone = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return alone["input_ids"], [tuple(span) for span in alone["offset_mapping"]]
        ids = self._ids(text)
        ends = [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        return ids, list(zip([0, *ends[:-1]], ends, strict=True))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, row: Row, messages: list[dict[str, str]], instructed: bool, **kwargs: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception as error:  # a template raises whatever it likes
            raise ValueError(f"row {row.index}: {_no_role(messages)} ({error})") from error
        first = messages[0]["content"].strip()
        if instructed and first and first not in text:
            raise ValueError(f"row {row.index}: {_no_role(messages)} (it leaves its text out)")
        return text


def _no_role(messages: list[dict[str, str]]) -> str:
    roles = [m["role"] for m in messages]
    return (
        f"the tokenizer's chat template does not take the roles {roles}; if it has no system role, give the "
        "instruction as a list of messages it takes, such as [{'role': 'user', 'content': …}, {'role': 'assistant', "
        "'content': 'I see.'}]"
    )


def _conversation(row: Row, instructed: bool) -> list[dict[str, str]]:
    """The messages before the completion. An instruction joins a system message that the prompt already has."""
    prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else [dict(m) for m in row.prompt]
    if not instructed:
        return prompt
    if not isinstance(row.instruction, str):
        return [*(dict(m) for m in row.instruction), *prompt]
    system = row.instruction
    if prompt[0]["role"] == "system":
        own = prompt.pop(0)["content"].strip()
        system = f"{system}\n\n{own}" if own else system
    return [{"role": "system", "content": system}, *prompt]


def _word_weights(row: Row, completion: str) -> list[float | None]:
    """The significance of each character's word; None for whitespace."""
    weights: list[float | None] = [None] * len(completion)
    for k, word in enumerate(re.finditer(r"\S+", completion)):
        value = row.significance[k] if isinstance(row.significance, tuple) else row.significance
        weights[word.start() : word.end()] = [value] * (word.end() - word.start())
    return weights
