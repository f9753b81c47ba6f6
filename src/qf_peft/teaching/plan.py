"""What a lesson would teach, found without running the model."""

from __future__ import annotations

from typing import Any

from ..adapter.checks import check_teachable
from ..data.ledger import check_consistent, question_key
from ..evaluate.subject import Subject
from ..forward.blocks import find_blocks, split_path
from .constants import HELD_OUT, OWN_CHATS, STRENGTH_TRIES
from .generic_prompts import BRIEF
from .joint_lesson import passes_of
from .lessons import Lessons
from .preserved_moments import general_chats, own_chats
from .preserved_statistics import PreservedStatistics
from .preserved_walk import contrast_count


def plan(subject: Subject, lessons: Lessons) -> dict[str, Any]:
    """What [`QFTrainer.dry_run`] does."""
    if not subject.rows:
        raise ValueError("train_dataset is missing; give a list of dicts or a datasets.Dataset")
    check_teachable(subject.model, subject.adapter_name)
    rows = [row for row in subject.rows if row.completion is not None]
    check_consistent(rows)
    examples = [subject.encoder.encode(row) for row in rows]
    for row in subject.rows:
        if row.completion is None:  # what can be known of it: that the template takes it
            subject.encoder.prompt_ids(row, instructed=True)
    args, facts = lessons.args, {question_key(e): e.completion for e in subject.facts}
    corrected = sum(question_key(row) in facts and facts[question_key(row)] != row.completion for row in rows)
    modules = list(subject.tuner.adapter_layers(subject.adapter_name))
    blocks = [split_path(name)[1] for name in modules]
    depth = len(find_blocks(subject.network)[1])
    # A sweep: the context pass and the bare pass; between the first edited block and the last one the bare pass walks
    # on, looks at each edited block, and (where the residual is spread) looks ahead at a pass's cost in all; then the
    # rest of the way, to see what came of it.
    between = (blocks[-1] - blocks[0]) / depth
    passes = 2 + (2 + args.spread) * between + (1 - blocks[-1] / depth)
    preserves = args.preserve_strength > 0
    chosen = lessons.chats
    given = len(chosen.measured.held_out) if isinstance(chosen, PreservedStatistics) else len(chosen or [])
    holds_out = preserves and (lessons.chats is None or given >= HELD_OUT)  # chats by which a lesson may be tried again
    most = passes * args.sweeps * (STRENGTH_TRIES if holds_out else 1)
    contrasting = preserves and contrast_count(len(subject.rows), len(facts), args.contrast_chats)
    contrast = args.contrast_chats if contrasting else 0
    chats, written = given, (0 if given or not preserves else args.preserve_chats or OWN_CHATS) + contrast
    if lessons.joint(examples):
        modules = [*lessons.modules(rows), *lessons.further(rows)]
        modules.sort(key=lambda name: split_path(name)[1])
        passes, most = passes_of(1 - split_path(modules[0])[1] / depth)
        if lessons.chats is None:
            written = args.preserve_chats or own_chats(subject.network)
            chats = len(general_chats()) + len(BRIEF) + written
        else:
            written = 0
    return {
        "facts": len(subject.rows),
        "unanswered": len(subject.rows) - len(rows),
        "known": len(facts),
        "corrected": corrected,
        "taught_tokens": sum(e.taught for e in examples),
        "tokens": sum(len(e.context_ids) + len(e.bare_ids) for e in examples),
        "longest": max((len(e.context_ids) for e in examples), default=0),
        "modules": modules,
        "chats": chats if preserves else 0,
        "chats_to_write": written,
        "forward_passes": round(passes, 2),
        "forward_passes_at_most": round(most, 2),
    }
