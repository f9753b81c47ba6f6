"""The configuration of a QF adapter, as PEFT sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType

from .loading import refuse_pickles
from .saving import finish_saving

NAME = "QF"  # among PEFT's types

# LoRA's options that would put something else than `B @ A` beside the weight, or change the base model.
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config", "megatron_config", "layer_replication", "target_parameters", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# The other values of `init_lora_weights` change the base weights, or ask for a pass over data of their own.
_INITIAL = (True, False, "gaussian", "orthogonal")


@dataclass
class QFConfig(LoraConfig):
    """
    Configuration of a QF adapter (Quick Feedforward learning, arXiv 2507.04300).

    A QF adapter is a pair of low-rank factors `B @ A` beside each target module, exactly as in LoRA, so everything
    PEFT does with LoRA works; but the factors are solved in closed form by [`QFTrainer`] instead of trained. A fresh
    adapter is zero and changes nothing.

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            The linear modules to teach: names or name endings (`["down_proj"]`, `["mlp.c_proj"]`), or one regular
            expression as a string. By default, in a model whose residual stream grows with depth, as pretrained ones'
            does (measured in one short pass), attention's output projections: `o_proj` in Llama, Mistral, Qwen, Phi-3,
            Granite, Gemma; `attn.c_proj` in GPT-2; `dense` in GPT-NeoX and Falcon. In others, and where there is no
            attention, the module that ends each block's MLP: `down_proj`, `mlp.c_proj`, `dense_4h_to_h`, `fc2`. A first
            lesson of so many tokens that attention's cannot hold them (at SmolLM2 more than about sixty facts) takes
            both kinds, smaller ones attention's alone; where modules are named here, any lesson writes into all of
            them that are in the late half and write into the stream.
            Modules that write into the residual stream (all of these) are taught the stream's change; any other linear
            module (`q_proj`, `up_proj`, …) is taught its own output's change.
        layers_to_transform (`int` or `list[int]`, *optional*):
            The indices of the blocks to teach, from 0. The paper edits one block (23 of the 28 of Qwen2.5-1.5B). By
            default, where the stream grows with depth, the late blocks, chosen at the first lesson: those whose stream
            is at least a quarter of the last one's. Elsewhere every block: the preserving solve itself weighs them, as
            a block whose taught keys cannot be told from preserved ones is changed little and leaves its share to the
            blocks behind it.
        layers_pattern (`str` or `list[str]`, *optional*):
            As in [`LoraConfig`]: the name of the list of blocks, if the model has several.
        exclude_modules (`list[str]` or `str`, *optional*):
            As in [`LoraConfig`].
        r (`int`, *optional*):
            The cap on the adapter's rank: the factors have exactly this rank, padded if the taught tokens need less,
            truncated to the nearest (in Frobenius norm) if they need more. By default `r` grows with what the taught
            tokens need, which is never more than their number; the value saved is the rank reached. (With
            `rank_pattern` nothing grows: `r` is 8 then, as in [`LoraConfig`].)
        lora_alpha (`int`, *optional*):
            As in [`LoraConfig`], the product of the factors counts `lora_alpha / r` times (over √r with `use_rslora`).
            By default it equals `r` and grows with it. What is taught does not depend on it: the solved factors are
            divided by the scale. It matters to those who train on.
        init_lora_weights (`bool` or `str`, defaults to `True`):
            `True`: the adapter starts at zero, by B = 0; A is drawn as in [`LoraConfig`], from a fixed seed.
            `False`, `"gaussian"` and `"orthogonal"` are LoRA's.
        inference_mode (`bool`, defaults to `False`):
            As in [`LoraConfig`], whether the factors are frozen. QF needs no gradients and computes none; whoever
            trains on from a taught adapter does.
        keep_statistics (`bool`, defaults to `True`):
            Whether `save_pretrained` writes beside the weights the ledger of what was taught (`qf_ledger.jsonl`) and
            what binds later lessons (`qf_statistics.safetensors`). Without them a loaded adapter can be stacked, merged
            and taught on, but its facts cannot be listed, corrected or forgotten. Neither is pushed to the Hub.
        grows (`bool`, *optional*):
            Whether `r` grows. Follows from `r`; it is stored so that an adapter loaded again goes on growing.
        modules_by_default (`bool`, *optional*):
            Whether `target_modules` was left out, so that a lesson's size chooses the kinds of modules. Follows from
            `target_modules`; it is stored because a saved configuration names the modules.

    The other options of [`LoraConfig`] are as there: `modules_to_save`, `bias`, `lora_dropout`, `use_rslora`,
    `rank_pattern`, `alpha_pattern`, `trainable_token_indices` and so on. Those under which something else than the
    product of two factors would stand beside a weight, or the base weights would change (`use_dora`, `lora_bias`,
    `layer_replication`, `init_lora_weights="pissa"`, …), are refused. Modules of any place and kind that LoRA takes
    can be given; [`QFTrainer`] teaches linear modules inside the model's blocks, and refuses an adapter of others.

    Raises:
        ValueError: an option of LoRA was set that QF cannot honour, or `r` or `lora_alpha` is not positive.

    Example:
        ```python
        config = QFConfig(target_modules=["down_proj"], layers_to_transform=[23], task_type="CAUSAL_LM")
        model = get_peft_model(base_model, config)
        ```
    """

    r: int | None = field(default=None, metadata={"help": "The cap on the rank; by default what the taught need."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The scale times `r`; by default equal to `r`."})
    keep_statistics: bool = field(default=True, metadata={"help": "Whether what was taught is saved with the adapter."})
    grows: bool | None = field(default=None, metadata={"help": "Whether `r` grows with what is taught."})
    modules_by_default: bool | None = field(default=None, metadata={"help": "Whether lessons choose the modules."})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Load an adapter's configuration from a folder or the Hub, as [`PeftConfig.from_pretrained`] does.

        Raises:
            ValueError: there is none, an option is none of QF's, or the weights beside it are a pickle only.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        finish_saving(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        refuse_pickles(pretrained_model_name_or_path, subfolder, **kwargs)
        if folder.is_dir():
            config._folder = folder  # where the ledger and the statistics may be
        return config

    def __post_init__(self) -> None:
        self._check_types()
        if self.modules_by_default is None:
            self.modules_by_default = self.target_modules is None
        if self.r is None and self.rank_pattern:
            self.r = LoraConfig.__dataclass_fields__["r"].default
        if self.grows is None:
            self.grows = self.r is None
        if self.r is None:
            self.r = 1  # a fresh adapter is zero; its rank is set when it is taught
        if not _positive_integer(self.r):
            raise ValueError(f"QFConfig: r={self.r!r}; expected a positive integer, or None for what the facts need")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not _positive(self.lora_alpha):
            raise ValueError(f"QFConfig: lora_alpha={self.lora_alpha!r}; expected a positive number, or None for `r`")
        self._refuse_options_of_lora()
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.init_lora_weights not in _INITIAL:
            raise ValueError(
                f"QFConfig: init_lora_weights={self.init_lora_weights!r} is an option of LoRA that a QF adapter does "
                f"not have; expected one of {_INITIAL}"
            )

    def _refuse_options_of_lora(self) -> None:
        """What QF does not have must be as LoRA's default is, before PEFT makes something of it."""
        defaults = LoraConfig(peft_version=self.peft_version)
        for option in fields(LoraConfig):
            value, default = getattr(self, option.name), getattr(defaults, option.name)
            if option.name in _REFUSED and value:
                raise ValueError(
                    f"QFConfig: {option.name}={value!r} is an option of LoRA that a QF adapter does not have; "
                    f"leave it out (its default is {default!r})"
                )
            if not value and (option.name in _REFUSED or isinstance(default, dict)):
                setattr(self, option.name, default)  # nothing, otherwise said: None for {}, say

    def _check_types(self) -> None:
        """Options come from files too, where anything may stand; what is used further on must be what it should be."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            many = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value)
            if not (value is None or isinstance(value, str) or many):
                raise ValueError(f"QFConfig: {name}={value!r}; expected a string or a list of strings")
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, (list, tuple, set, range)) else [layers]:
            if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
                raise ValueError(f"QFConfig: layers_to_transform={layers!r}; expected an integer or a list of such")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"QFConfig: {name}={getattr(self, name)!r}; expected a string")
        for name in (
            "grows",
            "modules_by_default",
            "keep_statistics",
            "fan_in_fan_out",
            "inference_mode",
            "use_rslora",
            "ensure_weight_tying",
        ):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"QFConfig: {name}={getattr(self, name)!r}; expected true or false")
        dropout = self.lora_dropout
        if not (dropout == 0 or (_positive(dropout) and dropout < 1)) or isinstance(dropout, bool):
            raise ValueError(f"QFConfig: lora_dropout={dropout!r}; expected a number from 0 to below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"QFConfig: bias={self.bias!r}; expected 'none', 'all' or 'lora_only'")
        saved, tokens = self.modules_to_save, self.trainable_token_indices
        if saved is not None and not (isinstance(saved, (list, tuple, set)) and all(isinstance(n, str) for n in saved)):
            raise ValueError(f"QFConfig: modules_to_save={saved!r}; expected a list of strings")
        for chosen in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            if not (isinstance(chosen, list) and all(type(index) is int and index >= 0 for index in chosen)):
                raise ValueError(f"QFConfig: trainable_token_indices={tokens!r}; expected a list of tokens' indices")
        for name, fits in (("rank_pattern", _positive_integer), ("alpha_pattern", _positive)):
            pattern = getattr(self, name)
            if pattern and not (isinstance(pattern, dict) and all(fits(value) for value in pattern.values())):
                raise ValueError(f"QFConfig: {name}={pattern!r}; expected positive numbers by module")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _positive_integer(value: Any) -> bool:
    return isinstance(value, int) and _positive(value)
