"""QF as a PEFT tuner: LoRA's layers, filled with solved factors instead of trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.utils import logging

from ..forward.blocks import base_layer, block_ends, find_blocks, linear_shape, split_path
from ..forward.modes import adapters_off
from ..forward.residual_stream import Writer, grows_with_depth
from ..solve.least_squares import LowRankDelta
from .config import QFConfig
from .loading import fit, hub_id, put_factors
from .quantized import holds_floats, unpack
from .rounding import rounded_change
from .serving import ServingLock, between_lessons, changing, hold, lock_of, release
from .state import TaughtAdapter
from .statistics_file import read_statistics
from .versions import Version

logger = logging.get_logger(__name__)


class QFModel(LoraModel):
    """
    The tuner behind [`QFConfig`]: `get_peft_model(model, QFConfig(...)).base_model`.

    It differs from [`LoraModel`] in that it finds its default target modules from the model's structure, checks the
    targets before it touches the model, starts every adapter at zero, keeps the adapter in the base model's dtype, and
    holds the statistics of what each adapter was taught (`taught`, by adapter name), which leave with the adapter.

    Other threads may generate while the model is taught, adapters are combined, merged or deleted: `generate` and plain
    forward passes run under the lock `serving`, and see the weights before or after. A loop that generates by its own
    forward passes does so `with model.base_model.serving.generating():`.
    """

    taught: dict[str, TaughtAdapter]
    versions: dict[str, list[Version]]
    writers: dict[str, Writer]
    """By module name: how it reaches the residual stream, once that was measured."""
    serving: ServingLock
    _combining = False

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        vars(self)["serving"] = lock_of(model)
        super().__init__(model, *args, **kwargs)
        self.taught, self.versions, self.writers = {}, {}, {}
        hold(model, self.serving)

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
            peft_config.target_modules = block_ends(self.model, attention=grows_with_depth(self.model))
        targets = _check_targets(self.model, peft_config)
        peft_config.fan_in_fan_out = all(type(base_layer(target)).__name__ == "Conv1D" for target in targets)
        # No change of these modules needs a higher rank; only adapters put side by side have one.
        self._highest_rank = max(min(linear_shape(target)) for target in targets)
        _warn_of_another_base(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if lora_config.r > self._highest_rank and not self._combining:
            # A stranger's configuration may name any rank: memory is taken once the file shows that much (see `fit`).
            lora_config = copy(lora_config)
            lora_config.r = lora_config.lora_alpha = 1
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = parent.get_submodule(target_name)
        base = base_layer(layer)
        hook = getattr(base, "_hf_hook", None)
        for part in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if getattr(hook, "offload", False) and part.weight.device.type == "meta":
                # The base weight is offloaded, and PEFT has put the factors where its shadow is. (While a file is
                # loaded with low_cpu_mem_usage, every new parameter is made on "meta", this one too.)
                values = torch.zeros_like(part.weight, device=hook.execution_device)
                part.weight = nn.Parameter(values, part.weight.requires_grad)
            if part.weight.device.type != "meta":
                part.weight.data.zero_()
            if not holds_floats(base):  # 8 bits: PEFT would leave the factors in float32
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
        for name in self.layers(adapter_name):
            found = [v for part in ("A", "B") for k, v in tensors.items()
                     if k.endswith(f"{name}.lora_{part}.{adapter_name}.weight")]  # fmt: skip
            if len(found) == 2:
                factors[name] = (found[0], found[1])
        taught = read_statistics(folder, factors)
        self.taught.pop(adapter_name, None)
        if taught is not None:
            self.taught[adapter_name] = taught

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the factors in the base model's dtype: PEFT raises them to float32 for an optimizer's sake only."""

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
        layers = [module for module in self.model.modules() if type(module) is Linear]  # no quantised ones
        layers = [layer for layer in layers if layer.get_base_layer().weight.dtype in (torch.bfloat16, torch.float16)]
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
        for layer in self.layers(adapter_name).values():
            dtype = next(layer.lora_A[name].weight.dtype for name in adapters if name in layer.lora_A)
            layer.lora_A[adapter_name].to(dtype)
            layer.lora_B[adapter_name].to(dtype)

    @contextmanager
    def _alike(self, adapters: list[str], one_rank: bool) -> Iterator[None]:
        """For a while, configurations that name all the adapters' modules and, if asked for, factors of one rank.

        PEFT makes the new adapter after the first one's configuration: blocks that only another edits would be dropped.
        """
        configs = {name: self.peft_config[name] for name in adapters}
        modules = {name: set(self.layers(name)) for name in adapters}
        everywhere = set().union(*modules.values())
        rank, restored = max((config.r for config in configs.values()), default=1), {}
        try:
            for name, config in configs.items():
                self.peft_config[name] = replace(config)
                if any(modules[name] != everywhere for name in adapters):
                    self.peft_config[name] = replace(
                        config, target_modules=everywhere, layers_to_transform=None, layers_pattern=None,
                        exclude_modules=None,
                    )  # fmt: skip
                if one_rank and config.r < rank:
                    restored[name] = {
                        m: (self.factors(name, m), layer.scaling[name]) for m, layer in self.layers(name).items()
                    }
                    deltas = {m: self.delta(name, m) for m in modules[name]}
                    self.set_factors(name, {m: padded((d.A, d.B), rank) for m, d in deltas.items()})
            yield
        finally:
            for name, state in restored.items():
                self.set_factors(name, {m: factors for m, (factors, _) in state.items()})
                for m, (_, scaling) in state.items():
                    self.layers(name)[m].scaling[name] = scaling
            self.peft_config.update(configs)

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

    def layers(self, adapter_name: str) -> dict[str, LoraLayer]:
        """The layers that carry the adapter, by module name, in the order of the blocks."""
        modules = {name: self.model.get_submodule(name) for name in self.targeted_module_names}
        found = {name: module for name, module in modules.items() if adapter_name in module.lora_A}
        return dict(sorted(found.items(), key=lambda item: split_path(item[0])[1]))

    def factors(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
        """Copies of the adapter's factors A (r, d_in) and B (d_out, r) beside the module `name`."""
        layer = self.model.get_submodule(name)
        return tuple(part[adapter_name].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))

    def delta(self, adapter_name: str, name: str) -> LowRankDelta:
        """The adapter's present change of the module `name`, float32."""
        a, b = self.factors(adapter_name, name)
        return LowRankDelta(A=a.float(), B=b.float() * self.model.get_submodule(name).scaling[adapter_name])

    @changing
    def install(self, adapter_name: str, deltas: Mapping[str, LowRankDelta], even: bool = True) -> None:
        """Put changes into an adapter; its other modules keep theirs.

        All modules get one rank, so that the file is one that every reader of LoRA files takes: the config's `r`, or
        where it grows the largest any module needs, with zeros added to the others. With `even=False` that is left to a
        later call: the modules given have the ranks of their changes until then.
        """
        config, layers = self.peft_config[adapter_name], self.layers(adapter_name)
        cap = None if config.grows else config.r
        full = {name: d.compressed(cap) if cap and d.rank > cap else d for name, d in deltas.items()}
        if even:
            for name in layers.keys() - deltas.keys():
                present = self.delta(adapter_name, name)
                used = present.A.any(dim=1)
                full[name] = LowRankDelta(A=present.A[used], B=present.B[:, used])
        rank = cap or max([1, *(delta.rank for delta in full.values())])
        factors = {}
        for name, delta in full.items():
            a, b = layers[name].lora_A[adapter_name].weight, layers[name].lora_B[adapter_name].weight
            factors[name] = padded((delta.A.to(a), delta.B.to(b)), rank if even else max(1, cap or delta.rank))
        self.set_factors(adapter_name, factors)

    def clear(self, adapter_name: str) -> None:
        """Make an adapter zero."""
        rank = 1 if self.peft_config[adapter_name].grows else self.peft_config[adapter_name].r
        present = {name: self.factors(adapter_name, name) for name in self.layers(adapter_name)}
        self.set_factors(
            adapter_name,
            {n: (a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)) for n, (a, b) in present.items()},
        )

    @changing
    def set_factors(self, adapter_name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Replace the factors of every module of an adapter by those given, all of one rank."""
        layers = self.layers(adapter_name)
        for name, (a, b) in factors.items():
            put_factors(layers[name], adapter_name, a, b)
            self.peft_config[adapter_name].r = self.peft_config[adapter_name].lora_alpha = a.shape[0]

    def version(self, adapter_name: str) -> Version:
        """An adapter as it is now, to be put back by `restore`."""
        layers, taught = self.layers(adapter_name), self.taught.get(adapter_name)
        known, factors = taught.installed if taught is not None else {}, {}
        for name in layers:
            factors[name] = tuple(part.cpu() for part in self.factors(adapter_name, name))
            if name in known and all(map(torch.equal, known[name], factors[name])):
                factors[name] = known[name]  # the same once more
        scaling = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
        return Version(factors, scaling, taught)

    @changing
    def restore(self, adapter_name: str, version: Version) -> None:
        """Make an adapter what it was, bit for bit."""
        layers, present = self.layers(adapter_name), {}
        for name, pair in version.factors.items():
            places = layers[name].lora_A[adapter_name].weight, layers[name].lora_B[adapter_name].weight
            present[name] = tuple(part.to(at, copy=True) for part, at in zip(pair, places, strict=True))
        self.set_factors(adapter_name, present)
        for name, scaling in version.scaling.items():
            self.layers(adapter_name)[name].scaling[adapter_name] = scaling
        self.taught.pop(adapter_name, None)
        if version.taught is not None:
            self.taught[adapter_name] = version.taught

    def without_adapters(self) -> AbstractContextManager[None]:
        """The base model, for a while; unlike PEFT's `disable_adapter` it leaves `requires_grad` as it was."""
        return adapters_off(self.model)


def padded(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (r, d_in) and B (d_out, r) with zeros behind them up to `rank`."""
    a, b = factors
    more = rank - a.shape[0]
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)


def _check_targets(model: nn.Module, config: QFConfig) -> list[nn.Module]:
    """Refuse targets that do not exist, are not linear or lie in no block, before the model is touched.

    Returns:
        The target modules of all blocks.
    """
    names = {
        name: module
        for name, module in model.named_modules()
        if name and ".base_layer" not in name and ".lora_" not in name
    }
    everywhere = QFConfig(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
    targets = [name for name in names if check_target_module_exists(everywhere, name)]
    wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    if not targets:
        path, blocks = find_blocks(model)
        linear = [n for n, m in blocks[0].named_modules() if linear_shape(m) is not None and ".base_layer" not in n]
        linear = [n for n in linear if "lora_" not in n]
        raise ValueError(
            f"target_modules={wanted!r} matches no module of {type(model).__name__}; its blocks ({path}.0, …) have the "
            f"linear modules {linear}"
        )
    for name in targets:
        if linear_shape(names[name]) is None:
            raise ValueError(
                f"target_modules={wanted!r} matches {name!r}, a {type(names[name]).__name__}, which is not linear; QF "
                "changes the weights of linear modules only"
            )
        split_path(name)
    indices = config.layers_to_transform
    if indices is None or isinstance(config.target_modules, str):
        indices = []  # a regular expression chooses the layers itself
    present = sorted({split_path(name)[1] for name in targets})
    for index in [indices] if isinstance(indices, int) else indices:
        if index not in present:
            raise ValueError(
                f"layers_to_transform={indices!r}: layer {index} is out of range; the modules {wanted!r} are in layers "
                f"{present[0]} to {present[-1]}"
            )
    return [names[name] for name in targets]


def _warn_of_another_base(model: nn.Module, config: QFConfig) -> None:
    """Say so if the adapter names another model of the Hub than the one it is put into."""
    made_for, present = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if made_for != present and hub_id(made_for) and hub_id(present):
        logger.warning(
            f"the adapter was made for {made_for!r} and is put into {present!r}; what it was taught holds only for "
            "weights that (nearly) equal those it was made for"
        )
