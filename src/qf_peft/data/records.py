"""Records of knowledge editing benchmarks, and requests to editors, as rows to teach and questions to ask.

Field names follow ROME's and MEMIT's repositories (CounterFact, zsRE), EasyEdit's loaders (KnowEdit, requests), and the
published files of QAEdit, WikiBigEdit and MQuAKE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers.utils import logging

from .record_parts import Part, first_of, read_records

logger = logging.get_logger(__name__)

_TOPIC_QUESTIONS = ("What do you think of {}?", "What is your opinion of {}?", "How do you view {}?")


class Edits(NamedTuple):
    """What a benchmark's records hold, in the forms that `QFTrainer` takes."""

    rows: list[dict[str, Any]]
    """For `train_dataset`: `instruction` (prompt and target as one statement), `prompt`, `completion` (the target) and
    `paraphrases` where the record has any."""
    locality: list[dict[str, str]]
    """For `evaluate(locality=)`: `prompt`, and the benchmark's `answer` where it gives one. It is not compared: these
    answers are single words, which no chat model says alone, so that locality counts answers that did not change."""
    portability: list[dict[str, str]]
    """Questions that follow from an edit, as rows: `QFTrainer(..., train_dataset=portability).evaluate()` gives
    `recall`, and `in_context` as its ceiling. The completion is the first of the answers that the record allows."""


def _statement(prompt: str, target: str) -> str:
    return f"{prompt} {target}" + ("" if target[-1] in ".!?" else ".")


def _row(prompt: str, target: str, paraphrases: Iterable[str] = (), instruction: str | None = None) -> dict[str, Any]:
    row = {"instruction": instruction or _statement(prompt, target), "prompt": prompt, "completion": target}
    others = [text for text in dict.fromkeys(paraphrases) if text != prompt]
    return {**row, "paraphrases": others} if others else row


def _collected(found: Iterable[tuple[dict[str, Any] | None, list[dict[str, str]], list[dict[str, str]]]]) -> Edits:
    """All records' rows and questions. Locality questions that some record edits, or that repeat, are left out."""
    rows, locality, portability = [], {}, []
    for row, kept, following in found:
        if row is not None:
            rows.append(row)
        locality.update((question["prompt"], question) for question in kept)
        portability += following
    for row in rows:
        for prompt in (row["prompt"], *row.get("paraphrases", ())):
            locality.pop(prompt, None)
    return Edits(rows, list(locality.values()), portability)


def rows_from_counterfact(records: Iterable[Mapping[str, Any]]) -> Edits:
    """CounterFact (ROME, arXiv 2202.05262; also MEMIT's multi_counterfact): the rewrite, its `paraphrase_prompts`, and
    the `neighborhood_prompts` as locality. `generation_prompts` have no right answer and are not used.

    Args:
        records: dicts with `requested_rewrite` (`prompt` with `{}` for the `subject`, `target_new.str`,
            `target_true.str`), `paraphrase_prompts` and `neighborhood_prompts`.

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
    """

    def convert(record: Part) -> tuple:
        rewrite = record.part("requested_rewrite")
        prompt, target = _filled(rewrite), rewrite.text("target_new")
        answer = {"answer": rewrite.text("target_true")} if "target_true" in rewrite else {}
        kept = [{"prompt": text, **answer} for text in record.texts("neighborhood_prompts")]
        return _row(prompt, target, record.texts("paraphrase_prompts")), kept, []

    return _collected(map(convert, read_records(records, "CounterFact")))


def _filled(rewrite: Part) -> str:
    prompt = rewrite.text("prompt")
    if "{}" not in prompt:
        raise ValueError(f"{rewrite.name('prompt')} is {prompt!r}; expected '{{}}' in it, for the subject")
    return prompt.replace("{}", rewrite.text("subject"))


def rows_from_zsre(records: Iterable[Mapping[str, Any]], target: Literal["alt", "answers"] = "alt") -> Edits:
    """zsRE as MEND prepared it (arXiv 2110.11309): `src` is the prompt, `rephrase` its paraphrase, `loc` with `loc_ans`
    the locality question, without its "nq question:".

    Args:
        records: dicts with `src`, `alt` or `answers`, `rephrase`, `loc` and `loc_ans`.
        target: what is taught: "alt", another answer than the right one (MEND, EasyEdit), or the first of the right
            "answers" (ROME, MEMIT).

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
            Records with an empty `alt`, which the dataset has, are left out; a warning says how many.
    """
    if target not in ("alt", "answers"):
        raise ValueError(f"zsRE: target={target!r}; expected 'alt' or 'answers'")
    without = []

    def convert(record: Part) -> tuple:
        if target == "alt" and record.value.get("alt") == "":
            without.append(record)
            return None, [], []
        kept = []
        if "loc" in record:
            question = record.text("loc").removeprefix("nq question:").strip()
            question += "" if question.endswith("?") else "?"
            kept.append({"prompt": question, "answer": record.text("loc_ans")})
        return _row(record.text("src"), record.text(target), record.texts("rephrase")), kept, []

    edits = _collected(map(convert, read_records(records, "zsRE")))
    if without:
        logger.warning(f"{len(without)} records have an empty 'alt' and are left out ({without[0].where} is the first)")
    return edits


def rows_from_qaedit(records: Iterable[Mapping[str, Any]]) -> Edits:
    """QAEdit (WILD, arXiv 2502.11177): questions with right answers, each with one `rephrase` and several unrelated
    questions in `locality`.

    Args:
        records: dicts with `prompt`, `target`, `rephrase` and `locality`, a list of dicts with `loc` and `loc_ans`.

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
    """

    def convert(record: Part) -> tuple:
        kept = [one for group in record.parts("locality") for one in _questions(group, "loc", "loc_ans")]
        return _row(record.text("prompt"), record.text("target"), record.texts("rephrase")), kept, []

    return _collected(map(convert, read_records(records, "QAEdit")))


def rows_from_wikibigedit(records: Iterable[Mapping[str, Any]]) -> Edits:
    """WikiBigEdit (arXiv 2503.05683): the question `update` with its answer `ans`, its `rephrase` and the wording
    `personas` as paraphrases, `loc` as locality, and the question over two facts `mhop` as portability.

    Args:
        records: dicts with `update` and `ans`, and perhaps `rephrase`, `personas`, `loc`, `loc_ans`, `mhop` and
            `mhop_ans`.

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
    """

    def convert(record: Part) -> tuple:
        prompt, target = record.text("update"), record.text("ans")
        kept = _questions(record, "loc", "loc_ans") if "loc" in record else []
        following = []
        if "mhop" in record and "mhop_ans" in record:
            statement = _statement(prompt, target)
            following = [_following(statement, record.text("mhop"), record.text("mhop_ans"))]
        return _row(prompt, target, [*record.texts("rephrase"), *record.texts("personas")]), kept, following

    return _collected(map(convert, read_records(records, "WikiBigEdit")))


def rows_from_mquake(records: Iterable[Mapping[str, Any]]) -> Edits:
    """MQuAKE (arXiv 2305.14795): every rewrite of a record is a row, asked by its `question`; the questions over
    several facts are portability. A record that contradicts one before it is left out.

    Args:
        records: dicts with `requested_rewrite`, a list of dicts with `prompt` (with `{}` for the `subject`),
            `target_new.str` and perhaps `question`; and `questions` with their `new_answer`.

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
    """
    known: dict[str, str] = {}  # records share rewrites
    found = []
    for record in read_records(records, "MQuAKE"):
        rows = []
        for rewrite in record.parts("requested_rewrite"):
            cloze, target = _filled(rewrite), rewrite.text("target_new")
            question = rewrite.text("question") if "question" in rewrite else cloze
            rows.append(_row(question, target, instruction=_statement(cloze, target)))
        if not rows:
            record.part("requested_rewrite")  # says that it is missing
        statements, answer = " ".join(row["instruction"] for row in rows), record.text("new_answer")
        following = [_following(statements, question, answer) for question in record.texts("questions")]
        if any(known.get(row["prompt"], row["completion"]) != row["completion"] for row in rows):
            continue
        found += [(row, [], []) for row in rows if row["prompt"] not in known]
        found.append((None, [], following))
        known.update((row["prompt"], row["completion"]) for row in rows)
    return _collected(found)


def _following(instruction: str, prompt: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "prompt": prompt, "completion": answer}


def rows_from_knowedit(
    records: Iterable[Mapping[str, Any]] | Mapping[str, Any], sentiment: Literal["pos", "neg"] = "pos"
) -> Edits:
    """KnowEdit (arXiv 2401.01286), any of its six parts, told apart by their fields:

    - WikiData_recent, WikiData_counterfact, ZsRE: `prompt`, `target_new`, `rephrase_prompt` or `rephrase`, `locality`
      and `portability` (dicts of lists of `prompt` with `ground_truth`);
    - WikiBio: `text`, the sentence `labels` that should follow it, `concept`, `locality`;
    - ConvSent: the topic `ent` and what was said of it, `pos` and `neg`; one saying of the chosen sentiment is taught,
      with an instruction to speak of the topic so. Ask for its spread by eye: `recall` counts the saying word for word;
    - Sanitation: one dict with `success` (or `K_F`, to be forgotten) and `locality` (or `K_R`, to be kept), lists of
      `question`, `ground_truth` and `target_new`: a refusal is taught.

    Args:
        records: what `json.load` gives of a file.
        sentiment: of ConvSent, which to teach.

    Raises:
        ValueError: a record lacks a field or has another type in it; the message names the record and the field.
    """
    if sentiment not in ("pos", "neg"):
        raise ValueError(f"KnowEdit: sentiment={sentiment!r}; expected 'pos' or 'neg'")
    if isinstance(records, Mapping):
        return _sanitation(Part(records, "KnowEdit (Sanitation)"))

    def convert(record: Part) -> tuple:
        if "ent" in record:
            topic = record.text("ent")
            how = "with approval" if sentiment == "pos" else "with disapproval"
            first, *others = (question.format(topic) for question in _TOPIC_QUESTIONS)
            return _row(first, record.text(sentiment), others, f"Speak of {topic} {how}."), [], []
        if "labels" in record:
            return _row(record.text("text"), record.text("labels")), list(_grouped(record, "locality")), []
        return _request(record)

    return _collected(map(convert, read_records(records, "KnowEdit")))


def _sanitation(record: Part) -> Edits:
    forget, keep = ("K_F", "K_R") if "K_F" in record else ("success", "locality")
    if forget not in record:
        raise ValueError(f"{record.where}: expected a list of records, or of Sanitation a dict with 'success' or 'K_F'")

    def convert(record: Part) -> tuple:
        question, refusal = record.text("question"), record.text("target_new")
        return _row(question, refusal, instruction=f'If you are asked "{question}", answer "{refusal}"'), [], []

    kept = [question for group in record.parts(keep) for question in _questions(group, "question", "ground_truth")]
    return _collected([*map(convert, record.parts(forget)), (None, kept, [])])


def rows_from_requests(requests: Iterable[Mapping[str, Any]]) -> Edits:
    """Requests to an editor as dicts: ROME's and MEMIT's (`prompt` with `{}` for the `subject`, `target_new.str`) and
    EasyEdit's (`prompt`, `target_new`, `rephrase_prompt`, `locality`, `portability`, or `locality_prompt` with
    `locality_ground_truth`). No subject need be named where the prompt has no `{}`.

    Raises:
        ValueError: a request lacks a field or has another type in it; the message names the request and the field.
    """
    return _collected(map(_request, read_records(requests, "requests")))


def rows_from_easyedit(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    *,
    rephrase_prompts: str | Sequence[str | Sequence[str]] | None = None,
    locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    subject: str | Sequence[str] | None = None,
    ground_truth: str | Sequence[str] | None = None,
) -> Edits:
    """The arguments of EasyEdit's `editor.edit(...)`, under their names. `ground_truth`, the old answer, and the
    subject of a prompt without `{}` are not needed.

    Args:
        prompts: what is asked, one or several.
        target_new: what shall be said, one for each.
        rephrase_prompts: paraphrases, one or a list for each.
        locality_inputs: by name, `prompt` and `ground_truth`, each with one entry for each of `prompts`: a string, a
            list of strings, or None.
        portability_inputs: the same, for questions that follow from the edit.
        subject, ground_truth: one for each, or None.

    Raises:
        ValueError: a list has another length than `prompts`, or an entry is of another form; the message names it.
    """
    count = 1 if isinstance(prompts, str) else len(prompts)

    def column(value: Any, name: str) -> Sequence[Any]:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, Sequence) or len(value) != count:
            found = f"{len(value)} entries" if isinstance(value, Sequence) else repr(value)
            raise ValueError(f"requests: {name} has {found}; expected one for each of the {count} prompts")
        return value

    requests: list[dict[str, Any]] = [{} for _ in range(count)]
    given = {
        "prompt": (prompts, "prompts"), "target_new": (target_new, "target_new"), "subject": (subject, "subject"),
        "rephrase_prompt": (rephrase_prompts, "rephrase_prompts"), "ground_truth": (ground_truth, "ground_truth"),
    }  # fmt: skip
    for field, (value, name) in given.items():
        if value is not None:
            for request, entry in zip(requests, column(value, name), strict=True):
                request[field] = entry
    for field, inputs in (("locality", locality_inputs), ("portability", portability_inputs)):
        for key, group in (inputs or {}).items():
            name = f"{field}_inputs[{key!r}]"
            if "prompt" not in Part(group, f"requests: {name}"):
                raise ValueError(f"requests: {name} has no 'prompt'; the fields are {sorted(group)}")
            answers = [None] * count
            if group.get("ground_truth") is not None:
                answers = column(group["ground_truth"], f"{name}['ground_truth']")
            questions = column(group["prompt"], f"{name}['prompt']")
            for request, prompt, answer in zip(requests, questions, answers, strict=True):
                if prompt is not None:
                    request.setdefault(field, {})[key] = {"prompt": prompt, "ground_truth": answer}
    return rows_from_requests(requests)


def _request(record: Part) -> tuple[dict[str, Any], list[dict[str, str]], list[dict[str, str]]]:
    prompt, target = record.text("prompt"), record.text("target_new")
    if "{}" in prompt:
        prompt = _filled(record)
    others = [*record.texts("rephrase_prompt"), *record.texts("rephrase")]
    kept = list(_grouped(record, "locality"))
    if "locality_prompt" in record:
        kept += _questions(record, "locality_prompt", "locality_ground_truth")
    statement = _statement(prompt, target)
    following = [
        _following(statement, question["prompt"], question["answer"])
        for question in _grouped(record, "portability")
        if "answer" in question
    ]
    return _row(prompt, target, others), kept, following


def _grouped(record: Part, field: str) -> Iterator[dict[str, str]]:
    """The questions of `{name: [{prompt, ground_truth}, …]}` or `{name: {prompt: …, ground_truth: …}}`."""
    if field in record:
        groups = record.part(field)
        for name in groups.value:
            for group in groups.parts(name):
                yield from _questions(group, "prompt", "ground_truth")


def _questions(group: Part, prompt: str, answer: str) -> list[dict[str, str]]:
    """A question, or several with as many answers. Blank answers, which the datasets have, count as none."""
    prompts = group.texts(prompt)
    if not prompts:
        group.text(prompt)  # says what is wrong with it
    answers = group.value.get(answer)
    if len(prompts) == 1:
        answers = [answers]
    elif answers is None:
        answers = [None] * len(prompts)
    elif isinstance(answers, str) or len(answers) != len(prompts):
        raise ValueError(f"{group.name(answer)} is {answers!r}; expected one for each of the {len(prompts)} prompts")
    found = []
    for text, one in zip(prompts, map(first_of, answers), strict=True):
        if one and not isinstance(one, str):
            raise ValueError(f"{group.name(answer)} is {one!r}; expected a string or a list of strings")
        reply = (one or "").strip()
        found.append({"prompt": text, "answer": reply} if reply else {"prompt": text})
    return found
