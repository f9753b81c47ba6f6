"""The settings of a QFTrainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .constants import DIVERGENCE, DIVERGENCE_FACTS
from .preserved_cache import CACHE_SIZE, Cache

_HERE = ("activation_memory", "cache_dir", "cache_size", "disable_tqdm", "report_to")  # of this machine and run


@dataclass
class QFTrainingArguments:
    """
    Settings of [`QFTrainer`]. The defaults teach many facts at once and keep the rest; `paper()` is the paper's own.

    Args:
        target (`"nearest"` or `"context"`, defaults to `"nearest"`):
            Where the stream of a taught position should go. "context": the context pass's state, as in the paper.
            "nearest": from the bare pass's state towards the context pass's only until the completion's token leads by
            `margin`, and from there by the smallest step (forced completion) where the model misread its instruction.
            The less is changed the less is disturbed. It needs the last edited block to be the model's last, whose
            output the unembedding reads; elsewhere the context pass's state is taken. On models whose stream grows
            fourfold or more with depth, as pretrained ones' does, "nearest" is solved jointly for the late blocks (see
            `joint_lesson.py`); what is said below of margin, spreading, contrast and sweeps is about the others.
        margin (`float` or `None`, defaults to 6.0):
            By how many nats the completion's token should lead at a taught position. `None` forces nothing.
        significance (`"kl"` or `"rows"`, defaults to `"kl"`):
            "kl": a token counts 0.02 + min(KL, 5), where KL is the divergence from the prediction aimed at to the
            bare one, times the row's own significance. "rows": the row's own alone.
        spread (`bool`, defaults to `True`):
            The last module's residual is what all modules aim at: the i-th of m writes 1/(m − i) of what is still
            missing, and the bare pass is run again behind it (MEMIT, arXiv 2210.07229). Otherwise each module matches
            its own state in context.
        preserve_strength (`float`, defaults to 1.0):
            λ over the taught tokens' total significance: how much keeping the preserved keys' outputs counts against
            teaching. It scales λ with what is taught, so that one value serves one fact and hundreds. 0 preserves
            nothing: the minimum-norm solve.
        ridge (`float`, defaults to 1e-3):
            The weight of ‖ΔW‖² itself, relative to λ times the mean diagonal of the preserved moment.
        preserve_chats (`int`, *optional*):
            How many chats the model writes itself to be preserved where no `preserve_dataset` is given. On models
            whose stream grows with depth by default 16 (up to 400 where the model has less than 125M parameters),
            beside 420 general prompts and 40 plain texts; on others 400.
        max_divergence (`float`, *optional*):
            The mean KL in nats, from the base model's predictions, that a lesson may leave on chats held out of every
            solve (a tenth of those preserved). Beyond it the lesson is solved more gently, until it fits; rows that do
            not fit then are named in a warning (`unsaid` in the metrics). By default 0.1 up to ten facts, at which
            chats read as before, and for more facts so much times the fourth root of a tenth of their number (0.15 for
            fifty, 0.21 for two hundred): each moves a little. LoRA fine-tuning leaves 1 to 1.5 on SmolLM2. With a
            standing instruction in the adapter, which changes every chat, the KL is from the predictions before.
        contrast_chats (`int`, defaults to 2400):
            For lessons of more than ten rows the model writes so many chats itself (once; they are cached), and of
            these the nearest to the taught prompts, twelve a row beyond ten and at most a third of them, are preserved
            too, whether a `preserve_dataset` is given or not: questions like those taught about things not taught.
            0 does without.
        remeasure (`int`, defaults to 4):
            The preserved chats' keys are collected once, with the base weights, and cached. For so many chats a taught
            row, those nearest to what is taught, they are measured again behind every edited block, because by then
            the blocks before have moved them. Lessons of up to ten rows do without: they move them little.
        standing (`bool`, defaults to `True`):
            Whether an instruction that at least five rows (and a tenth of all) share is tried on preserved chats. One
            that changes at least half of the model's answers there is no fact but a standing instruction ("Answer
            briefly."): these chats, with the answers the model gives under it, are then taught with the rows instead
            of preserved, each block towards its own state in context. Not on pretrained models (joint lessons), where
            any system message changes most answers.
        sweeps (`int`, defaults to 3):
            How often facts are taught at most: rows that the model does not say yet after one sweep over the modules
            are taught again in the next, beside all that binds by then.
        rehearse (`float`, defaults to 1.25):
            Whenever the ledger has grown by this factor, its rows are asked, in one bare pass, and those that the model
            no longer says are taught again: a constant cost a row in the long run. 0 does without.
        rank_tolerance (`float`, defaults to 0.1):
            Where the adapter's rank may grow: how much of a lesson's change, in Frobenius norm, may be dropped with the
            adapter's smallest singular values. Each later module makes up for what an earlier one dropped; the last
            drops nothing.
        memory_rank (`int`, defaults to 1024):
            What was taught and preserved binds later lessons through the second moment of its keys. Of a module with a
            larger d_in so many directions are remembered, the largest, whenever they become twice as many; the rest is
            bounded and added to the ridge.
        batch_tokens (`int`, defaults to 4096):
            How many tokens go through the model at once, padding included; rows of like length share a batch. It
            changes the speed and the memory, not the result.
        activation_memory (`float`, *optional*):
            How many GB of activations (keys, residuals, the states between blocks) a lesson may hold in memory. What
            is beyond lies in temporary files (`TMPDIR`, on a disk) and is gone through in blocks; the result is the
            same. The solves take up to some d_in × d_in matrices in float64 besides. By default all is in memory.
        max_new_tokens (`int`, defaults to 256):
            How long an answer may be that the model gives itself, for rows without a completion.
        seed (`int`, defaults to 0):
            Of the chats that the model writes itself. The same seed and data give the same adapter.
        cache_dir (`str` or `Path`, *optional*):
            Where preserved keys are kept, by default `qf_peft` in Hugging Face's cache folder (`HF_HOME`).
        cache_size (`float`, defaults to 20.0):
            How many GB the files there may take together. Beyond it those used longest ago are removed when another is
            written; what is removed is measured anew when it is needed.
        disable_tqdm (`bool`, defaults to `False`):
            Show no progress bar. One appears only on work of more than two seconds, and none where
            `HF_HUB_DISABLE_PROGRESS_BARS` or `transformers.logging.disable_progress_bar()` says so.
        report_to (`str`, `GeneralTracker` or a list of these, *optional*):
            Where the metrics of `train` and `evaluate` go besides: names of accelerate's trackers (`"tensorboard"`,
            `"wandb"`, `"mlflow"`, …; `"all"` that are installed) or tracker objects of your own. By default nowhere.
            Trackers that write files put them into the folder `TENSORBOARD_LOGGING_DIR`, or `runs`.

    Raises:
        ValueError: a value is out of range.
    """

    target: Literal["nearest", "context"] = "nearest"
    margin: float | None = 6.0
    max_divergence: float | None = None
    significance: Literal["kl", "rows"] = "kl"
    spread: bool = True
    preserve_strength: float = 1.0
    ridge: float = 1e-3
    preserve_chats: int | None = None
    contrast_chats: int = 2400
    remeasure: int = 4
    standing: bool = True
    sweeps: int = 3
    rehearse: float = 1.25
    rank_tolerance: float = 0.1
    memory_rank: int = 1024
    batch_tokens: int = 4096
    activation_memory: float | None = None
    max_new_tokens: int = 256
    seed: int = 0
    cache_dir: str | Path | None = None
    cache_size: float = CACHE_SIZE
    disable_tqdm: bool = False
    report_to: Any = None

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_tokens", 1),
            ("max_new_tokens", 1),
            ("contrast_chats", 0),
            ("remeasure", 0),
            ("memory_rank", 1),
            ("sweeps", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                expected = "a positive integer" if least else "an integer from 0 up"
                raise ValueError(f"QFTrainingArguments: {name}={value!r}; expected {expected}")
        chats = self.preserve_chats
        if chats is not None and (not isinstance(chats, int) or isinstance(chats, bool) or chats < 1):
            raise ValueError(f"QFTrainingArguments: preserve_chats={chats!r}; expected a positive integer or None")
        for name, choices in (
            ("target", ("nearest", "context")),
            ("significance", ("kl", "rows")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"QFTrainingArguments: {name}={getattr(self, name)!r}; expected one of {choices}")
        for name, positive in (
            ("preserve_strength", False),
            ("ridge", True),
            ("rank_tolerance", False),
            ("max_divergence", True),
            ("rehearse", False),
            ("cache_size", False),
        ):
            value = getattr(self, name)
            if name == "max_divergence" and value is None:
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0 or (positive and not value):
                expected = "a positive number" if positive else "a number from 0 up"
                raise ValueError(f"QFTrainingArguments: {name}={value!r}; expected {expected}")
        memory = self.activation_memory
        if memory is not None and not (isinstance(memory, (int, float)) and math.isfinite(memory) and memory >= 0):
            raise ValueError(f"QFTrainingArguments: activation_memory={memory!r}; expected a number of GB or None")
        if self.margin is not None and not (isinstance(self.margin, (int, float)) and self.margin > 0):
            raise ValueError(f"QFTrainingArguments: margin={self.margin!r}; expected a positive number or None")

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for JSON; without those that are about this machine and screen only."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _HERE}

    def divergence_of(self, facts: int) -> float:
        """The mean KL that may be left on held-out chats where so many facts are taught (see `max_divergence`)."""
        given = self.max_divergence
        return given if given is not None else DIVERGENCE * max(1.0, facts / DIVERGENCE_FACTS) ** 0.25

    @property
    def cache(self) -> Cache:
        """Where what is measured once is kept."""
        return Cache(self.cache_dir, self.cache_size)

    @property
    def activation_bytes(self) -> float | None:
        """`activation_memory` in bytes."""
        return None if self.activation_memory is None else self.activation_memory * 1e9

    @classmethod
    def paper(cls, **settings) -> QFTrainingArguments:
        """The exact setting of arXiv 2507.04300: each edited block matches its own state in context, by the
        minimum-norm solve, and nothing is preserved. Edit one block: `QFConfig(layers_to_transform=[23])`."""
        given = {
            "target": "context", "margin": None, "significance": "rows", "spread": False, "preserve_strength": 0.0,
            "rank_tolerance": 0.0, "standing": False, "sweeps": 1,
        }  # fmt: skip
        return cls(**{**given, **settings})
