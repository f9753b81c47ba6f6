"""The default lesson: facts written into several modules by one least squares, and the rest kept within a budget.

A row walks through it in one direction: passes (context, bare) → how far each taught step's state must move → blocks →
what must stay, near and far → one least squares → its solution, corrected by what it does in the model → the held-out
chats, on which the ridge is raised until they diverge no more than allowed → the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..adapter.state import TaughtAdapter
from ..data.rows import Row
from ..forward.blocks import is_attention, split_path
from ..forward.capture import Point, forward_pass
from ..forward.generation import generate
from ..forward.prefix import common
from ..forward.residual_stream import Writer, grows_with_depth
from ..forward.scratch import Scratch
from ..forward.unembedding import Unembedding
from ..forward.walk import Walk
from ..solve.joint_least_squares import JointSystem, joint_system
from ..solve.least_squares import LowRankDelta
from ..solve.second_moment import SecondMoment
from . import constants as tuned
from .arguments import QFTrainingArguments
from .contrast import contrast_rows
from .held_out import HeldOutChats, Strays
from .joint_fit import JointFit, Steps
from .lesson import Learner, Lesson
from .preserved_moments import PreservedMoments
from .targets import Readout, leads, read_off
from .thinned import asked_as, thinned


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
    if not grows_with_depth(network):
        return False
    points = {"stream": Point(blocks[-1], "output"), "head": Point(network.get_output_embeddings(), "input")}
    found = forward_pass(network, [ids], [len(ids) - 1], points, batch_tokens=len(ids), pad_id=ids[0])
    return Unembedding.find(network, blocks, found["stream"], found["head"]) is not None


class JointLesson(Lesson):
    """Teaches facts towards the nearest state that says them; see the module.

    Args:
        learner, args, progress: as [`Lesson`]'s.
        rows: what is taught.
        moments: what must stay.
    """

    def __init__(
        self,
        learner: Learner,
        rows: list[Row],
        moments: PreservedMoments,
        args: QFTrainingArguments,
        progress: Callable[[float], None],
    ) -> None:
        given = [[asked_as(row, wording) for wording in row.wordings] for row in rows]
        made = [
            thinned(row, max(tuned.WORDINGS - len(other), 0), args.seed) for row, other in zip(rows, given, strict=True)
        ]
        counts = [len(a) + len(b) for a, b in zip(given, made, strict=True)]
        self.rows = [*rows, *(row for part in given for row in part), *(row for part in made for row in part)]
        self.moments, self.own, part = moments, len(rows), len(rows) / len(self.rows)
        examples = [learner.encoder.encode(row) for row in self.rows]
        super().__init__(learner, examples, args, lambda n: progress(n * part))
        # By example: the row that it asks, and how many contrasting rows there shall be of it.
        of = [k for parts in (given, made) for k, part in enumerate(parts) for _ in part]
        self.row = [*range(len(rows)), *of]
        each = tuned.CONTRASTS * min(1.0, math.sqrt(tuned.CONTRASTS_MANY / len(rows)))
        self.few = each < tuned.CONTRASTS_LEAST / len(rows)
        each = max(each, tuned.CONTRASTS_LEAST / len(rows))
        self.contrasts = [math.ceil(each / (1 + counts[k])) for k in self.row]

    def run(self) -> tuple[dict[str, float], list[int], list[int]]:
        """Teach. Returns metrics, the examples whose completion the model does not read in context, and those that it
        does not say afterwards.

        Besides [`Lesson`]'s the metrics are `first_block` and `last_block` (those written into), `contrasts` (rows with
        exchanged names), `strayed` (of a quarter of these, held out of the solve, the share that is now given a taught
        answer), `kl_preserved` and `kl_preserved_worst` (KL from the base's predictions at the held-out chats'
        answers, in nats: the mean, and the worst chat's), and `ridge`.
        """
        state = self._state()
        candidates = [name for name in self._candidates(state) if name in self.moments.moments]
        context = self._in_context()
        streams = {f"block {i}": Point(self.blocks[i], "output") for i in {self.index[n] for n in candidates}}
        keys = {name: Point(self.layers[name], "input") for name in candidates}
        walk = Walk(self.network, self.blocks, self.index[candidates[0]], self.bare, self.positions, **self.options)
        found = walk.begin({**streams, **keys, **self.ends}, len(self.blocks) - 1)
        found = {name: values.to(found["stream"].device) for name, values in found.items()}  # blocks may lie on several
        unembedding = Unembedding.find(self.network, self.blocks, context["stream"], context["head"])
        chosen = self._chosen(candidates, found, state)
        walk.advance(self.index[chosen[0]])

        steps, new = self._steps(unembedding, found["stream"], len(context["stream"]))
        before = read_off(unembedding, context["stream"], found["stream"][steps.own], steps.gold[steps.own])
        rows, asked = self._contrasting(new)
        strays, chats = self._unseen(chosen, unembedding, state, rows, new)
        bound, system, present = self._system(chosen, found, steps, state, self._near(chosen, rows, asked))
        begun = steps.needed.clamp(min=tuned.BEGUN_LEAD)
        margin = torch.where(self._beginnings(new).to(begun.device), begun, steps.needed)

        def write(wanted: Tensor, ridge: float) -> None:
            self._write(system, wanted, ridge, present)

        fit = JointFit(walk, self.ends["stream"], unembedding, steps, write, margin, found["stream"])
        stray = tuned.STRAYS * max(1.0, self.own / tuned.STRAYS_FACTS) ** tuned.STRAYS_POWER
        first, strayed = fit.without_strays(strays, stray)
        wanted, ridge, kl = fit.within_budget(chats, first, self.args.divergence_of(state.facts + self.own))
        strayed = strayed if wanted is first else strays.share()

        self._bind(state, bound, {name: found[name][steps.taught] for name in chosen}, system, ridge)
        state.delta.update(self._write(system, wanted[steps.taught], ridge, present, last=True))
        after = walk.look(len(self.blocks) - 1, {"stream": self.ends["stream"]})["stream"]
        reading = read_off(unembedding, context["stream"], after[steps.own], steps.gold[steps.own])
        self.options["progress"](len(self.examples))
        self._finish(state)
        metrics = self._metrics(fit, before, reading, chosen) | {
            "contrasts": len(rows),
            "strayed": strayed,
            "kl_preserved": float(kl.mean()),
            "kl_preserved_worst": float(max(part.mean() for part in kl.split(self.moments.answers))),
            "ridge": ridge,
        }
        rest = torch.zeros(len(self.gold) - len(reading.margins), dtype=torch.bool)
        unread = torch.cat([before.read.cpu() != self.gold[steps.own], rest])
        return metrics, self._any(unread), self._any(torch.cat([reading.margins.cpu() < 0, rest]))

    @property
    def ends(self) -> dict[str, Point]:
        """Where the stream ends, and what the unembedding reads."""
        return {"stream": Point(self.blocks[-1], "output"), "head": Point(self.head, "input")}

    def _in_context(self) -> dict[str, Tensor]:
        """The rows' own prompts with their instructions, by the base model, at the ends."""
        rows = [e.context_ids for e in self.examples[: self.own]]
        with self.tuner.without_adapters():
            return forward_pass(self.network, rows, self.positions[: self.own], self.ends, **self.options)

    def _steps(self, unembedding: Unembedding, stream: Tensor, own: int) -> tuple[Steps, list[int]]:
        """The taught positions, of which so many are the rows' own, and by row the answer's step that says what is
        new."""
        gold = self.gold.to(stream.device)
        margins = leads(unembedding, stream, gold)
        needed = tuned.LEAD + tuned.SURPLUS * (-margins).clamp(min=0)
        return Steps(gold, self.answered.to(stream.device), slice(0, own), margins, needed), self._new(margins)

    def _unseen(
        self,
        chosen: list[str],
        unembedding: Unembedding,
        state: TaughtAdapter,
        rows: list[list[int]],
        new: list[int],
    ) -> tuple[Strays, HeldOutChats]:
        """What the solve does not see: contrasting rows, and preserved chats."""
        aside, first, preserved = rows[tuned.CONTRASTS_ASIDE - 1 :: tuned.CONTRASTS_ASIDE], chosen[0], self.moments
        walk = Walk(self.network, self.blocks, self.index[first], aside, [1] * len(aside), **self.unseen)
        strays = Strays(walk, self.ends["stream"], unembedding, self._objects(new))
        walk = Walk(self.network, self.blocks, self.index[first], preserved.held_out, preserved.answers, **self.unseen)
        head = None if state.holds_standing else preserved.head
        return strays, HeldOutChats(walk, self.ends["stream"], unembedding, head)

    def _system(
        self,
        chosen: list[str],
        found: dict[str, Tensor],
        steps: Steps,
        state: TaughtAdapter,
        near: dict[str, SecondMoment],
    ) -> tuple[Callable[[str], SecondMoment], JointSystem, dict[str, LowRankDelta]]:
        """What gives by name what must stay of a module, made when it is needed (of wide modules each is gigabytes);
        the least squares beside it; and the modules' present changes."""
        device = found["stream"].device
        bound = partial(self._bound, state=state, near=near, device=device)
        significance = self.weights.to(device)[steps.taught]
        system = joint_system({name: found[name][steps.taught] for name in chosen}, bound, significance)
        present = {
            name: (state.delta[name] if name in state.delta else self.tuner.delta(self.adapter, name)).to(device)
            for name in chosen
        }
        return bound, system, present

    def _bind(
        self,
        state: TaughtAdapter,
        bound: Callable[[str], SecondMoment],
        keys: dict[str, Tensor],
        system: JointSystem,
        ridge: float,
    ) -> None:
        """Let what is taught now bind later lessons."""
        for name, rows in keys.items():
            binding = bound(name).update(rows, system.significance.float() / system.ridge(ridge))
            state.bound[name] = binding.compact(max(self.args.memory_rank, tuned.WHOLE_MOMENT)).to(torch.device("cpu"))
            state.tokens.pop(name, None)
            state.offset.pop(name, None)

    def _metrics(self, fit: JointFit, before: Readout, after: Readout, chosen: list[str]) -> dict[str, float]:
        own, margins = fit.steps.own, fit.steps.margins
        moved = ((after.margins.to(margins) - margins[own]) / (fit.margin - margins)[own])[fit.moving[own]]
        blocks = sorted({self.index[name] for name in chosen})
        return {
            "taught_tokens": len(before.margins),
            "wordings": len(self.examples) - self.own,
            "kl_before": float(before.divergence.mean()),
            "kl_after": float(after.divergence.mean()),
            "residual_left": float((1 - moved).clamp(min=0).mean()) if len(moved) else 0.0,
            "rank": self.tuner.peft_config[self.adapter].r,
            "forward_passes": round(1 + fit.walk.steps, 2),
            "first_block": blocks[0],
            "last_block": blocks[-1],
        }

    def _candidates(self, state: TaughtAdapter) -> list[str]:
        """The modules that may be taught: those taught before, or the stream's writers in the later half."""
        writers = writers_late(self.names, self.writers, len(self.blocks))
        return [name for name in writers if name in state.bound] or writers

    def _chosen(self, candidates: list[str], found: dict[str, Tensor], state: TaughtAdapter) -> list[str]:
        """The modules from the first block on whose stream is not small beside the last one."""
        if any(name in state.bound for name in candidates):
            return candidates
        last = torch.linalg.vector_norm(found["stream"], dim=1).median()
        for index in sorted({self.index[name] for name in candidates}):
            norm = torch.linalg.vector_norm(found[f"block {index}"], dim=1).median()
            if float(norm) >= tuned.LARGE_STREAM * float(last):
                break
        return [name for name in candidates if self.index[name] >= index]

    def _new(self, margins: Tensor) -> list[int]:
        """By row the answer's first step that is at least half as far behind as the furthest: where it begins to say
        what is new. Of a name of several words a later one may be further behind, and follows from the first."""
        answers = [part[e.header :] for e, part in zip(self.examples, margins.split(self.positions), strict=True)]
        found = []
        for part in answers[: self.own]:
            least = float(part.min()) if len(part) else 0.0
            found.append(int((part <= (least / 2 if least < 0 else least)).int().argmax()) if len(part) else 0)
        return found

    def _beginnings(self, new: list[int]) -> Tensor:
        """The positions (n) of the answers before the one that says what is new."""
        pairs = zip(self.examples, self.row, strict=True)
        return torch.tensor([e.header <= k < e.header + new[row] for e, row in pairs for k in range(e.taught)])

    def _objects(self, new: list[int]) -> set[int]:
        """The tokens by which the rows say what is new."""
        parts = self.gold.split(self.positions)[: self.own]
        return {int(part[e.header + k]) for part, e, k in zip(parts, self.examples, new, strict=False) if len(part)}

    def _contrasting(self, new: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Contrasting rows, their answers begun up to what is new; and of few rows questions of some."""
        begun = []
        for k, row, example in zip(self.row, self.rows, self.examples, strict=True):
            tail = self.learner.encoder.tokenizer.decode(
                example.targets[example.header + new[k] :], skip_special_tokens=True
            )
            begun.append(row.completion[: len(row.completion) - len(tail.strip())] if tail.strip() else row.completion)
        made, asked = contrast_rows(self.rows, begun, self.learner.encoder, self.contrasts, self.args.seed)
        return made, asked if self.few else []

    def _answered(self, asked: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """Questions of contrasting rows with the model's own answers, and the answers' numbers of tokens."""
        tokenizer, batch_tokens = self.learner.encoder.tokenizer, self.options["batch_tokens"]
        room = {"max_new_tokens": tuned.ANSWERED_TOKENS, "batch_tokens": batch_tokens}
        texts = [text for text, _ in generate(self.network, tokenizer, asked, **room)]
        answers = [tokenizer(text, add_special_tokens=False).input_ids[: tuned.ANSWERED_TOKENS] for text in texts]
        pairs = [pair for pair in zip(asked, answers, strict=True) if pair[1]]
        return [[*ids, *answer] for ids, answer in pairs], [len(answer) for _, answer in pairs]

    def _near(self, chosen: list[str], rows: list[list[int]], asked: list[list[int]]) -> dict[str, SecondMoment]:
        """By module the moment of the contrasting rows' keys, but for those held out, and of those along the model's
        answers to what is asked."""
        rows = [ids for i, ids in enumerate(rows) if i % tuned.CONTRASTS_ASIDE != tuned.CONTRASTS_ASIDE - 1]
        along, last, answered = tuned.CONTRAST_WEIGHT_ALONG, tuned.CONTRAST_WEIGHT, tuned.ANSWERED_WEIGHT
        if len({is_attention(name) for name in chosen}) == 2:  # both kinds are written into: a crowded lesson
            answered *= tuned.CROWDED_WEIGHT / last
            along, last = tuned.CROWDED_WEIGHT_ALONG, tuned.CROWDED_WEIGHT
        # What all begin with, the system prompt, is preserved in every chat; a pass that need not keep it runs it once.
        shared = min(common(min(rows), max(rows)), *(len(ids) - 2 for ids in rows)) if rows else 0
        # What is new is said at the last position; before it the answer may well begin as a taught one does.
        lengths, neighbours = [len(ids) - 1 - shared for ids in rows], sum(len(ids) - 2 for ids in rows)
        weights = torch.full((sum(lengths),), along / max(neighbours, 1))
        weights[torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1] = last / max(len(rows), 1)
        moments: dict[str, SecondMoment] = {}
        self._gather(moments, chosen, rows, lengths, weights)
        sequences, lengths = self._answered(asked)
        self._gather(moments, chosen, sequences, lengths, torch.full((sum(lengths),), answered / max(sum(lengths), 1)))
        return moments

    def _gather(
        self,
        moments: dict[str, SecondMoment],
        chosen: list[str],
        sequences: list[list[int]],
        lengths: list[int],
        weights: Tensor,
    ) -> None:
        """Add to moments, by module, the keys at so many last positions of each sequence, weighted by position."""
        points, host = {name: Point(self.layers[name], "input") for name in chosen}, torch.device("cpu")
        device, done = self.network.get_input_embeddings().weight.device, 0
        for first in range(0, len(sequences), tuned.CONTRAST_BATCH):
            chunk = slice(first, first + tuned.CONTRAST_BATCH)
            options = {**self.unseen, "scratch": Scratch(device=host)}  # of all modules: too much for the device
            found = forward_pass(self.network, sequences[chunk], lengths[chunk], points, **options)
            part = weights[done : done + sum(lengths[chunk])]
            for name, keys in found.items():
                moment = moments.setdefault(name, SecondMoment(keys.shape[1], home=host))
                moment.update(keys.to(device), part)
            done += len(part)

    def _bound(
        self, name: str, state: TaughtAdapter, near: dict[str, SecondMoment], device: torch.device
    ) -> SecondMoment:
        """What must stay of a module: P."""
        if name in state.bound:
            bound = state.bound[name].copy()
        else:
            bound = self.moments.moments[name].copy()
            bound.ridge += tuned.MOMENT_RIDGE * (bound.trace / bound.width + bound.ridge)
        strength = self.args.preserve_strength
        if name not in state.bound and strength != 1.0:
            bound.scale(strength)
        bound.to(device)
        if name in near:
            bound.add(near[name].copy().to(device).scale(strength))
        return bound

    def _write(
        self, system: JointSystem, wanted: Tensor, ridge: float, present: dict[str, LowRankDelta], last: bool = False
    ) -> dict[str, LowRankDelta]:
        """Put the present changes and the new ones into the adapter: as they are, or at the `last` compressed."""
        config, whole = self.tuner.peft_config[self.adapter], {}
        for name, change in system.changes(wanted, ridge).items():
            multiplier = self.writers[name].multiplier
            change = LowRankDelta(change.A, change.B / multiplier)
            whole[name] = present[name] + change
            if last:
                dropped = min(tuned.RANK_DROPPED, self.args.rank_tolerance) * change.norm if config.grows else 0.0
                rank = None if config.grows else config.r
                whole[name] = whole[name].compressed(rank=rank, tolerance=dropped)
        return self._install(whole)


def passes_of(behind: float) -> tuple[float, float]:
    """How many passes of a lesson's rows, wordings included, it takes as a rule and at most, where so much of the
    model's depth (0 to 1) lies behind the first block that may be taught."""
    again = (2 + tuned.RIDGE_TRIES + tuned.CORRECTED_FURTHER) * tuned.PASSES_AGAIN
    most = 1 + 2 * tuned.PASSES + tuned.SURPLUS_SHRINKS * tuned.PASSES_BETWEEN + again
    return 2 + behind * tuned.PASSES / 2, 2 + behind * most


def writers_late(names: list[str], writers: dict[str, Writer], depth: int) -> list[str]:
    """The modules that write into the stream in the later half of the blocks, in order; all where none is there."""
    writing = [name for name in names if writers[name].place is not None and writers[name].norm is None]
    return [name for name in writing if split_path(name)[1] >= depth // 2] or writing
