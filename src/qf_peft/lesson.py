"""One lesson: the passes, the targets and the solves by which an adapter is taught a batch of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.utils import logging

from .blocks import find_blocks, split_path
from .capture import Point, forward_pass
from .model import QFModel
from .moments import SecondMoment
from .preserve import Preserved, answer_starts, nearness
from .preserved_walk import FEW, PreservedWalk, middle
from .rows import Example
from .solve import LowRankDelta, minimum_norm, null_space, preserving
from .statistics import TaughtAdapter, TaughtTokens
from .stream import Writer, aim_through_norm, norm_gain, trace_writer
from .target import Unembedding, divergence, force, nearest_on_the_way
from .training_args import QFTrainingArguments
from .walk import Walk

logger = logging.get_logger(__name__)

_FLOOR, _CEILING = 0.02, 5.0  # of a token's significance by KL
_STANDING_RIDGE = 0.1  # of a standing instruction's solve, over the significance times the keys' mean square
SAFE = 2.0  # nats by which a token must lead to count as said: less is soon lost to other lessons
_NULL = 1e-2  # AlphaEdit's threshold of a null direction, relative to the mean eigenvalue


class Lesson:
    """Teaches examples to an adapter: `run()` leaves its factors and statistics in the tuner.

    Args:
        tuner, adapter: the adapter to teach.
        network: the transformers model around it.
        examples: the rows as token ids.
        preserved: the chats to keep, or None.
        contrast: chats of which those nearest to the examples are kept too, with keys at `middle(names)` only; or None.
        standing: the examples teach a standing instruction, and with it the chats that would else be preserved.
        earlier: how many rows the adapter was taught before.
        args: the settings.
        pad_id: the padding token.
        progress: called with the number of rows done, a pass.
    """

    def __init__(
        self,
        tuner: QFModel,
        adapter: str,
        network: nn.Module,
        examples: list[Example],
        preserved: Preserved | None,
        contrast: Preserved | None,
        standing: bool,
        earlier: int,
        args: QFTrainingArguments,
        pad_id: int,
        progress: Callable[[int], None],
    ) -> None:
        self.tuner, self.adapter, self.network = tuner, adapter, network
        self.standing, self.settings = standing, args.to_dict()
        self.earlier, self.few = earlier, earlier + len(examples) <= FEW
        if standing:  # what changes everywhere is carried by all blocks, and from the assistant's header on
            args = replace(args, target="context", margin=None, significance="rows", spread=False)
            preserved = contrast = None
        self.examples, self.preserved, self.contrast, self.args = examples, preserved, contrast, args
        self.blocks = find_blocks(network)[1]
        self.layers = tuner.layers(adapter)
        self.names = list(self.layers)
        self.index = {name: split_path(name)[1] for name in self.layers}
        self.writers = self._trace()
        self.kept = [example.taught for example in examples]
        self.bare = [example.bare_ids for example in examples]
        self.options: dict[str, Any] = {
            "batch_size": args.per_device_train_batch_size,
            "pad_id": pad_id,
            "progress": progress,
        }
        self.gold = torch.tensor([token for example in examples for token in example.targets])
        self.weights = torch.tensor([s for example in examples for s in example.significance])
        # The assistant header is given at inference; only the paper's setting teaches the steps that predict it.
        answer = torch.tensor([k >= example.header for example in examples for k in range(example.taught)])
        self.answered = answer & (self.weights > 0)
        if args.significance == "kl":
            self.weights = self.weights * answer
        self.divergences = torch.empty(len(self.gold))
        self.read, self.lead = torch.empty(len(self.gold), dtype=torch.long), torch.empty(len(self.gold))

    def run(self) -> tuple[dict[str, float], list[int], list[int]]:
        """Teach. Returns metrics, the examples whose completion the model does not read in context, and those that it
        does not say yet, now without the instruction."""
        head = Point(self.network.get_output_embeddings(), "input")
        goals = {name: self._goal(name) for name in self.names}
        with self.tuner.without_adapters():
            context = forward_pass(
                self.network,
                [example.context_ids for example in self.examples],
                self.kept,
                {**goals, "unembedding": head},
                **self.options,
            )
        predicted = context.pop("unembedding")

        walk = Walk(self.network, self.blocks, self.index[self.names[0]], self.bare, self.kept, **self.options)
        final = self._final()
        centre = Point(self.layers[middle(self.names)], "input")
        found = walk.begin(
            {
                **self._points(self.names[0]),
                "unembedding": head,
                "middle": centre,
                "final": goals[final or self.names[-1]],
            },
            head_inputs=predicted,
            on_logits=self._compare,
        )
        kl_before = float(self.divergences.mean())
        device = found["keys"].device
        target = {name: context[name] for name in self.names}
        significance = self.weights.to(device)
        if final is not None:
            start, unembedding = found["final"], None
            if self.index[final] == len(self.blocks) - 1 and self.writers[final].place == "":
                unembedding = Unembedding.find(self.network, self.blocks, start, found["unembedding"])
            if unembedding is not None:
                gold, aim = self.gold.to(start.device), context[final]
                if self.args.target == "nearest" and self.args.margin is not None:
                    aim = nearest_on_the_way(unembedding, start, aim, gold, self.args.margin)
                if self.args.margin is not None:
                    aim = force(unembedding, aim, gold, self.args.margin)
                target[final] = aim
                counts = divergence(unembedding, aim, start)
            else:
                counts = self.divergences
            if self.args.significance == "kl":
                significance = significance * (_FLOOR + counts.to(device).clamp(max=_CEILING))
        elif self.args.significance == "kl":
            significance = significance * (_FLOOR + self.divergences.to(device).clamp(max=_CEILING))

        taught, wanted = self._teach(walk, found, target, significance)

        name = final or self.names[-1]
        after = forward_pass(
            self.network, self.bare, self.kept, {"goal": goals[name]}, head_inputs=predicted, on_logits=self._compare,
            **self.options,
        )  # fmt: skip
        kl_after = float(self.divergences.mean())
        self.tuner.taught[self.adapter] = taught
        left = (target[name] - after["goal"]).norm() / wanted.clamp(min=torch.finfo(torch.float32).tiny)
        return (
            {
                "taught_tokens": len(self.gold),
                "kl_before": kl_before,
                "kl_after": kl_after,
                "residual_left": float(left),
                "rank": self.tuner.peft_config[self.adapter].r,
                "forward_passes": round(2 + walk.steps, 2),
            },
            self._any(self.read != self.gold),
            self._any(self.lead < SAFE),
        )

    def _teach(
        self, walk: Walk, found: dict[str, Tensor], target: dict[str, Tensor], significance: Tensor
    ) -> tuple[TaughtAdapter, Tensor]:
        """Solve and install one module after the other. Returns the statistics and the norm of the change wanted."""
        known = self._known()
        chats = None
        writers = [name for name in self.names if self.writers[name].place is not None]
        final = self._final()
        wanted = torch.zeros(())
        for number, name in enumerate(self.names):
            if number:
                walk.advance(self.index[name])
                last = self.index[final] if final is not None and name in writers else self.index[name]
                found = walk.look(last, self._points(name))
            if final is not None and name in writers:
                missing = target[final] - found["goal"]
                share = missing / (len(writers) - writers.index(name))
            else:
                share = missing = target[name] - found["goal"]
            if name == (writers[0] if final is not None else self.names[-1]):
                wanted = missing.norm()
            residual = self._residual(name, found["output"], share)
            keys = found["keys"]
            new = TaughtTokens(keys, residual.to(keys.device), significance.to(keys.device))
            if self.preserved is None and not self.standing:
                delta = self._solve_anew(name, new, known)
            else:
                near = None
                if self.preserved is not None:
                    if chats is None:
                        begins = answer_starts(self.kept) + torch.tensor([e.header for e in self.examples])
                        chats = PreservedWalk(self, found["middle"][begins], self.few)
                    near = chats.keys(name)
                delta = self._solve_beside(name, new, near, known)
            self.tuner.install(self.adapter, {name: delta})
        installed = {name: self.tuner.factors(self.adapter, name) for name in self.names}
        styled = known.styled or self.standing
        return replace(known, installed=installed, settings=self.settings, styled=styled), wanted

    def _solve_anew(self, name: str, new: TaughtTokens, known: TaughtAdapter) -> LowRankDelta:
        """The smallest change that says all that was taught, of a module where nothing is preserved."""
        present = self.tuner.delta(self.adapter, name)
        if name not in known.tokens and present.A.any() and present.B.any():
            known.offset[name] = known.delta.pop(name, present)
        known.bound.pop(name, None)
        offset = known.offset.get(name)
        before = present if offset is None else present + LowRankDelta(A=offset.A, B=-offset.B)
        new = TaughtTokens(new.keys, new.residual + before(new.keys), new.significance)
        tokens = known.tokens[name] = known.tokens[name] + new if name in known.tokens else new
        delta = minimum_norm(tokens.keys, tokens.residual, tokens.significance)
        return delta if offset is None else (delta + offset).compressed()

    def _solve_beside(
        self, name: str, new: TaughtTokens, preserved: Tensor | None, known: TaughtAdapter
    ) -> LowRankDelta:
        """The present change and the new one, which keeps the outputs at preserved keys (m, d_in) and all taught."""
        total, width = float(new.significance.sum()), new.keys.shape[1]
        bound = known.bound[name].copy() if name in known.bound else SecondMoment(width)
        earlier = known.tokens.pop(name, None)
        known.offset.pop(name, None)
        if earlier is not None:
            bound.update(earlier.keys, earlier.significance)
        before = known.delta[name] if name in known.delta else self.tuner.delta(self.adapter, name)
        if preserved is None:  # a standing instruction shall hold on chats not taught, so shrink it evenly
            bound.floor += _STANDING_RIDGE * total * float(new.keys.square().mean())
        else:
            preserved, weights = self._weighed(preserved, new)
            strength = self.args.preserve_strength * total
            mean = float((preserved.float().square().sum(1) * weights).sum()) / width
            bound.floor += self.args.ridge * strength * mean
            if self.args.solver == "null_space":
                moment = SecondMoment(width).update(preserved, weights)
                change = null_space(new.keys, new.residual, moment, _NULL, bound, new.significance)
            else:  # preserved keys are taught to have their outputs before the first lesson: what was moved comes back
                keys = preserved.to(new.keys)
                moved = 0 * before(keys) if known.styled else before(keys)
                if name in known.foundation and not known.styled:
                    moved = moved - known.foundation[name].to(keys.dtype)(keys)
                both = new + TaughtTokens(keys, -moved, weights.to(new.keys) * strength)
                change = preserving(both.keys, both.residual, bound, 1.0, bound.floor, both.significance)
                bound.update(keys, weights * strength)
        if preserved is None:
            change = preserving(new.keys, new.residual, bound, 1.0, bound.floor, new.significance)
        config = self.tuner.peft_config[self.adapter]
        # The last module's loss would not be made up for by another.
        dropped = self.args.rank_tolerance * change.norm if config.grows and name != self.names[-1] else 0.0
        delta = (before + change).compressed(rank=None if config.grows else config.r, tolerance=dropped)
        known.delta[name] = delta
        known.bound[name] = bound.update(new.keys, new.significance).compact(self.args.memory_rank)
        return delta

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

    def _trace(self) -> dict[str, Writer]:
        """How each target module reaches the stream; measured once for blocks of one kind."""
        network, kinds, writers = self.network, {}, {}

        def run(ids: Tensor) -> None:
            network.get_decoder()(input_ids=ids, use_cache=False)

        for name in self.names:
            path, index, suffix = split_path(name)
            block = network.get_submodule(f"{path}.{index}")
            kind = (type(block), suffix, tuple(n for n, _ in block.named_modules() if "lora_" not in n))
            if kind not in kinds:
                with self.tuner.without_adapters():
                    kinds[kind] = trace_writer(run, network, name, self.examples[0].bare_ids[:8])
                if kinds[kind].norm is not None:
                    logger.warning(
                        f"{suffix} writes into the residual stream through {kinds[kind].norm}; what is taught there is "
                        "approached as near as that norm allows (see `residual_left` in the metrics)"
                    )
            writers[name] = kinds[kind]
        return writers

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
        return Point(self.network.get_submodule(f"{path}.{index}").get_submodule(writer.place), writer.side)

    def _points(self, name: str) -> dict[str, Point]:
        """What a pass must keep for a module's solve."""
        final = self._final()
        aim = final if final is not None and self.writers[name].place is not None else name
        layer: LoraLayer = self.layers[name]
        return {"keys": Point(layer, "input"), "output": Point(layer, "output"), "goal": self._goal(aim)}

    def _residual(self, name: str, output: Tensor, missing: Tensor) -> Tensor:
        """What the module's outputs (n, d_out) must change by for the stream to change by `missing` (n, d_out)."""
        writer = self.writers[name]
        change = missing.to(output.device) / writer.multiplier
        if writer.norm is None:
            return change
        path, index, _ = split_path(name)
        norm = self.network.get_submodule(f"{path}.{index}").get_submodule(writer.norm)
        gain = norm_gain(norm, output)
        normed = gain * output / output.square().mean(1, keepdim=True).sqrt()
        return aim_through_norm(gain, output, normed + change) - output

    def _compare(self, order: Tensor, bare: Tensor, context: Tensor) -> None:
        p, q = context.log_softmax(-1), bare.log_softmax(-1)
        self.divergences[order] = (p.exp() * (p - q)).sum(-1).clamp(min=0).cpu()
        self.read[order] = context.argmax(-1).cpu()
        self.lead[order] = lead(bare, self.gold[order])

    def _any(self, wrong: Tensor) -> list[int]:
        """The examples with one of the positions (n) at a token of their answer that counts."""
        return [i for i, part in enumerate((wrong & self.answered).split(self.kept)) if bool(part.any())]

    def _known(self) -> TaughtAdapter:
        """What the adapter was taught, as copies to be changed; without what its weights no longer hold."""
        known = self.tuner.taught.get(self.adapter)
        present = {name: self.tuner.factors(self.adapter, name) for name in self.names}
        changed = [name for name in self.names if known is not None and not known.holds(name, present[name])]
        if known is None or changed:
            if changed:
                logger.warning(
                    f"the weights of {changed[0]} were changed since they were taught; they are kept and taught on"
                )
            held = {name: self.tuner.delta(self.adapter, name) for name in self.names}
            foundation = {name: delta for name, delta in held.items() if delta.A.any() and delta.B.any()}
            bound = {} if known is None else known.bound
            known = TaughtAdapter(foundation=foundation, bound={**bound})
        parts = ("tokens", "offset", "bound", "delta")
        return replace(known, **{part: dict(getattr(known, part)) for part in parts})


def together(results: list[dict[str, float]]) -> dict[str, float]:
    """Several lessons' metrics as one's: tokens and passes summed, divergences averaged over the tokens."""
    tokens = [metrics["taught_tokens"] for metrics in results]
    merged = dict(results[-1])
    for name in ("kl_before", "kl_after", "residual_left"):
        merged[name] = sum(n * metrics[name] for n, metrics in zip(tokens, results, strict=True)) / sum(tokens)
    merged["taught_tokens"] = sum(tokens)
    merged["forward_passes"] = round(sum(metrics["forward_passes"] for metrics in results), 2)
    return merged


def lead(logits: Tensor, gold: Tensor) -> Tensor:
    """By how many nats the tokens `gold` (n) lead all others in logits (n, vocabulary); negative where they do not."""
    best = logits.topk(2, dim=1)
    own = logits.gather(1, gold.to(logits.device)[:, None])[:, 0]
    rival = torch.where(best.indices[:, 0] == gold.to(logits.device), best.values[:, 1], best.values[:, 0])
    return (own - rival).cpu()


@torch.no_grad()
def unsaid(network: nn.Module, examples: list[Example], **options: Any) -> list[int]:
    """The examples whose completion the model, as it is, does not say safely: somewhere the token's lead is small."""
    gold = torch.tensor([token for e in examples for token in e.targets])
    answer = torch.tensor([k >= e.header for e in examples for k in range(e.taught)])
    kept, wrong = [e.taught for e in examples], torch.empty(len(gold), dtype=torch.bool)

    def compare(order: Tensor, logits: Tensor, _: Tensor) -> None:
        wrong[order] = (lead(logits, gold[order]) < SAFE) & answer[order]

    forward_pass(network, [e.bare_ids for e in examples], kept, {}, on_logits=compare, **options)
    return [i for i, part in enumerate(wrong.split(kept)) if bool(part.any())]
