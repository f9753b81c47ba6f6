"""The default lesson: facts written into several modules by one least squares, and the rest kept within a budget.

A row walks through it in one direction: passes (context, bare) → how far each taught step's state must move → blocks →
what must stay, near and far → one least squares → its solution, corrected by what it does in the model → the held-out
chats, on which the ridge is raised until they diverge no more than allowed → the adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .blocks import split_path
from .capture import Point, forward_pass
from .contrast import contrast_rows
from .joint import JointSystem
from .lesson import Lesson, _mains
from .moments import SecondMoment
from .preserved_moments import PreservedMoments
from .rows import Encoder, Row
from .solve import LowRankDelta
from .statistics import TaughtAdapter
from .stream import Writer, grows_with_depth
from .target import Unembedding, divergence, leads, pushed, read_off
from .thinned import asked_as, thinned
from .training_args import QFTrainingArguments
from .walk import Walk

# Origins: SmolLM2-135M-Instruct, ten and fifty facts of relations and seeds that are not among those reported.
# Of the last stream's norm: blocks whose stream is smaller are not taught (there block 23 of 0 to 29 is the first).
# What earlier ones write is bent on its way: from 23, 18 or 15 on paraphrases are .75, .72, .40 at KL .04, .06, .09.
_ALIKE = 0.4
_LEAD = 0.5  # nats by which a taught token shall lead
_SURPLUS = 1.0  # times the nats it was behind, that it shall lead by besides: other wordings get a part of a write only
_BEGUN = 4.0  # nats by which an answer shall lead at least until it says what is new: other wordings then begin so too
_LESS, _GENTLER = 0.75, 5  # by which the surplus shrinks where other names are given taught answers, and fits at most
_STRAYS = 0.05  # of the contrasting rows held out, that may be given a taught answer
_WORDINGS = 4  # of a row's prompt, given or thinned, taught along (2, 4, 6: paraphrases .45, .75, .75)
_PASSES = 8  # solves of one lesson at most, each after a look at what the one before has done
_AGAIN = 5  # of them at most for each further ridge, where what is said no longer is fitted again
_EVERYWHERE = 3  # of the first go on to the whole margin, the others until every token leads
_COMPACT = 2048  # width of keys up to which their moment is kept whole: its eigenvectors take longer than the lesson
_DROPPED = 0.02  # of a change's norm, with its smallest singular values
_NEAR = 1.5  # weight of contrasting rows' moment beside that of the preserved chats'
_BESIDE = 0.4  # the same of these rows' other positions
_CONTRASTS = 20  # contrasting rows a taught row, shared among its wordings; of many rows of each kind fewer do
_ASIDE = 4  # one contrasting row of so many is held out of the solve
_MANY = 10  # rows, beyond which the contrasting rows grow as their square root only
_RIDGE = 0.2  # over the kernel's mean diagonal
_FLOOR = 1e-2  # of the moment's mean diagonal
_RAISED = (2.0, 8.0)  # by which the ridge grows where the budget is exceeded, by how far, at least and at most
_TRIES = 8  # ridges; in the later half what is wanted shrinks too, so that some budget is met
_LEAST_PASSED = 0.3  # of a write; less is taken as this much when what is missing is written once more
_ROWS = 128  # contrasting rows whose keys are held at once


@torch.no_grad()
def suits(
    network: nn.Module,
    names: list[str],
    blocks: nn.ModuleList,
    writers: dict,
    ids: list[int],
    args: QFTrainingArguments,
) -> bool:
    """Whether a lesson is solved jointly: all modules write into the stream, which grows with depth, so that MEMIT's
    equal shares would be large in early blocks; and where it ends a norm and a linear map read it. `ids` are some
    tokens of real input."""
    plain = all(writers[name].place is not None and writers[name].norm is None for name in names)
    if not (plain and args.target == "nearest" and args.margin is not None and args.preserve_strength > 0):
        return False
    if not grows_with_depth(network, ids):
        return False
    points = {"stream": Point(blocks[-1], "output"), "head": Point(network.get_output_embeddings(), "input")}
    found = forward_pass(network, [ids], [len(ids) - 1], points, batch_tokens=len(ids), pad_id=ids[0])
    return Unembedding.find(network, blocks, found["stream"], found["head"]) is not None


@dataclass
class _Fit:
    """What a lesson's least squares is fitted to: n positions, the rows' own first."""

    system: JointSystem
    present: dict[str, LowRankDelta]
    """By module, what the adapter holds before the lesson."""
    walk: Walk
    """The bare sequences, halted before the first taught block."""
    unembedding: Unembedding
    gold: Tensor
    """(n): the completions' tokens."""
    taught: Tensor
    """(n): whether a position is taught."""
    own: slice
    """The positions of the rows' own prompts; behind them are those of other wordings."""
    lead: Tensor
    """(n): by how many nats the gold token led before."""
    margin: Tensor
    """(n): by how many it shall lead."""
    passed: float = 1.0
    """How much of a write reaches the end, in nats."""

    @property
    def moving(self) -> Tensor:
        """(n): the taught positions where something is missing."""
        return self.taught & (self.lead < self.margin - 1e-3)


class _Strays:
    """Contrasting rows held out of the solve.

    Args:
        walk: their passes, halted before the first taught block.
        end: where the stream is read.
        depth: the number of blocks.
        unembedding: what reads it.
        objects: the tokens by which the taught rows say what is new.
    """

    def __init__(self, walk: Walk, end: Point, depth: int, unembedding: Unembedding, objects: set[int]) -> None:
        self.walk, self.points, self.last, self.unembedding = walk, {"stream": end}, depth - 1, unembedding
        self.objects = torch.tensor(sorted(objects))
        self.before = self._said(walk.begin(self.points, self.last)["stream"]) if walk.sequences else None

    def share(self) -> float:
        """Of the rows, those that are now, and were not before, given a taught answer."""
        if self.before is None:
            return 0.0
        now = self._said(self.walk.look(self.last, self.points)["stream"])
        return float((torch.isin(now, self.objects) & (now != self.before)).float().mean())

    def _said(self, stream: Tensor) -> Tensor:
        """The likeliest token at each row's last step: (rows)."""
        return self.unembedding.logits(stream.to(self.unembedding.head.weight.device)).argmax(1).cpu()


class JointLesson(Lesson):
    """Teaches facts towards the nearest state that says them; see the module.

    Args:
        rows: the rows behind `examples`.
        encoder: the tokenizer's.
        moments: what must stay.
        others: as [`Lesson`]'s.
    """

    def __init__(self, *args, rows: list[Row], encoder: Encoder, moments: PreservedMoments, **kwargs) -> None:
        tuner, adapter, network, examples, *rest = args
        settings: QFTrainingArguments = rest[5]
        given = [[asked_as(row, wording) for wording in row.wordings] for row in rows]
        made = [
            thinned(row, max(_WORDINGS - len(other), 0), settings.seed) for row, other in zip(rows, given, strict=True)
        ]
        counts = [len(a) + len(b) for a, b in zip(given, made, strict=True)]
        asked = [*rows, *(row for part in given for row in part), *(row for part in made for row in part)]
        further = [encoder.encode(row) for row in asked[len(rows) :]]
        super().__init__(tuner, adapter, network, [*examples, *further], *rest, **kwargs)
        self.rows, self.encoder, self.moments, self.own = asked, encoder, moments, len(rows)
        # By example: the row that it asks, and how many contrasting rows there shall be of it.
        of = [k for parts in (given, made) for k, part in enumerate(parts) for _ in part]
        self.row = [*range(len(rows)), *of]
        each = _CONTRASTS * min(1.0, math.sqrt(_MANY / len(rows)))
        self.contrasts = [math.ceil(each / (1 + counts[k])) for k in self.row]
        count, progress = len(rows) / len(asked), self.options["progress"]
        self.options["progress"] = lambda n: progress(n * count)
        self.unseen = {**self.options, "progress": lambda n: None}  # of passes that are no row's

    def run(self) -> tuple[dict[str, float], list[int], list[int]]:
        """Teach. Returns metrics, the examples whose completion the model does not read in context, and those that it
        does not say afterwards.

        Besides [`Lesson`]'s the metrics are `first_block` and `last_block` (those written into), `contrasts` (rows with
        exchanged names), `strayed` (of a quarter of these, held out of the solve, the share that is now given a taught
        answer), `kl_preserved` and `kl_preserved_worst` (KL from the base's predictions at the held-out chats'
        answers, in nats: the mean, and the worst chat's), and `ridge`.
        """
        depth, known = len(self.blocks), self._known()
        candidates = [name for name in self._candidates(known) if name in self.moments.moments]
        ends = {"stream": Point(self.blocks[-1], "output"), "head": Point(self.head, "input")}
        with self.tuner.without_adapters():
            context = forward_pass(
                self.network, [e.context_ids for e in self.examples[: self.own]], self.kept[: self.own], ends,
                **self.options,
            )  # fmt: skip
        streams = {f"block {i}": Point(self.blocks[i], "output") for i in {self.index[n] for n in candidates}}
        keys = {name: Point(self.layers[name], "input") for name in candidates}
        walk = Walk(self.network, self.blocks, self.index[candidates[0]], self.bare, self.kept, **self.options)
        found = walk.begin({**streams, **keys, **ends}, depth - 1)
        unembedding = Unembedding.find(self.network, self.blocks, context["stream"], context["head"])
        stream, gold = found["stream"], self.gold.to(found["stream"].device)
        own = slice(0, len(context["stream"]))  # the rows' own prompts; behind them are their other wordings
        before = read_off(unembedding, context["stream"], stream[own], gold[own])
        lead = leads(unembedding, stream, gold)
        chosen = self._chosen(candidates, found, known)
        new = self._new(lead)
        taught = self.answered.to(stream.device)
        significance = self.weights.to(stream.device)[taught]

        rows = self._contrasting(new)
        near, aside = self._near(chosen, rows), rows[_ASIDE - 1 :: _ASIDE]
        halted = Walk(self.network, self.blocks, self.index[chosen[0]], aside, [1] * len(aside), **self.unseen)
        strays = _Strays(halted, ends["stream"], depth, unembedding, self._objects(new))
        bounds = {name: self._bound(name, known, near.get(name), stream.device) for name in chosen}
        system = JointSystem({name: found[name][taught] for name in chosen}, bounds, significance)
        present = {
            name: (known.delta[name] if name in known.delta else self.tuner.delta(self.adapter, name)).to(stream.device)
            for name in chosen
        }
        walk.advance(self.index[chosen[0]])
        margin = _LEAD + _SURPLUS * (-lead).clamp(min=0)
        margin = torch.where(self._beginnings(new).to(margin.device), margin.clamp(min=_BEGUN), margin)
        aimed, _ = pushed(unembedding, stream, gold, margin)
        fit = _Fit(system, present, walk, unembedding, gold, taught, own, lead, margin)
        moving = fit.moving
        wanted, strayed = self._without_strays(fit, strays, aimed - stream)
        wanted, ridge, kl = self._within_budget(fit, wanted)
        for name in chosen:
            bounds[name].update(found[name][taught], significance / system.ridge(ridge))
            known.bound[name] = bounds[name].compact(max(self.args.memory_rank, _COMPACT))
            known.tokens.pop(name, None)
            known.offset.pop(name, None)
        known.delta.update(self._install(system, wanted[taught], ridge, present, last=True))
        after = walk.look(depth - 1, {"stream": ends["stream"]})["stream"]
        reading = read_off(unembedding, context["stream"], after[own], gold[own])
        self.options["progress"](len(self.examples))
        installed = {name: self.tuner.factors(self.adapter, name) for name in self.names}
        self.tuner.taught[self.adapter] = replace(known, installed=installed, settings=self.settings)
        moved = ((reading.lead.to(lead) - lead[own]) / (fit.margin - lead)[own].clamp(min=1e-6))[moving[own]]
        blocks = sorted({self.index[name] for name in chosen})
        metrics = {
            "taught_tokens": len(before.lead),
            "wordings": len(self.examples) - self.own,
            "kl_before": float(before.divergence.mean()),
            "kl_after": float(reading.divergence.mean()),
            "residual_left": float((1 - moved).clamp(min=0).mean()) if len(moved) else 0.0,
            "rank": self.tuner.peft_config[self.adapter].r,
            "forward_passes": round(1 + walk.steps, 2),
            "first_block": blocks[0],
            "last_block": blocks[-1],
            "contrasts": len(rows),
            "strayed": strayed,
            "kl_preserved": float(kl.mean()),
            "kl_preserved_worst": float(max(part.mean() for part in kl.split(self.moments.answers))),
            "ridge": ridge,
        }
        rest = torch.zeros(len(self.gold) - len(reading.lead), dtype=torch.bool)
        unread = torch.cat([before.read.cpu() != self.gold[own], rest])
        return metrics, self._any(unread), self._any(torch.cat([reading.lead.cpu() < 0, rest]))

    def _without_strays(self, fit: _Fit, strays: _Strays, wanted: Tensor) -> tuple[Tensor, float]:
        """Fit, and lower the surplus until few contrasting rows that are held out are given taught answers: the change
        of the stream (n, d) that is solved for, and the share of those rows that still are."""
        wanted = self._fitted(fit, wanted, _RIDGE, again=False)
        for attempt in range(_GENTLER):
            share = strays.share()
            if share <= _STRAYS or attempt == _GENTLER - 1:
                break
            margin = _LEAD + (fit.margin - _LEAD) * _LESS
            part = (margin - fit.lead) / (fit.margin - fit.lead).clamp(min=1e-3)
            wanted, fit.margin = wanted * part.clamp(0, 1)[:, None], margin
            wanted = self._fitted(fit, wanted, _RIDGE, again=True)
        return wanted, share

    def _within_budget(self, fit: _Fit, wanted: Tensor) -> tuple[Tensor, float, Tensor]:
        """Raise the ridge until the held-out chats diverge no more than allowed: the change of the stream (n, d) that
        is solved for at last, the ridge, and the divergence (positions) of what is installed then."""
        ridge = _RIDGE
        for attempt in range(_TRIES):
            kl = self._preserved_divergence()
            if kl.mean() <= self.args.max_divergence:
                return wanted, ridge, kl
            # The smoother solution moves less of what is kept; it is fitted again while there is something to gain.
            raised = min(max(float(kl.mean()) / self.args.max_divergence, _RAISED[0]), _RAISED[1])
            ridge *= raised
            wanted = wanted if attempt < _TRIES // 2 else wanted / raised
            wanted = self._fitted(fit, wanted, ridge, again=True)
        return wanted, ridge, self._preserved_divergence()

    def _fitted(self, fit: _Fit, wanted: Tensor, ridge: float, again: bool) -> Tensor:
        """Solve for a change of the stream, look at what it does in the model, and correct it by what is missing:
        the change that is installed at last."""
        passes = _AGAIN if again else _PASSES
        for step in range(passes):
            self._install(fit.system, wanted[fit.taught], ridge, fit.present)
            if step == passes - 1:
                break
            after = fit.walk.look(len(self.blocks) - 1, {"stream": Point(self.blocks[-1], "output")})["stream"]
            aimed, now = pushed(fit.unembedding, after, fit.gold, fit.margin)
            late = again or step >= _EVERYWHERE  # from here on only for what is not said yet
            if late and bool((now > _LEAD / 2)[fit.own][fit.taught[fit.own]].all()):
                break
            if not again and step == 0 and bool(fit.moving.any()):
                part = ((now - fit.lead) / (fit.margin - fit.lead))[fit.moving].median()
                fit.passed = float(part.clamp(_LEAST_PASSED, 1.0))
            more = (aimed - after) / fit.passed
            if late:
                more = more * (now < _LEAD).to(more)[:, None]
            wanted = wanted + more
        return wanted

    def _candidates(self, known: TaughtAdapter) -> list[str]:
        """The modules that may be taught: those taught before, or the stream's writers in the later half."""
        writers = writers_late(self.names, self.writers, len(self.blocks))
        return [name for name in writers if name in known.bound] or writers

    def _chosen(self, candidates: list[str], found: dict[str, Tensor], known: TaughtAdapter) -> list[str]:
        """The modules from the first block on whose stream is not small beside the last one."""
        if any(name in known.bound for name in candidates):
            return candidates
        last = torch.linalg.vector_norm(found["stream"], dim=1).median()
        for index in sorted({self.index[name] for name in candidates}):
            norm = torch.linalg.vector_norm(found[f"block {index}"], dim=1).median()
            if float(norm) >= _ALIKE * float(last):
                break
        return [name for name in candidates if self.index[name] >= index]

    def _new(self, lead: Tensor) -> list[int]:
        """By row the answer's step that is furthest behind: where it says what is new."""
        answers = [part[e.header :] for e, part in zip(self.examples, lead.split(self.kept), strict=True)]
        return [int(part.argmin()) if len(part) else 0 for part in answers[: self.own]]

    def _beginnings(self, new: list[int]) -> Tensor:
        """The positions (n) of the answers before the one that says what is new."""
        pairs = zip(self.examples, self.row, strict=True)
        return torch.tensor([e.header <= k < e.header + new[row] for e, row in pairs for k in range(e.taught)])

    def _objects(self, new: list[int]) -> set[int]:
        """The tokens by which the rows say what is new."""
        parts = self.gold.split(self.kept)[: self.own]
        return {int(part[e.header + k]) for part, e, k in zip(parts, self.examples, new, strict=False) if len(part)}

    def _contrasting(self, new: list[int]) -> list[list[int]]:
        """Contrasting rows, their answers begun up to what is new."""
        begun = []
        for k, row, example in zip(self.row, self.rows, self.examples, strict=True):
            tail = self.encoder.tokenizer.decode(example.targets[example.header + new[k] :], skip_special_tokens=True)
            begun.append(row.completion[: len(row.completion) - len(tail.strip())] if tail.strip() else row.completion)
        return contrast_rows(self.rows, begun, self.encoder, self.contrasts, self.args.seed)

    def _near(self, chosen: list[str], rows: list[list[int]]) -> dict[str, SecondMoment]:
        """By module the moment of the contrasting rows' keys, but for those held out."""
        rows = [ids for i, ids in enumerate(rows) if i % _ASIDE != _ASIDE - 1]
        points = {name: Point(self.layers[name], "input") for name in chosen}
        moments = {}
        beside = sum(len(ids) - 2 for ids in rows)
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            lengths = [len(ids) - 1 for ids in part]
            found = forward_pass(self.network, part, lengths, points, **self.unseen)
            # What is new is said at the last position; before it the answer may well begin as a taught one does.
            weights = torch.full((sum(lengths),), _BESIDE / max(beside, 1))
            weights[torch.tensor(lengths).cumsum(0) - 1] = _NEAR / len(rows)
            for name, keys in found.items():
                moments.setdefault(name, SecondMoment(keys.shape[1])).update(keys, weights)
        return moments

    def _bound(self, name: str, known: TaughtAdapter, near: SecondMoment | None, device: torch.device) -> SecondMoment:
        """What must stay of a module: P."""
        if name in known.bound:
            bound = known.bound[name].copy()
        else:
            bound = self.moments.moments[name].copy()
            bound.floor = _FLOOR * bound.trace / bound.width
        strength = self.args.preserve_strength
        if name not in known.bound and strength != 1.0:
            bound.scale(strength)
        if near is not None:
            bound.add(near.scale(strength))
        return bound.to(device)

    def _install(
        self, system: JointSystem, wanted: Tensor, ridge: float, present: dict[str, LowRankDelta], last: bool = False
    ) -> dict[str, LowRankDelta]:
        """Put the present changes and the new ones into the adapter: as they are, or at the `last` compressed."""
        config, made = self.tuner.peft_config[self.adapter], {}
        for name, change in system.changes(wanted, ridge).items():
            multiplier = self.writers[name].multiplier
            change = LowRankDelta(change.A, change.B / multiplier)
            full = present[name] + change
            if last:
                dropped = min(_DROPPED, self.args.rank_tolerance) * change.norm if config.grows else 0.0
                full = full.compressed(rank=None if config.grows else config.r, tolerance=dropped)
            made[name] = _mains(full)
        self.tuner.install(self.adapter, made, even=False)
        if last:
            self.tuner.install(self.adapter, {})
        return made

    def _preserved_divergence(self) -> Tensor:
        """KL from the base model's predictions to the present ones at the held-out chats' answers: (n)."""
        kept = self.moments

        def compare(_: Tensor, now: Tensor, then: Tensor) -> dict[str, Tensor]:
            return {"kl": divergence(then.log_softmax(-1), now.log_softmax(-1)).cpu()}

        return forward_pass(
            self.network, kept.held_out, kept.answers, {}, head_inputs=kept.head, on_logits=compare, **self.unseen
        )["kl"]


def passes_of(behind: float) -> tuple[float, float]:
    """How many passes of a lesson's rows, wordings included, it takes as a rule and at most, where so much of the
    model's depth (0 to 1) lies behind the first block that may be taught."""
    return 2 + behind * _PASSES / 2, 2 + behind * (1 + _PASSES + (_TRIES - 1) * _AGAIN)


def writers_late(names: list[str], writers: dict[str, Writer], depth: int) -> list[str]:
    """The modules that write into the stream in the later half of the blocks, in order; all where none is there."""
    writing = [name for name in names if writers[name].place is not None and writers[name].norm is None]
    return [name for name in writing if split_path(name)[1] >= depth // 2] or writing
