"""What must stay of a model, in a file to keep or to publish: other machines then teach it without preparation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..data.rows import Encoder
from ..data.writing import check_folder, saving_to, whole_file
from ..forward.unembedding import head_inputs, log_likelihoods
from ..solve.second_moment import SecondMoment
from .constants import OTHER_MODEL
from .preserved_moments import PreservedMoments

PRESERVED_NAME = "qf_preserved.safetensors"
RANK = 256
_FORMAT = 1


@dataclass(frozen=True)
class PreservedStatistics:
    """
    What the default lesson preserves of a pretrained model: second moments of its modules' keys over its own chats, and
    the chats that are held out. [`QFTrainer.prepare`] measures it, once a model; saved (1 to 50 MB) and published it
    spares others that.

    Whoever has the file can read the chats held out, a tenth of those preserved: publish none that was made from a
    `preserve_dataset` of private chats.

    Example:
        ```python
        trainer.prepare().save_pretrained("smollm2-preserved")     # then, perhaps: hf upload me/smollm2-preserved .
        preserved = PreservedStatistics.from_pretrained("me/smollm2-preserved")
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=facts, preserve_dataset=preserved).train()
        ```
    """

    measured: PreservedMoments = field(repr=False)
    """Of a loaded one `head` is empty: it is the present model's, see `of`."""
    tokenizer: list[str]
    """By what the tokenizer is recognised."""
    likelihoods: list[float]
    """By what the model is: the log likelihood in nats of each token of the held-out chats but their first."""
    base_model: str | None = None
    """The model's name."""
    _heads: WeakKeyDictionary[nn.Module, Tensor] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    @classmethod
    def measure(
        cls, measured: PreservedMoments, network: nn.Module, encoder: Encoder, **options: Any
    ) -> PreservedStatistics:
        """The statistics of a model, its adapters off; the options are those of `forward_pass`."""
        likelihoods = log_likelihoods(network, measured.held_out, _lengths(measured), **options)
        name = Path(str(network.config.name_or_path or ""))
        name = name.name if name.exists() else str(name)  # a path of this machine says nothing elsewhere
        return cls(measured, encoder.identity(), [round(value, 3) for value in likelihoods.tolist()], name or None)

    def of(
        self, network: nn.Module, encoder: Encoder, modules: Mapping[str, nn.Module], **options: Any
    ) -> PreservedMoments:
        """The moments, for lessons of this model, its adapters off; checked once by what it says to the held-out chats.

        Raises:
            ValueError: they are of another model or tokenizer, or hold no moment of one of the modules.
        """
        whose = f"the preserved statistics are of {self.base_model or 'a model without a name'}"
        if encoder.identity() != self.tokenizer:
            raise ValueError(f"{whose}, whose tokenizer or chat template is another; prepare() this model's own")
        for name, module in modules.items():
            if name not in self.measured.moments:
                raise ValueError(
                    f"{whose} and hold nothing of the module {name}; prepare() it with these target_modules"
                )
            width = self.measured.moments[name].width
            if width != module.in_features:
                raise ValueError(f"{whose}, where {name} reads {width} numbers and not {module.in_features}")
        if network not in self._heads:
            chats = self.measured.held_out
            now = log_likelihoods(network, chats, _lengths(self.measured), **options)
            moved = float((now - torch.tensor(self.likelihoods, dtype=now.dtype)).abs().mean())
            if not moved <= OTHER_MODEL:
                raise ValueError(
                    f"{whose}; this one gives the same chats' tokens log likelihoods that lie {moved:.2f} nats away: "
                    "prepare() its own"
                )
            head = head_inputs(network, chats, self.measured.answers, **options)
            self._heads[network] = head.to("cpu", network.get_input_embeddings().weight.dtype)
        return replace(self.measured, head=self._heads[network])

    def save_pretrained(self, folder: str | os.PathLike, *, rank: int = RANK) -> Path:
        """Write one file into a folder.

        Args:
            folder: is made if it is not there.
            rank: how many directions of a module's moment are kept, the largest, in 16 bits; of narrower modules all
                but one. What is left out is bounded and put on the diagonal (see [`SecondMoment.compact`]).

        Returns:
            The file.

        Raises:
            ValueError: `rank` is not positive, or the folder is a file.
            OSError: the file cannot be written; an earlier one is as it was.
        """
        if rank < 1:
            raise ValueError(f"rank={rank!r}; expected a positive integer")
        folder, tensors, ridges = Path(folder).expanduser(), {}, {}
        check_folder(folder)
        for name in self.measured.moments:
            moment = self.measured.moments[name].copy()
            root = moment.compact(min(rank, moment.width - 1)).root
            # Each row by itself: attention sinks' are thousands of times the others, and one bit of theirs an output.
            scale = root.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            tensors[f"root {name}"], tensors[f"scale {name}"] = (root / scale).half().cpu(), scale[:, 0].cpu()
            ridges[name] = moment.ridge
        header = {
            "format": _FORMAT, "base_model": self.base_model, "tokenizer": self.tokenizer, "ridges": ridges,
            "held_out": self.measured.held_out, "answers": self.measured.answers, "likelihoods": self.likelihoods,
        }  # fmt: skip
        with saving_to(folder, "the preserved statistics"):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / PRESERVED_NAME) as file:
                save_file(tensors, file, metadata={"qf_preserved": json.dumps(header)})
        return folder / PRESERVED_NAME

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **hub: Any) -> PreservedStatistics:
        """Read what `save_pretrained` wrote.

        Args:
            name: a folder, or an id on the Hub.
            hub: `revision`, `token`, `cache_dir`, …, as `transformers` takes them.

        Raises:
            OSError: there is no such folder or repository, or it has no such file.
            ValueError: the file is damaged, or of another version.
        """
        name = os.fspath(name)
        try:
            if not Path(name).is_dir():
                validate_repo_id(name)
        except HFValidationError as error:
            raise FileNotFoundError(
                f"no preserved statistics {name}: it is neither a folder nor an id on the Hub; `prepare()` makes them"
            ) from error
        path = cached_file(name, PRESERVED_NAME, **hub)
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["qf_preserved"])
                if header["format"] != _FORMAT:
                    raise ValueError(f"format {header['format']}; this version reads {_FORMAT}")
                moments = {
                    name: _moment(file.get_tensor(f"root {name}"), file.get_tensor(f"scale {name}"), float(ridge))
                    for name, ridge in header["ridges"].items()
                }
            held_out, answers = header["held_out"], [int(count) for count in header["answers"]]
            pairs = list(zip(held_out, answers, strict=True))
            whole = all(
                0 < count < len(ids) and all(isinstance(i, int) and i >= 0 for i in ids) for ids, count in pairs
            )
            if not (pairs and whole and len(header["likelihoods"]) == sum(map(len, held_out)) - len(held_out)):
                raise ValueError("the chats held out are not whole")
            measured = PreservedMoments(moments, held_out, answers, torch.empty(0))
            likelihoods = [float(value) for value in header["likelihoods"]]
            return cls(measured, [str(part) for part in header["tokenizer"]], likelihoods, header["base_model"])
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} does not hold preserved statistics: {error}; make the file anew") from error


def _lengths(measured: PreservedMoments) -> list[int]:
    """How many tokens of each held-out chat are predicted."""
    return [len(ids) - 1 for ids in measured.held_out]


def _moment(root: Tensor, scale: Tensor, ridge: float) -> SecondMoment:
    """A module's moment. Raises ValueError where it cannot be that."""
    if root.ndim != 2 or scale.shape != root.shape[:1] or not len(root) or not 0 <= ridge < math.inf:
        raise ValueError(f"a moment has shape {tuple(root.shape)}, scales {tuple(scale.shape)} and ridge {ridge}")
    rows = root.float() * scale.float()[:, None]
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a moment is not finite")
    moment = SecondMoment.of(rows, rows=True, count=len(rows))
    moment.ridge = ridge
    return moment
