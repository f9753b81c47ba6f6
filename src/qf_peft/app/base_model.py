"""The base model and its tokenizer, from the Hub, a folder, or a GGUF file."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging

from ..runtime.devices import slow_sixteen_bits

logger = logging.get_logger(__name__)
_HUB = ("token", "cache_dir", "local_files_only", "trust_remote_code")


def hub_options(from_pretrained: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that say how to reach the Hub."""
    return {name: from_pretrained[name] for name in _HUB if name in from_pretrained}


def load_base(model: str | Path, from_pretrained: dict[str, Any]) -> tuple[Any, PreTrainedModel]:
    """Load a tokenizer, with a padding token, and a model.

    A GGUF file's weights are unpacked (by transformers, which needs the package `gguf`) to the dtype asked for, by
    default bfloat16; the file is what the model is called, so that an adapter finds it again.

    Args:
        model: an id on the Hub, a folder, or a file that ends in `.gguf`.
        from_pretrained: for `AutoModelForCausalLM.from_pretrained`. By default the model is loaded in the dtype it is
            stored in, onto the accelerator if there is one; on a processor that has no circuits for 16 bits in float32,
            which is several times as fast there, if half of the free memory holds it. `dtype="auto"` keeps what is
            stored.

    Raises:
        OSError: there is no such model.
        ImportError: a GGUF file is given and the package that reads it is missing.
    """
    shared = hub_options(from_pretrained)
    loading = {"dtype": "auto", **from_pretrained}
    if torch.accelerator.is_available():
        loading.setdefault("device_map", "auto")
    revision = {"revision": loading["revision"]} if "revision" in loading else {}
    file = Path(model).expanduser()
    if file.suffix != ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(model, **shared, **revision)
        network = AutoModelForCausalLM.from_pretrained(model, **loading)
    else:
        if not file.is_file():
            raise FileNotFoundError(f"no model {model}: there is no such file")
        if loading["dtype"] == "auto":
            loading["dtype"] = torch.bfloat16
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # transformers' bar of this is shown whatever its progress bars are set to
        with nullcontext() if logging.is_progress_bar_enabled() else redirect_stderr(StringIO()):
            network = AutoModelForCausalLM.from_pretrained(
                **source, **loading, quantization_config=GgufConfig(dequantize=True)
            )
        network.name_or_path = network.config.name_or_path = str(file.resolve())
    if "dtype" not in from_pretrained:
        _widened(network)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, network


def _widened(network: PreTrainedModel) -> None:
    """Turn a model to float32 where its 16 bits are slow and there is room; nothing is lost by it."""
    if slow_sixteen_bits(network) and 4 * network.num_parameters() < psutil.virtual_memory().available / 2:
        logger.info("the model runs in float32: this processor multiplies 16 bits several times more slowly")
        network.float()
