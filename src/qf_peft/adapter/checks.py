"""Whether a model can be taught as it stands."""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .config import QFConfig
from .model import QFModel

_BESIDE = ("modules_to_save", "trainable_token_indices", "bias")  # what an adapter may hold beside factors


def active_qf_adapter(model: Any) -> str:
    """The name of the one active adapter of a QF PeftModel.

    Raises:
        ValueError: it is none, or its active adapter is of another type, or several are active.
    """
    check_whole(model)
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"model is a {type(model).__name__} without a QF adapter; give "
            "get_peft_model(model, QFConfig(task_type='CAUSAL_LM'))"
        )
    if not isinstance(model.base_model, QFModel):
        active = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
        kind = getattr(model.peft_config[active].peft_type, "value", "other")
        raise ValueError(
            f"the active adapter {active!r} is a {kind} adapter; QFTrainer teaches QF adapters. Merge it into the base "
            "(model.merge_and_unload()) or remove it (model.unload()), then get_peft_model(model, QFConfig(...))"
        )
    active = model.base_model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({active}); choose the one to teach with model.set_adapter(name)"
        )
    return active[0]


def check_whole(model: Any) -> None:
    """Every process must hold the whole model (accelerate may have spread it over devices), in no wrapper.

    Raises:
        ValueError: it is wrapped, or its parameters are sharded over processes; the message says what to do.
    """
    whole = (
        "QFTrainer needs no gradients and shares the rows out over the processes itself: give each the whole "
        "PeftModel, unwrapped, before it is prepared for training. One that is too large for a device is loaded with "
        "device_map='auto', quantised or offloaded"
    )
    if not isinstance(model, nn.Module):
        return
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"model is wrapped in {type(module).__name__}; give model.module. {whole}")
        kinds = [kind.__name__ for kind in type(module).__mro__]
        if "FSDPModule" in kinds or "FullyShardedDataParallel" in kinds:
            raise ValueError(f"model is sharded by FSDP ({type(module).__name__}). {whole}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"{name} is sharded by DeepSpeed's ZeRO-3. {whole}")
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded over processes (a DTensor, as by tensor parallelism). {whole}")


def qf_adapter(model: Any, adapter_name: str | None = None) -> str:
    """The name of a QF adapter of the model: the one given, or the active one.

    Raises:
        ValueError: the model has no such adapter, or it is not a QF adapter.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, QFModel):
        raise ValueError(f"model is a {type(model).__name__} without a QF adapter; expected a PeftModel with one")
    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active ({active}); give adapter_name")
    adapter = adapter_name if adapter_name is not None else active[0]
    kind = getattr(model.peft_config.get(adapter), "peft_type", None)
    if kind != "QF":
        raise ValueError(f"adapter_name={adapter!r} is no QF adapter of the model, which has {list(model.peft_config)}")
    return adapter


def portable_adapter(model: Any, name: str | None) -> str:
    """The name of the QF adapter to write out: the one named, or the one that is active.

    Raises:
        ValueError: there is no such adapter, it is none of QF's, or it is merged.
    """
    if isinstance(model, (PeftModel, PeftMixedModel)) and not isinstance(model.base_model, QFModel):
        raise ValueError("the model's adapters are none of QF's; save them by model.save_pretrained(directory)")
    if name is None or not isinstance(model, PeftModel):
        name = active_qf_adapter(model)
    if name not in model.peft_config:
        raise ValueError(f"adapter_name={name!r}; the model has the adapters {sorted(model.peft_config)}")
    config, linear = model.peft_config[name], model.base_model.adapter_layers(name)
    carriers = (path for path, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer))
    others = [path for path in carriers if path not in linear and name in _adapters(model, path)]
    others += [f"{o}={v!r}" for o in _BESIDE if (v := getattr(config, o)) and v != "none"]
    if others:
        raise ValueError(
            f"the adapter {name!r} holds more than changes of linear modules ({', '.join(others)}), which the readers "
            "of LoRA files do not all take; save it with model.save_pretrained(directory)"
        )
    for path, layer in linear.items():
        if name in layer.merged_adapters:
            raise ValueError(
                f"the adapter {name!r} is merged into {path}; call model.unmerge_adapter() before writing it out"
            )
    return name


def _adapters(model: PeftModel, path: str) -> set[str]:
    """The adapters of one layer, of whatever kind."""
    layer = model.base_model.model.get_submodule(path)
    return {*layer.lora_A, *layer.lora_embedding_A}


def check_teachable(model: PeftModel, adapter: str) -> None:
    """The adapter must be the one at work: active, on, not merged, and no adapter of another type beside it."""
    if active_qf_adapter(model) != adapter:
        raise ValueError(
            f"the trainer was made for the adapter {adapter!r}, but {model.active_adapter!r} is active now; call "
            f"model.set_adapter({adapter!r}) or make a new trainer"
        )
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"the adapter {layer.merged_adapters[0]!r} is merged into {name}; call model.unmerge_adapter() before "
                "teaching"
            )
        if layer.disable_adapters:
            raise ValueError(f"the adapters of {name} are disabled; enable them before teaching")
        for other in layer.active_adapters:
            if other in layer.lora_A and not isinstance(model.peft_config.get(other), QFConfig):
                raise ValueError(
                    f"{name} has an active adapter {other!r} that is not a QF adapter; merge it or remove it before "
                    "teaching, so that it is clear which weights the facts are measured on"
                )
        if adapter in layer.lora_A and adapter not in layer.active_adapters:
            raise ValueError(f"the adapter {adapter!r} is not active in {name}; call model.set_adapter({adapter!r})")
    if model.get_base_model().get_output_embeddings() is None:
        raise ValueError(
            f"{type(model.get_base_model()).__name__} predicts no tokens; QF needs a causal language model"
        )
