"""Lessons of one adapter: which rows are taught together and how, what binds them, and what is taught again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import psutil
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..adapter.widening import further_modules, widen
from ..data.ledger import entry, joined, question_key
from ..data.rows import Example, Row
from ..evaluate.subject import Subject
from ..forward.blocks import find_blocks, is_attention, linear_shape, split_path
from ..forward.residual_stream import grows_with_depth, trace_writers
from ..runtime.processes import exchange, world_size
from .arguments import QFTrainingArguments
from .constants import CROWDED, LEAD, SAFE, WORDINGS
from .joint_lesson import JointLesson, suits, writers_late
from .lesson import Learner, together, unsaid
from .module_sweeps import ModuleSweeps
from .preserved_chats import Chat
from .preserved_keys import Preserved
from .preserved_moments import PreservedMoments, preserved_moments
from .preserved_statistics import PreservedStatistics
from .preserved_walk import preserved_and_contrasting
from .standing import split_lessons

logger = logging.get_logger(__name__)


class Lessons:
    """Teaches rows to a subject's adapter.

    Args:
        subject: whose adapter.
        args: the settings.
        chats: the chats to preserve, or what was measured of some; None: the model's own.
        progress: advanced by the rows.
    """

    def __init__(
        self,
        subject: Subject,
        args: QFTrainingArguments,
        chats: list[Chat] | PreservedStatistics | None,
        progress: tqdm,
    ) -> None:
        self.subject, self.args, self.chats, self.progress = subject, args, chats, progress
        self.tuner, self.adapter, self.encoder = subject.tuner, subject.adapter_name, subject.encoder
        self.learner = Learner(self.tuner, self.adapter, subject.network, self.encoder)

    def reset(self) -> None:
        """Make the adapter what it was before its first lesson, or where its weights were changed by others."""
        taught = self.tuner.taught.pop(self.adapter, None)
        self.tuner.clear(self.adapter)
        if taught is not None and taught.foundation:
            self.tuner.install(self.adapter, taught.foundation)

    def teach(self, rows: list[Row]) -> dict[str, float]:
        """Teach rows beside what binds, and note them. Returns metrics."""
        start, earlier = time.perf_counter(), len(self.subject.facts)
        joint = self.joint([self.encoder.encode(rows[0])])
        if self.args.preserve_strength == 0:
            self._warn_of_harm()
        moments = self.moments(rows) if joint else None
        chats = (None, None) if joint else self.preserved(len(rows))
        # A pretrained model answers most questions otherwise with any system message, a fact's too: none stands there.
        lessons = [(rows, False)] if joint else self._split(rows, chats[0])
        self.progress.total = self.progress.n + 3 * sum(len(taught) for taught, _ in lessons) // world_size()
        results, misread, entries, missed = [], [], [], []
        own = {id(row) for row in rows}  # the others are preserved chats, taught with a standing instruction
        before = self.tuner.taught.get(self.adapter)
        holds_standing = (before is not None and before.holds_standing) or any(standing for _, standing in lessons)
        sweeps = ModuleSweeps(self.subject, self.learner, chats, holds_standing, self.progress.update)
        for taught, standing in lessons:
            if joint:
                found = JointLesson(self.learner, taught, moments, self.args, self.progress.update).run()
            else:
                found = sweeps.run(taught, self.args, standing)
            metrics, unread, left = found
            results.append(metrics)
            misread += [taught[i] for i in unread if id(taught[i]) in own]
            missed += [taught[i] for i in left if id(taught[i]) in own]
            entries += [entry(row, standing) for row in taught if id(row) in own]
        now = self.tuner.taught[self.adapter]
        entries = joined(now.entries, entries)
        rehearsed = now.rehearsed if earlier else len(entries)
        divergence = results[-1].get("kl_preserved")
        self.tuner.taught[self.adapter] = replace(now, entries=entries, rehearsed=rehearsed, divergence=divergence)
        gently = joint or any(m.get("strength", 0) > self.args.preserve_strength for m in results)
        # A pretrained model's own wording is nearly always another; there what is not said is what matters.
        self._warn(rows, [] if joint else misread, missed if gently else [], len(entries))
        counts = [len(taught) for taught, _ in lessons]
        return {
            "facts": len(rows), "chats": sum(counts) - len(rows), **together(results, counts), "unread": len(misread),
            "unsaid": len(missed), "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _split(self, rows: list[Row], preserved: Preserved | None) -> list[tuple[list[Row], bool]]:
        """The rows in the lessons that they are taught in, and whether it is a standing instruction's."""
        prompts = [p for p in preserved.prompts if p is not None] if preserved and self.args.standing else []
        return split_lessons(
            rows, prompts, lambda rows, instructed: self.subject.answers(rows, instructed, self.progress)
        )

    def _warn_of_harm(self) -> None:
        """Nothing is preserved: in several blocks of a pretrained model, whose stream an early write is large beside,
        that breaks it."""
        blocks = {split_path(name)[1] for name in self.tuner.adapter_layers(self.adapter)}
        if len(blocks) > 1 and self.tuner.grows is None:
            with self.tuner.without_adapters():
                self.tuner.grows = grows_with_depth(self.subject.network)
        if len(blocks) > 1 and self.tuner.grows:
            logger.warning(
                f"nothing is preserved (preserve_strength=0) and {len(blocks)} blocks of a pretrained model change: "
                "it may say nothing but gibberish then; leave preserve_strength at its default, or name one late block "
                "(layers_to_transform), as in the paper"
            )

    def _warn(self, rows: list[Row], misread: list[Row], missed: list[Row], facts: int) -> None:
        """Name the rows that the model does not read in context, and those that do not fit the budget."""
        if misread:
            logger.warning(
                f"{len(misread)} of {len(rows)} rows are not read in context: with its instruction the model gives "
                f"another answer than the completion (rows {_shown(misread)})"
            )
        if missed:
            allowed = self.args.divergence_of(facts)
            logger.warning(
                f"{len(missed)} of {len(rows)} rows are not said after the lesson (rows {_shown(missed)}): they do not "
                f"fit beside what is preserved, at max_divergence={allowed:.2g}; raise it, give other "
                "wordings of their questions, or teach fewer rows at once"
            )

    def rehearse(self, new: set[str]) -> bool:
        """Once the ledger has grown enough, teach again those of its entries that the model no longer says, but for
        the `new` questions. Returns whether it had."""
        taught = self.tuner.taught[self.adapter]
        rows = [e.row() for e in taught.entries if not e.standing and question_key(e) not in new]
        growth = self.args.rehearse
        if not rows or not growth or self.args.preserve_strength == 0 or taught.facts < growth * taught.rehearsed:
            return False
        self.tuner.taught[self.adapter] = replace(taught, rehearsed=taught.facts)
        examples = [self.encoder.encode(row) for row in rows]
        joint = self.joint(examples)
        for _ in range(1 if joint else self.args.sweeps):
            missed = unsaid(self.subject.network, examples, LEAD if joint else SAFE, **self.subject.pass_options)
            rows, examples = [rows[i] for i in missed], [examples[i] for i in missed]
            if not examples:
                break
            self.progress.total = (self.progress.total or self.progress.n) + 3 * len(rows) // world_size()
            if joint:
                JointLesson(self.learner, rows, self.moments(rows), self.args, self.progress.update).run()
            else:
                chats = self.preserved(len(rows))
                sweeps = ModuleSweeps(self.subject, self.learner, chats, taught.holds_standing, self.progress.update)
                sweeps.run(rows, replace(self.args, sweeps=1), standing=False)
        return True

    def joint(self, examples: list[Example]) -> bool:
        """Whether lessons are solved jointly (see `joint_lesson.py`): two passes of a few tokens of the first of the
        examples, or of a question where there are none."""
        network = self.subject.network
        question = Row(0, "", "Who are you?", None)
        ids = examples[0].bare_ids if examples else self.encoder.prompt_ids(question, instructed=False)
        blocks, names = find_blocks(network)[1], list(self.tuner.adapter_layers(self.adapter))
        with self.tuner.without_adapters():
            trace_writers(network, blocks, names, ids[:8], self.tuner.writers)
            return suits(network, names, blocks, self.tuner.writers, ids[:8], self.args)

    def moments(self, rows: list[Row]) -> PreservedMoments:
        """What must stay where lessons are solved jointly, of all late modules of the kinds that a lesson of these rows
        writes into."""
        if (further := self.further(rows)) and self._holds(further):
            widen(self.tuner, self.adapter)
        # Of all that a first lesson chooses from: a later one, bound to what that chose, finds the same in the cache.
        kinds, layers = set(map(is_attention, self.modules(rows))), self.tuner.adapter_layers(self.adapter)
        late = {name: layers[name] for name in self._late(layers) if is_attention(name) in kinds}
        network, options = self.subject.network, self.subject.pass_options
        with self.tuner.without_adapters():
            if isinstance(self.chats, PreservedStatistics):
                return self.chats.of(network, self.encoder, late, **options)
            return preserved_moments(network, self.encoder, late, self.chats, self.args, self.progress.update)

    def modules(self, rows: list[Row]) -> dict[str, nn.Module]:
        """The modules of this adapter that a joint lesson of these rows may write into, by name: all of the later half
        that write into the stream where the user named them; of those chosen here attention's, unless crowded."""
        layers, taught = self.tuner.adapter_layers(self.adapter), self.tuner.taught.get(self.adapter)
        late = self._late(layers)
        if taught is not None and (bound := [name for name in late if name in taught.bound]):
            return {name: layers[name] for name in bound}
        attention = [name for name in late if is_attention(name)]
        if not self.tuner.peft_config[self.adapter].modules_by_default:
            return {name: layers[name] for name in late}
        if attention and isinstance(self.chats, PreservedStatistics) and not self._measured(late):
            late = attention
        few = attention and not self._crowded(rows, attention)
        return {name: layers[name] for name in (attention if few else late)}

    def further(self, rows: list[Row]) -> list[str]:
        """Modules that the adapter does not have yet and a first lesson of these rows takes in, all of the later half:
        the MLPs', where attention's are crowded and all of them write into the stream alike."""
        names, found = further_modules(self.tuner, self.adapter), {}
        if not names or not self._crowded(rows, self._late(self.tuner.adapter_layers(self.adapter))):
            return []
        network, blocks = self.subject.network, find_blocks(self.subject.network)[1]
        ids = self.encoder.encode(rows[0]).bare_ids[:8]
        with self.tuner.without_adapters():
            trace_writers(network, blocks, names, ids, found)
        plain = all(writer.place is not None and writer.norm is None for writer in found.values())
        late = writers_late(names, found, len(blocks)) if plain else []
        if isinstance(self.chats, PreservedStatistics) and not self._measured(late):
            return []
        self.tuner.writers.update(found)
        return late

    def _holds(self, names: list[str]) -> bool:
        """Whether the host has room for the moments of these modules, with as much left; of several all must have."""
        widths = [linear_shape(self.subject.network.get_submodule(name))[0] for name in names]
        size, free = 8 * sum(width**2 for width in widths), psutil.virtual_memory().available
        if all(exchange(size <= free / 2)):
            return True
        logger.warning(
            f"these rows crowd attention's output projections, and the MLPs' are left as they are: what must stay of "
            f"them takes {size / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free; teach fewer rows at once"
        )
        return False

    def _late(self, layers: Mapping[str, nn.Module]) -> list[str]:
        return writers_late(list(layers), self.tuner.writers, len(find_blocks(self.subject.network)[1]))

    def _measured(self, names: list[str]) -> bool:
        """Whether the statistics given are of these modules too."""
        return all(name in self.chats.measured.moments for name in names)

    def _crowded(self, rows: list[Row], names: list[str]) -> bool:
        """Whether the rows' tokens, their wordings' included, are too many for these modules, which read so much."""
        columns = sum(self.tuner.adapter_layers(self.adapter)[name].in_features for name in names)
        tokens = sum(self.encoder.encode(row).taught for row in rows if row.completion is not None)
        return (1 + WORDINGS) * tokens > CROWDED * columns

    def statistics(self) -> PreservedStatistics:
        """The same, to be saved."""
        if isinstance(self.chats, PreservedStatistics):
            return self.chats
        moments, network, options = self.moments(self.subject.rows), self.subject.network, self.subject.pass_options
        with self.tuner.without_adapters():
            return PreservedStatistics.measure(moments, network, self.encoder, **options)

    def preserved(self, rows: int) -> tuple[Preserved | None, Preserved | None]:
        """The preserved and the contrast chats of a lesson of so many rows, module by module.

        Raises:
            ValueError: only what was measured of chats is given.
        """
        if isinstance(self.chats, PreservedStatistics):
            raise ValueError(
                "preserve_dataset holds statistics, which serve joint lessons alone: pretrained models', with the "
                "default target and modules that write into the stream; give chats, or leave it out"
            )
        known = len(self.subject.facts)
        return preserved_and_contrasting(self.learner, self.chats, self.args, rows, known, self.progress.update)


def _shown(rows: list[Row]) -> str:
    """Rows by number or, from the ledger, by prompt; the first twenty."""
    shown = ", ".join(str(row.index) if row.index >= 0 else repr(row.prompt) for row in rows[:20])
    return shown + (", …" if len(rows) > 20 else "")
