"""A lesson solved one module after the other: the paper's, and the one of models whose stream does not grow.

Each module is solved towards the context pass's state, or all towards the nearest state of the last one's stream that
says the completion, of which each writes a share (MEMIT, arXiv 2210.07229), with the bare pass run again in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..adapter.state import TaughtAdapter
from ..data.rows import Example
from ..forward.blocks import split_path
from ..forward.capture import Point, forward_pass
from ..forward.residual_stream import aim_through_norm, norm_gain
from ..forward.unembedding import Unembedding
from ..forward.walk import Walk
from ..runtime.devices import solves_on
from ..solve.least_squares import LowRankDelta, TaughtTokens, minimum_norm, recursive_update
from ..solve.second_moment import SecondMoment
from .arguments import QFTrainingArguments
from .constants import FEW, KL_LEAST, KL_MOST, SAFE, STANDING_RIDGE
from .lesson import Learner, Lesson
from .preserved_chats import answer_starts
from .preserved_keys import Preserved, nearness
from .preserved_walk import PreservedWalk, contrast_count, contrasting_chats, middle_module, nearest_chats
from .targets import Readout, aim, read_off


class ModuleLesson(Lesson):
    """Teaches examples module by module; see [`Lesson`].

    Args:
        learner, examples, args, progress: as [`Lesson`]'s.
        chats: those to keep, and others of which the ones nearest to the examples are kept too, with keys at
            `middle_module(names)` only; either may be None.
        standing: the examples teach a standing instruction, and with it the chats that would else be preserved.
        earlier: how many rows the adapter was taught before.
        again: these are rows of a lesson just taught, which the model does not say yet. What is near to them binds
            already: nothing of it is measured again.
    """

    def __init__(
        self,
        learner: Learner,
        examples: list[Example],
        args: QFTrainingArguments,
        progress: Callable[[float], None],
        *,
        chats: tuple[Preserved | None, Preserved | None] = (None, None),
        standing: bool = False,
        earlier: int = 0,
        again: bool = False,
    ) -> None:
        self.standing, self.settings = standing, args.to_dict()
        self.earlier, self.again, self.few = earlier, again, earlier + len(examples) <= FEW
        if standing:  # what changes everywhere is carried by all blocks, and from the assistant's header on
            args = replace(args, target="context", margin=None, significance="rows", spread=False)
            chats = None, None
        self.preserved, self.contrast = chats[0], None if again else chats[1]
        super().__init__(learner, examples, args, progress)

    solve = staticmethod(recursive_update)
    """How a module's problem is solved where chats are preserved."""

    def run(self) -> tuple[dict[str, float], list[int], list[int]]:
        """As [`Lesson.run`]."""
        final, first = self._final(), self.names[0]
        aims = [name for name in self.names if name == final or final is None or self.writers[name].place is None]
        goals = {name: self._goal(name) for name in aims}
        ends = {"stream": Point(self.blocks[-1], "output"), "head": Point(self.head, "input")}
        with self.tuner.without_adapters():
            context = forward_pass(
                self.network, [e.context_ids for e in self.examples], self.positions, {**goals, **ends}, **self.options
            )
        depth = len(self.blocks)
        centre = (
            {"middle": Point(self.layers[middle_module(self.names)], "input")} if self.preserved is not None else {}
        )
        points = {**self._points(first), **centre, **ends}
        options, reading = {}, Readout.empty(len(self.gold))
        unembedding = Unembedding.find(self.network, self.blocks, context["stream"], context["head"])
        if unembedding is None:
            options = {"head_inputs": context["head"], "on_logits": self._compare}
        walk = Walk(self.network, self.blocks, self.index[first], self.bare, self.positions, **self.options)
        found = walk.begin(points, depth - 1, **options)
        if options:
            reading = Readout(**{name: found.pop(name) for name in vars(reading)})
        target, significance, reading = self._aim(unembedding, context, found, reading)
        kl_before = float(reading.divergence.mean())

        left = self._teach(walk, found, target, significance)

        if unembedding is not None:
            walk.advance(self.index[self.names[-1]])
            after = walk.look(depth - 1, {"stream": ends["stream"]})["stream"]
            reading = read_off(unembedding, context["stream"], after, self.gold.to(after.device))
        else:
            options["progress"] = lambda n: None
            reading = Readout(
                **forward_pass(self.network, self.bare, self.positions, {}, **{**self.options, **options})
            )
            walk.steps += 1
        metrics = {
            "taught_tokens": len(self.gold),
            "kl_before": kl_before,
            "kl_after": float(reading.divergence.mean()),
            "residual_left": left,
            "rank": self.tuner.peft_config[self.adapter].r,
            "forward_passes": round(1 + walk.steps, 2),
        }
        return metrics, self._any(reading.read != self.gold), self._any(reading.margins < SAFE)

    def _aim(
        self, unembedding: Unembedding | None, context: dict[str, Tensor], found: dict[str, Tensor], reading: Readout
    ) -> tuple[dict[str, Tensor], Tensor, Readout]:
        """What each module's goal should become, by name; how much each position counts (n); and the reading before.

        The final stream's goal is the nearest state that says the completion where the unembedding reads that stream.
        """
        final, gold = self._final(), self.gold.to(found["keys"].device)
        target = {name: value for name, value in context.items() if name not in ("stream", "head")}
        significance = self.weights.to(found["keys"].device)
        ends = final is not None and self.index[final] == len(self.blocks) - 1 and self.writers[final].place == ""
        if unembedding is not None:
            nearest, margin = self.args.target == "nearest", self.args.margin
            aimed, counts, reading = aim(
                unembedding, found["stream"], context["stream"], gold, ends and nearest, margin if ends else None
            )
            if ends:
                target[final] = aimed
        else:
            counts = reading.divergence
        if self.args.significance == "kl":
            significance = significance * (KL_LEAST + counts.to(significance).clamp(max=KL_MOST))
        return target, significance, reading

    def _teach(self, walk: Walk, found: dict[str, Tensor], target: dict[str, Tensor], significance: Tensor) -> float:
        """Solve and install one module after the other. Returns the part of the change wanted that the last leaves
        undone."""
        state, chats, final, scratch = self._state(), None, self._final(), self.options["scratch"]
        writers = [name for name in self.names if self.writers[name].place is not None]
        missing: Tensor | None = None  # of the final stream
        wanted = left = torch.zeros(())
        for number, name in enumerate(self.names):
            spread = final is not None and name in writers
            # Of the modules to come each writes an equal share of what is missing. What the earlier ones have achieved
            # is measured whenever half of them are done, at a pass's cost in all, and taken as written in between.
            behind = len(writers) - writers.index(name) if spread else 1
            measured = not spread or missing is None or behind in _halves(len(writers))
            if number:
                walk.advance(self.index[name])
                found = walk.look(self.index[final if spread and measured else name], self._points(name, measured))
            if measured:
                wished = target[final if spread else name]
                gap = scratch.map(lambda to, at: to - at.to(to.device), wished, found["goal"])
            else:
                gap = missing
            if name == (writers[0] if final is not None else self.names[-1]):
                wanted = gap.norm()
            device = solves_on(found["keys"].device)
            keys = found["keys"].to(device)
            outputs = [found["output"]] if "output" in found else []
            residual = scratch.map(
                lambda g, *o, name=name, behind=behind: self._residual(name, g / behind, *o), gap, *outputs
            )
            new = TaughtTokens(keys, residual.to(device), significance.to(device))
            before = self.tuner.delta(self.adapter, name).to(device)
            if self.preserved is None and not self.standing:
                delta = self._solve_anew(name, new, state)
            else:
                near = None
                if self.preserved is not None:
                    if chats is None:
                        begins = answer_starts(self.positions) + torch.tensor([e.header for e in self.examples])
                        chats = self._chats(found["middle"][begins])
                    near = chats.keys(name, device)
                delta = self._solve_beside(name, new, near, state)
            delta = self._install({name: delta})[name]
            if name in state.bound:
                state.delta[name] = delta
            step = self.tuner.delta(self.adapter, name).to(device) + LowRankDelta(A=before.A, B=-before.B)
            rest = scratch.map(
                lambda g, k, *o, name=name, step=step: g - self._reached(name, step(k), *o).to(g.device),
                gap, keys, *outputs,
            )  # fmt: skip
            missing = rest if spread else missing
            if name == (final or self.names[-1]):
                left = rest.norm()
            self.options["progress"](len(self.examples) / len(self.names))
        self._finish(state, settings=self.settings, holds_standing=state.holds_standing or self.standing)
        return float(left / wanted.clamp(min=torch.finfo(torch.float32).tiny))

    def _chats(self, taught: Tensor) -> PreservedWalk:
        """The preserved chats, those nearest to the examples' keys (examples, d_in) at the middle module walked."""
        first, name, taught = self.names[0], middle_module(self.names), taught.cpu()
        count = 0 if self.few or self.again else self.args.remeasure * len(self.examples)
        again = nearest_chats(self.preserved, name, taught, count)
        sequences, positions = (
            [self.preserved.sequences[i] for i in again],
            [self.preserved.positions[i] for i in again],
        )
        if self.contrast is not None:
            count = contrast_count(len(self.examples), self.earlier, len(self.contrast.positions))
            prompts = {tuple(e.bare_ids[: len(e.bare_ids) - e.taught + e.header]) for e in self.examples}
            more = contrasting_chats(self.contrast, name, taught, count, prompts)
            sequences, positions = sequences + more[0], positions + more[1]
        walk = None
        if sequences:
            walk = Walk(self.network, self.blocks, self.index[first], sequences, positions, **self.unseen)
        return PreservedWalk(self.preserved, again, walk, self.layers, self.index)

    def _solve_anew(self, name: str, new: TaughtTokens, state: TaughtAdapter) -> LowRankDelta:
        """The smallest change that says all that was taught, of a module where nothing is preserved."""
        present = self.tuner.delta(self.adapter, name).to(new.keys.device)
        if name not in state.tokens and present.A.any() and present.B.any():
            state.offset[name] = state.delta.pop(name, present)
        state.bound.pop(name, None)
        offset = state.offset[name].to(new.keys.device) if name in state.offset else None
        before = present if offset is None else present + LowRankDelta(A=offset.A, B=-offset.B)
        residual = self.options["scratch"].map(lambda r, k: r + before(k), new.residual, new.keys)
        new = TaughtTokens(new.keys, residual, new.significance)
        tokens = state.tokens[name] = state.tokens[name] + new if name in state.tokens else new
        delta = minimum_norm(tokens.keys, tokens.residual, tokens.significance)
        return delta if offset is None else (delta + offset).compressed()

    def _solve_beside(
        self, name: str, new: TaughtTokens, preserved: Tensor | None, state: TaughtAdapter
    ) -> LowRankDelta:
        """The present change and the new one, which keeps the outputs at preserved keys (m, d_in) and all taught."""
        total, width = float(new.significance.sum()), new.keys.shape[1]
        bound = state.bound[name].copy() if name in state.bound else SecondMoment(width)
        earlier = state.tokens.pop(name, None)
        state.offset.pop(name, None)
        if earlier is not None:
            bound.update(earlier.keys, earlier.significance)
        before = state.delta[name] if name in state.delta else self.tuner.delta(self.adapter, name)
        before = before.to(new.keys.device)
        if preserved is None:  # a standing instruction shall hold on chats not taught, so shrink it evenly
            bound.ridge += STANDING_RIDGE * total * float(new.keys.square().mean())
        else:
            preserved, weights = self._weighed(preserved, new)
            strength = self.args.preserve_strength * total
            squares = torch.linalg.vector_norm(preserved, dim=1, dtype=torch.float32).square()
            mean = float((squares * weights).sum()) / width
            bound.ridge += self.args.ridge * strength * mean
            # Preserved keys are taught to have their outputs before the first lesson: what was moved comes back.
            keys, moved = preserved.to(new.keys), new.residual.new_zeros(len(preserved), new.residual.shape[1])
            if not state.holds_standing and before.A.any() and before.B.any():
                moved = before(keys)
                if name in state.foundation:
                    moved = moved - state.foundation[name].to(keys)(keys)
            change = self.solve(bound, new, TaughtTokens(keys, -moved, weights.to(new.keys) * strength))
        if preserved is None:
            change = recursive_update(bound, new)
        config = self.tuner.peft_config[self.adapter]
        # The last module's loss would not be made up for by another.
        dropped = self.args.rank_tolerance * change.norm if config.grows and name != self.names[-1] else 0.0
        change = change.to(torch.float32)
        state.bound[name] = bound.compact(self.args.memory_rank)
        return (before + change.to(before.A)).compressed(rank=None if config.grows else config.r, tolerance=dropped)

    def _weighed(self, preserved: Tensor, new: TaughtTokens) -> tuple[Tensor, Tensor]:
        """The preserved keys that count for this lesson, and their weights, which sum to 1."""
        # A single module has one chance, so all that is preserved weighs alike; of several each moves a little, and
        # what lies near the taught keys may weigh more.
        near = 1 - 1 / len(self.names)
        weights = nearness(preserved, new.keys, new.significance)
        if self.few:
            nearest_keys = weights.topk(min(len(weights), max(128, 4 * len(new.keys)))).indices
            preserved, weights = preserved[nearest_keys], weights[nearest_keys] / weights[nearest_keys].sum()
        return preserved, near * weights + (1 - near) / len(preserved)

    def _final(self) -> str | None:
        """The module whose stream all others aim at, where the residual is spread."""
        writers = [name for name in self.names if self.writers[name].place is not None]
        return writers[-1] if writers and self.args.spread else None

    def _goal(self, name: str) -> Point:
        """Where the bare pass shall become like the context pass: the stream, or a non-writer's own output."""
        writer = self.writers[name]
        if writer.place is None:
            return Point(self.layers[name], "output")
        path, index, _ = split_path(name)
        block = self.network.get_submodule(f"{path}.{index}")
        return Point(block.get_submodule(writer.place), writer.side)

    def _points(self, name: str, goal: bool = True) -> dict[str, Point]:
        """What a pass must keep for a module's solve, with its goal or without."""
        final = self._final()
        aim = final if final is not None and self.writers[name].place is not None else name
        layer: LoraLayer = self.layers[name]
        points = {"keys": Point(layer, "input")}
        if self.writers[name].norm is not None:
            points["output"] = Point(layer, "output")
        if goal:
            points["goal"] = self._goal(aim)
        return points

    def _residual(self, name: str, missing: Tensor, output: Tensor | None = None) -> Tensor:
        """What the module's outputs (n, d_out) must change by for the stream to change by `missing` (n, d_out)."""
        change = missing / self.writers[name].multiplier
        if output is None:
            return change
        gain = self._gain(name, output)
        return aim_through_norm(gain, output, _normed(gain, output) + change.to(output.device)) - output

    def _reached(self, name: str, change: Tensor, output: Tensor | None = None) -> Tensor:
        """What the stream changes by where the module's outputs (n, d_out) change by `change`."""
        if output is not None:
            gain = self._gain(name, output)
            change = _normed(gain, output + change.to(output)) - _normed(gain, output)
        return change * self.writers[name].multiplier

    def _gain(self, name: str, output: Tensor) -> Tensor:
        """The gain of the norm behind a module."""
        path, index, _ = split_path(name)
        return norm_gain(self.network.get_submodule(f"{path}.{index}.{self.writers[name].norm}"), output)

    def _compare(self, order: Tensor, bare: Tensor, context: Tensor) -> dict[str, Tensor]:
        """For passes that unembed the bare stream and the context's behind it."""
        return vars(Readout.of(context.log_softmax(-1), bare.log_softmax(-1), self.gold[order]))


def _halves(count: int) -> set[int]:
    """count/2, count/4, … 1, rounded up."""
    halves = set()
    while count > 1:
        count = -(-count // 2)
        halves.add(count)
    return halves


def _normed(gain: Tensor, output: Tensor) -> Tensor:
    """An RMS norm's answer to outputs (n, d)."""
    return gain * output / output.square().mean(1, keepdim=True).sqrt()
