"""Teacher-forced scores, to be comparable with papers: the right tokens before each one are given to the model.

They say little about what a model answers by itself (WILD, arXiv 2502.11177), and stand in a table of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from qf_peft.data.rows import Row
from qf_peft.forward.capture import forward_pass

from .bench import Bench
from .learners import Learner
from .scoring import share
from .tasks import Task, spread

Wanted = tuple[str, str]  # a prompt and a completion


class Forced:
    """What a learner's model makes of given completions.

    Args:
        bench: the model and how it is asked.
        learner: what was taught.
    """

    def __init__(self, bench: Bench, learner: Learner) -> None:
        self.bench, self.learner = bench, learner

    @torch.no_grad()
    def read(self, wanted: Sequence[Wanted]) -> list[tuple[float, float]]:
        """For each the mean log probability of the completion's tokens, in nats, and the share of them that are the
        likeliest; the end of the turn is not counted."""
        if not wanted:
            return []
        pairs = [
            self._sequence(*one) for one in zip(wanted, self.learner.instructions([p for p, _ in wanted]), strict=True)
        ]
        gold = torch.tensor([token for ids, count in pairs for token in ids[len(ids) - count :]])

        def score(order: Tensor, logits: Tensor, _: Tensor) -> dict[str, Tensor]:
            right = gold[order].to(logits.device)
            found = logits.float().log_softmax(-1).gather(1, right[:, None])[:, 0]
            return {"log": found.cpu(), "hit": (logits.argmax(-1) == right).float().cpu()}

        model = self.learner.model
        network = model.get_base_model() if hasattr(model, "get_base_model") else model
        found = forward_pass(
            network, [ids for ids, _ in pairs], [count for _, count in pairs], {}, on_logits=score,
            batch_tokens=self.bench.batch_tokens, pad_id=self.bench.tokenizer.pad_token_id,
        )  # fmt: skip
        counts = [count for _, count in pairs]
        parts = zip(found["log"].split(counts), found["hit"].split(counts), strict=True)
        return [(float(log.mean()), float(hit.mean())) for log, hit in parts]

    def _sequence(self, wanted: Wanted, instruction: str | None) -> tuple[list[int], int]:
        """Token ids up to the completion's last, and how many of them are the completion's."""
        prompt, completion = wanted
        start = self.bench.prompt_ids(prompt, instruction)
        ids, count = self.bench.encoder.answer_ids(Row(0, "", prompt, completion), False)
        return start + ids[len(ids) - count :], count


def teacher_forced(bench: Bench, learner: Learner, task: Task, most: int | None) -> dict[str, Any]:
    """Token accuracy of the taught completions, asked by the taught questions and by others; and where the data name
    the answers before the edit, ROME's ES, PS and NS (arXiv 2202.05262): how often the taught answer is likelier than
    the old one, by the taught questions and by others, and how often the right answer to a question of locality is
    likelier than what its record teaches."""
    forced = Forced(bench, learner)
    found: dict[str, Any] = {}
    for column, name in (("reliability", "token_accuracy"), ("generalisation", "token_accuracy_generalisation")):
        asked = spread(task.asked.get(column, []), most)
        hits = [hit for _, hit in forced.read([(q.prompt, q.answers[0]) for q in asked])]
        if hits:
            found[name] = {"value": fmean(hits), "count": len(hits)}
    columns = (("ES", task.asked["reliability"]), ("PS", task.asked.get("generalisation", [])), ("NS", task.locality))
    for name, questions in columns if any(q.against for q in task.asked["reliability"]) else ():
        asked = [q for q in spread(questions, most) if q.answers and q.against not in (None, q.answers[0])]
        found[name] = _likelier(forced, [(q.prompt, q.answers[0], q.against) for q in asked])
    return {name: value for name, value in found.items() if value is not None}


def _likelier(forced: Forced, triples: list[tuple[str, str, str]]) -> dict[str, Any] | None:
    """Of prompts with two completions each: how often the first is the likelier one."""
    first = forced.read([(prompt, one) for prompt, one, _ in triples])
    second = forced.read([(prompt, other) for prompt, _, other in triples])
    return share([a > b for (a, _), (b, _) in zip(first, second, strict=True)])
