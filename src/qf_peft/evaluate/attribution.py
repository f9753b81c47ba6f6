"""Which taught facts acted on an answer, read off what the adapter makes of its keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..data.ledger import Entry
from ..data.rows import Row, Text, text_of
from ..forward.capture import Point, forward_pass
from ..forward.generation import generate
from ..forward.unembedding import log_likelihoods
from .subject import Subject

_AT_ONCE = 64  # rows whose keys are held in full
_RIDGE = 1e-3  # over the mean square of what is written at the taught steps
_LEAST = 0.1  # of what is written at a fact's strongest step as a rule: steps below it explain nothing
_TOLD, _MOST_TOLD = 0.1, 10


@dataclass(frozen=True)
class Influence:
    """A fact's part in an answer."""

    entry: Entry
    share: float
    """Negative if it worked against the rest."""


@dataclass(frozen=True)
class Explanation:
    """What the adapter did at an answer."""

    prompt: Text
    answer: str
    strength: float
    """Of a token's probability the part that is the adapter's doing, 1 − p_base/p, at the token where it is largest:
    near 0, the answer is the base model's own."""
    influences: tuple[Influence, ...]
    """All facts of the ledger, the largest share first. The shares sum to at most the strength; what is missing, no
    fact explains."""

    @property
    def acting(self) -> tuple[Influence, ...]:
        """The facts with a share worth telling: a tenth, and of those the first ten."""
        return tuple(influence for influence in self.influences if influence.share >= _TOLD)[:_MOST_TOLD]

    def __str__(self) -> str:
        if not self.acting:
            return f"{self.answer}\nno taught fact acted on this answer (a share of .1 or more)"
        lines = [
            f"  {part.share:.2f}  {part.entry.id}  {text_of(part.entry.prompt)}  ->  {text_of(part.entry.completion)}"
            for part in self.acting
        ]
        return "\n".join([self.answer, "taught facts that acted on this answer, by their share:", *lines])


class Attribution:
    """Reads which facts of an adapter's ledger acted on an answer.

    A change that was solved for is a sum over the taught steps, ΔW k = Σ_i c_i r_i with r_i = ΔW k_i: what is written
    at an answer's step, in all modules together, is what the same coefficients of the taught steps' writes give. They
    are found by least squares between the writes, min_c ‖ΔW k − Σ c_i ΔW k_i‖² + λ‖c‖², so that they need nothing but
    the adapter's factors and the ledger, and hold for an adapter taught in any way. A fact's share of a step is
    Σ_{i of the fact} |c_i| ⟨c_i r_i, ΔW k⟩ / ‖ΔW k‖², with |c_i| at most 1: how much of what is written is its, times
    how much of the taught step is in this one, since what is made of a little of everything is no fact's. Of an answer
    it is the mean over its steps, each weighed by how much of its token's probability is the adapter's doing, times the
    largest of these weights (see [`Explanation`]).

    Args:
        subject: whose adapter and ledger, such as a [`QFTrainer`]. Making this runs each fact of the ledger once,
            without its instruction.

    Raises:
        ValueError: the ledger is empty.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject) -> None:
        self.subject, self.entries = subject, subject.facts
        if not self.entries:
            raise ValueError("nothing to explain: the adapter's ledger is empty")
        with subject.asking():
            examples = [subject.encoder.encode(entry.row()) for entry in self.entries]
            self._readers = _readers(subject)
            written = self._written([e.bare_ids for e in examples], [e.taught for e in examples])
        fact = torch.tensor([i for i, e in enumerate(examples) for _ in range(e.taught)])
        size = written.square().sum(1)
        usual = torch.stack([size[fact == i].max() for i in range(len(self.entries))]).median()
        used = (size >= _LEAST**2 * usual) & (size > 0)
        self._fact, self._basis = fact[used], written[used]
        gram = (self._basis @ self._basis.T).double()
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())  # nothing to add to where nothing is written
        self._factor = torch.linalg.cholesky(gram)

    @torch.no_grad()
    def explain(self, prompts: Iterable[Text], max_new_tokens: int = 256) -> list[Explanation]:
        """Ask the model, and say what acted on each answer.

        Args:
            prompts: questions or conversations.
            max_new_tokens: how long the answers may be.
        """
        subject, encoder = self.subject, self.subject.encoder
        rows = [Row(i, "", prompt, None) for i, prompt in enumerate(prompts)]
        with subject.asking() as progress:
            answers = generate(
                subject.network, encoder.tokenizer, [encoder.prompt_ids(row, False) for row in rows],
                max_new_tokens=max_new_tokens, batch_tokens=subject.args.batch_tokens, progress=progress.update,
            )  # fmt: skip
            answered = [
                encoder.answer_ids(replace(row, completion=text), ended)
                for row, (text, ended) in zip(rows, answers, strict=True)
            ]
            sequences, steps = [ids for ids, _ in answered], [count for _, count in answered]
            likelihoods = partial(log_likelihoods, subject.network, sequences, steps, **subject.pass_options)
            with subject.tuner.without_adapters():
                before = likelihoods()
            gain = (1 - (before - likelihoods()).exp()).clamp(min=0)
            written = self._written(sequences, steps)
        parts = zip(rows, answers, written.split(steps), gain.split(steps), strict=True)
        return [self._explained(row.prompt, text, *part) for row, (text, _), *part in parts]

    def _explained(self, prompt: Text, answer: str, written: Tensor, gain: Tensor) -> Explanation:
        """What acted on an answer where so much (steps, r) was written, with so much gained (steps)."""
        along = (self._basis @ written.T).double()
        present = torch.cholesky_solve(along, self._factor)
        shares = present.abs().clamp(max=1) * present * along / written.square().sum(1).clamp(min=1e-30)
        strength = float(gain.max()) if len(gain) else 0.0
        weights = gain.double() * strength / gain.sum().clamp(min=1e-30)
        facts = shares.new_zeros(len(self.entries)).index_add(0, self._fact, shares @ weights)
        ranked = sorted(zip(facts.tolist(), self.entries, strict=True), key=lambda pair: -pair[0])
        return Explanation(prompt, answer, strength, tuple(Influence(entry, share) for share, entry in ranked))

    def _written(self, sequences: Sequence[list[int]], positions: Sequence[int]) -> Tensor:
        """What all modules write at each sequence's last steps (n, Σ rank), on the CPU: coordinates in an orthonormal
        basis of what each can write, so that their products are those of the writes themselves."""
        if not self._readers:  # the adapter changes nothing
            return torch.zeros(sum(positions), 0)
        points = {name: Point(self.subject.tuner.model.get_submodule(name), "input") for name in self._readers}
        found = []
        for start in range(0, len(sequences), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            keys = forward_pass(
                self.subject.network, sequences[some], positions[some], points, **self.subject.pass_options
            )
            found.append(torch.cat([(keys[n] @ reader.T.to(keys[n])).cpu() for n, reader in self._readers.items()], 1))
        return torch.cat(found)


def _readers(subject: Subject) -> dict[str, Tensor]:
    """By module R A (r, d_in), where the adapter's change is B A and B = Q R with orthonormal columns Q."""
    readers = {}
    for name in subject.tuner.adapter_layers(subject.adapter_name):
        delta = subject.tuner.delta(subject.adapter_name, name)
        if delta.rank:
            readers[name] = torch.linalg.qr(delta.B).R @ delta.A
    return readers
