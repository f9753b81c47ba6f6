"""QF as a PEFT tuner: LoRA's layers, filled with solved factors instead of trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.utils import logging

from ..forward.blocks import base_layer, block_of, linear_shape
from ..forward.residual_stream import Writer
from ..solve.least_squares import LowRankDelta
from .config import QFConfig
from .factors import begun, padded
from .loading import alpha_of, factored, fit, put_factors, rank_of, scale_of, warn_of_another_base
from .modes import adapters_off
from .quantized import holds_floats, unpack
from .rounding import rounded_change
from .serving import ServingLock, between_lessons, changing, hold, lock_of, release
from .state import TaughtAdapter
from .statistics_file import read_statistics
from .target_modules import check_named, default_names
from .versions import Version

logger = logging.get_logger(__name__)

_ANY_RANK = 256  # up to this a configuration's rank is taken at its word


class QFModel(LoraModel):
    """
    The tuner behind [`QFConfig`]: `get_peft_model(model, QFConfig(...)).base_model`.

    It differs from [`LoraModel`] in that it finds its default target modules from the model's structure, checks the
    targets before it touches the model, lets ranks grow, and holds the statistics of what each adapter was taught
    (`taught`, by adapter name), which leave with the adapter.

    Lessons, and whatever else changes weights, run under the lock `serving`, one at a time. For other threads to
    generate meanwhile, see `serve`.
    """

    taught: dict[str, TaughtAdapter]
    versions: dict[str, list[Version]]
    writers: dict[str, Writer]
    """By module name: how it reaches the residual stream, once that was measured."""
    grows: bool | None = None  # whether the base model's stream grows with depth, once that was measured
    serving: ServingLock
    _combining = False

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        vars(self)["serving"] = lock_of(model)
        super().__init__(model, *args, **kwargs)
        self.taught, self.versions, self.writers = {}, {}, {}

    def serve(self) -> ExitStack:
        """Let other threads run the model while it is taught, or its adapters are combined, merged or deleted.

        From now on `generate` and plain forward passes of the base model and of the `PeftModel` around it wait for the
        lesson that runs and hold up the next one, so that each sees the weights before a lesson or after it. For that
        the base model's methods are replaced by ones that take the lock; `unload` and `merge_and_unload` put them back.
        A loop that generates by its own forward passes does so `with model.base_model.serving.generating():`.

        Returns:
            A context manager, for those who want it to end: `with model.base_model.serve(): ...`.
        """
        hold(self.model, self.serving)
        ending = ExitStack()
        ending.callback(release, self.model)
        return ending

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Under the lock, because the hooks that PEFT adds for `adapter_names` are met by whoever runs the model."""
        with self.serving.generating(), super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    inject_adapter = changing(LoraModel.inject_adapter)
    set_adapter = between_lessons(LoraModel.set_adapter)
    enable_adapter_layers = between_lessons(LoraModel.enable_adapter_layers)
    disable_adapter_layers = between_lessons(LoraModel.disable_adapter_layers)

    def _prepare_adapter_config(self, peft_config: QFConfig, model_config: Any) -> QFConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_names(self.model)
        targets = check_named(self.model, peft_config)
        if targets and all(type(base_layer(target)).__name__ == "Conv1D" for target in targets):
            peft_config.fan_in_fan_out = True
        if peft_config.grows and peft_config.r == 1 and any(linear_shape(module) is None for module in targets):
            # No lesson will make it grow (see `check_linear`), so it is as large as LoRA's.
            peft_config.r = peft_config.lora_alpha = LoraConfig.__dataclass_fields__["r"].default
            peft_config.grows = False
        # No change of these modules needs a higher rank; only adapters put side by side have one.
        shapes = [linear_shape(module) for module in targets or self.model.modules()]
        self._highest_rank = max([_ANY_RANK, *(min(shape) for shape in shapes if shape is not None)])
        warn_of_another_base(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        config = lora_config
        if max([config.r, *config.rank_pattern.values()]) > self._highest_rank and not self._combining:
            # A stranger's configuration may name any rank: memory is taken once the file shows that much (see `fit`).
            config = copy(config)
            config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = 1, 1, {}, {}
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = parent.get_submodule(target_name)
        if not isinstance(layer, LoraLayer) or adapter_name not in factored(layer):
            return
        base = base_layer(layer)
        hook = getattr(base, "_hf_hook", None)
        a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        for part in (a, b):
            if getattr(hook, "offload", False) and part.weight.device.type == "meta":
                # The base weight is offloaded, and PEFT has put the factors where its shadow is. (While a file is
                # loaded with low_cpu_mem_usage, every new parameter is made on "meta", this one too.)
                values = torch.zeros_like(part.weight, device=hook.execution_device)
                part.weight = nn.Parameter(values, part.weight.requires_grad)
        if config.init_lora_weights is True and a.weight.device.type != "meta":
            b.weight.data.zero_()
            a.weight.data = begun(torch.zeros_like(a.weight), b.weight, current_key)
        if not holds_floats(base) and hasattr(self.model, "get_input_embeddings"):  # 8 bits
            for part in (a, b):
                part.to(self.model.get_input_embeddings().weight.dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        fit(model, config, adapter_name, tensors)
        tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
        if tuner is not None and getattr(config, "_folder", None) is not None:
            tuner._recall(adapter_name, config._folder, tensors)
        return tensors

    def _recall(self, adapter_name: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Take up the ledger and the statistics beside an adapter's weights, which are about to be loaded."""
        factors = {}
        for name in self.adapter_layers(adapter_name):
            found = [v for part in ("A", "B") for k, v in tensors.items()
                     if k.endswith(f"{name}.lora_{part}.{adapter_name}.weight")]  # fmt: skip
            if len(found) == 2:
                factors[name] = (found[0], found[1])
        taught = read_statistics(folder, factors)
        self.taught.pop(adapter_name, None)
        if taught is not None:
            self.taught[adapter_name] = taught

    @changing
    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; a change is not lost in the rounding of 16-bit weights (see `rounding.py`)."""
        with self._kept_in_rounding():
            super().merge_adapter(*args, **kwargs)

    @changing
    def unmerge_adapter(self) -> None:
        with self._kept_in_rounding(sign=-1):
            super().unmerge_adapter()

    @changing
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with self._kept_in_rounding():
            model = super()._unload_and_optionally_merge(*args, **kwargs)
        release(model)
        return model

    @contextmanager
    def _kept_in_rounding(self, sign: int = 1) -> Iterator[None]:
        """For a while, `get_delta_weight` of layers of 16 bits gives what to add (or, by `sign`, to subtract) so that
        the rounded sum changes as it should; and packed weights are brought back into the layout that PEFT reads."""

        def kept(layer: Linear, adapter: str) -> Tensor:
            weight = layer.get_base_layer().weight.data
            a, b = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
            delta = LowRankDelta(A=a.float(), B=b.float() * (sign * layer.scaling[adapter]))
            if layer.fan_in_fan_out:
                return sign * rounded_change(weight.T, delta).T
            return sign * rounded_change(weight, delta)

        self._unpack()
        sixteen, plain = (torch.bfloat16, torch.float16), [m for m in self.model.modules() if type(m) is Linear]
        layers = [layer for layer in plain if layer.get_base_layer().weight.dtype in sixteen]  # no quantised ones
        for layer in layers:
            layer.get_delta_weight = partial(kept, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.get_delta_weight

    @between_lessons
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._unpack()
        return super().state_dict(*args, **kwargs)

    def _unpack(self) -> None:
        for module in self.model.modules():
            unpack(module)

    @changing
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Combine adapters into a new one, as in [`LoraModel.add_weighted_adapter`].

        `cat` is the weighted sum of the changes, exactly; `svd` the nearest to it of rank `svd_rank`. `linear`, `ties`
        and the other types that work on each factor are rough approximations. Unlike PEFT's own method it keeps all
        adapters' modules where these differ, takes adapters of different rank in every type, and leaves nothing behind
        if it fails. The new adapter has no statistics; it can be taught on, and keeps what it holds.
        """
        known, new = [name for name in adapters if name in self.peft_config], adapter_name not in self.peft_config
        by_factor = combination_type != "cat" and not combination_type.endswith("svd")
        self._combining = True
        try:
            with self._alike(known, by_factor):
                super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **options)
        except Exception:
            if new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        finally:
            self._combining = False
        for layer in self.adapter_layers(adapter_name).values():
            dtype = next(layer.lora_A[name].weight.dtype for name in adapters if name in layer.lora_A)
            layer.lora_A[adapter_name].to(dtype)
            layer.lora_B[adapter_name].to(dtype)

    @contextmanager
    def _alike(self, adapters: list[str], one_rank: bool) -> Iterator[None]:
        """For a while, configurations that name all the adapters' modules and, if asked for, factors of one rank.

        PEFT makes the new adapter after the first one's configuration: blocks that only another edits would be dropped.
        """
        configs = {name: self.peft_config[name] for name in adapters}
        modules = {name: set(self.adapter_layers(name)) for name in adapters}
        everywhere = set().union(*modules.values())
        ranks = {n: {layer.r[n] for layer in self.adapter_layers(n).values()} for n in adapters}
        rank, versions = max(set().union(*ranks.values()), default=1), {}
        try:
            for name, config in configs.items():
                self.peft_config[name] = replace(config)
                if any(modules[name] != everywhere for name in adapters):
                    self.peft_config[name] = replace(
                        config, target_modules=everywhere, layers_to_transform=None, layers_pattern=None,
                        exclude_modules=None,
                    )  # fmt: skip
                if one_rank and ranks[name] != {rank}:
                    versions[name] = self.version(name)
                    for module, layer in self.adapter_layers(name).items():
                        a, b = self.factors(name, module)
                        scaling = layer.scaling[name]
                        put_factors(layer, name, *padded((a, b), rank), rank)
                        layer.scaling[name] = scaling
                    self.peft_config[name].r = rank
            yield
        finally:
            self.peft_config.update(configs)
            for name, version in versions.items():
                self.restore(name, version)

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type, adapters, weights, new_rank, target, *args, **options
    ):
        """The weighted sum's singular value decomposition from the factors; PEFT's own forms the sum (d_out × d_in)."""
        clamp = args[4] if len(args) > 4 else options.get("clamp")
        if combination_type != "svd" or clamp is not None:
            return super()._svd_generalized_task_arithmetic_weighted_adapter(
                combination_type, adapters, weights, new_rank, target, *args, **options
            )
        a, b = [], []
        for name, weight in zip(adapters, weights, strict=True):
            if name in target.lora_A:
                a.append(target.lora_A[name].weight.detach().float())
                b.append(target.lora_B[name].weight.detach().float() * (weight * target.scaling[name]))
        delta = LowRankDelta(A=torch.cat(a), B=torch.cat(b, dim=1)).compressed(new_rank)
        return padded((delta.A, delta.B), new_rank)

    @changing
    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.taught.pop(adapter_name, None)
        self.versions.pop(adapter_name, None)

    def adapter_layers(self, adapter_name: str) -> dict[str, LoraLayer]:
        """The layers beside linear modules that carry the adapter, by module name, in the order of the blocks."""
        modules = {name: self.model.get_submodule(name) for name in self.targeted_module_names}
        found = {n: m for n, m in modules.items() if isinstance(m, LoraLayer) and adapter_name in factored(m)}
        return dict(sorted(found.items(), key=lambda item: block_of(item[0])))

    def factors(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
        """Copies of the adapter's factors A (r, d_in) and B (d_out, r) beside the module `name`."""
        layer = self.model.get_submodule(name)
        return tuple(part[adapter_name].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))

    def delta(self, adapter_name: str, name: str) -> LowRankDelta:
        """The adapter's present change of the module `name`, float32, without directions that change nothing."""
        a, b = self.factors(adapter_name, name)
        used = (b.any(dim=0) & a.any(dim=1)) | ~(a.isfinite().all(dim=1) & b.isfinite().all(dim=0))
        b = b[:, used].float() * self.model.get_submodule(name).scaling[adapter_name]
        return LowRankDelta(A=a[used].float(), B=b)

    @changing
    def install(self, adapter_name: str, deltas: Mapping[str, LowRankDelta], even: bool = True) -> None:
        """Put changes into an adapter; its other modules keep theirs.

        All modules get one rank, so that the file is one that every reader of LoRA files takes: the config's `r`, or
        where it grows the largest any module needs. (Those that `rank_pattern` names keep theirs.) With `even=False`
        that is left to a later call: the modules given have the ranks of their changes until then.
        """
        layers, caps = self.adapter_layers(adapter_name), self._caps(adapter_name)
        full = {n: d.compressed(caps[n]) if caps[n] and d.rank > caps[n] else d for n, d in deltas.items()}
        if even:
            full |= {name: self.delta(adapter_name, name) for name in layers.keys() - deltas.keys()}
        most = max([1, *(delta.rank for name, delta in full.items() if not caps[name])])
        factors = {}
        for name, delta in full.items():
            rank = caps[name] or (most if even else max(1, delta.rank))
            a, b = layers[name].lora_A[adapter_name].weight, layers[name].lora_B[adapter_name].weight
            scale = scale_of(layers[name], adapter_name, self._alpha(adapter_name, name, rank), rank)
            factors[name] = padded((delta.A.to(a), (delta.B / scale).to(b)), rank)
        self.set_factors(adapter_name, factors)

    def clear(self, adapter_name: str) -> None:
        """Make an adapter zero."""
        present = {name: self.factors(adapter_name, name) for name in self.adapter_layers(adapter_name)}
        ranks = {name: cap or 1 for name, cap in self._caps(adapter_name).items()}
        zero = {n: (a.new_zeros(ranks[n], a.shape[1]), b.new_zeros(len(b), ranks[n])) for n, (a, b) in present.items()}
        self.set_factors(adapter_name, zero)

    @changing
    def set_factors(self, adapter_name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the factors of modules of an adapter by those given; what their product counts follows from their
        rank and `lora_alpha`, as in LoRA. Rows of A (r, d_in) that are zero, as their columns of B (d_out, r) are, get
        the values that a fresh adapter has, so that they can be trained; they change nothing."""
        layers, caps = self.adapter_layers(adapter_name), self._caps(adapter_name)
        config = self.peft_config[adapter_name]
        alphas = {name: self._alpha(adapter_name, name, a.shape[0]) for name, (a, _) in factors.items()}
        for name, (a, b) in factors.items():
            put_factors(layers[name], adapter_name, begun(a, b, name), b, alphas[name])
        ranks = {a.shape[0] for name, (a, _) in factors.items() if caps[name] is None}
        if ranks:
            follows = config.lora_alpha == config.r
            config.r = max(ranks)
            config.lora_alpha = config.r if follows else config.lora_alpha

    def _caps(self, adapter_name: str) -> dict[str, int | None]:
        """By module name the rank of an adapter's factors; None where it grows."""
        config = self.peft_config[adapter_name]
        return {name: None if config.grows else rank_of(config, name) for name in self.adapter_layers(adapter_name)}

    def _alpha(self, adapter_name: str, name: str, rank: int) -> float:
        """What `lora_alpha` is beside factors of some rank: where it equals `r` and `r` grows, it grows too."""
        config = self.peft_config[adapter_name]
        alpha = alpha_of(config, name)
        patterned = get_pattern_key(config.alpha_pattern, name) in config.alpha_pattern
        return rank if config.grows and not patterned and alpha == config.r else alpha

    def version(self, adapter_name: str) -> Version:
        """An adapter as it is now, to be put back by `restore`."""
        layers, taught = self.adapter_layers(adapter_name), self.taught.get(adapter_name)
        config = self.peft_config[adapter_name]
        known, factors = taught.installed if taught is not None else {}, {}
        for name in layers:
            factors[name] = tuple(part.cpu() for part in self.factors(adapter_name, name))
            if name in known and all(map(torch.equal, known[name], factors[name])):
                factors[name] = known[name]  # the same once more
        scaling = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
        return Version(factors, scaling, (config.r, config.lora_alpha), taught)

    @changing
    def restore(self, adapter_name: str, version: Version) -> None:
        """Make an adapter what it was, bit for bit; modules that it has taken in since are zero."""
        config, rank = self.peft_config[adapter_name], version.rank[0]
        config.r, config.lora_alpha = version.rank
        for name, layer in self.adapter_layers(adapter_name).items():
            at = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            zero = at[0].new_zeros(rank, at[0].shape[1]), at[1].new_zeros(len(at[1]), rank)
            a, b = version.factors.get(name) or (begun(*zero, name), zero[1])
            pair = a.to(at[0], copy=True), b.to(at[1], copy=True)
            put_factors(layer, adapter_name, *pair, self._alpha(adapter_name, name, len(pair[0])))
            layer.scaling[adapter_name] = version.scaling.get(name, layer.scaling[adapter_name])
        self.taught.pop(adapter_name, None)
        if version.taught is not None:
            self.taught[adapter_name] = version.taught

    def without_adapters(self) -> AbstractContextManager[None]:
        """The base model, for a while; unlike PEFT's `disable_adapter` it leaves `requires_grad` as it was."""
        return adapters_off(self.model)
