"""A LoRA adapter as one GGUF file, as llama.cpp and what is built on it read it beside a base's GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.writing import saving_to, whole_file
from ..forward.blocks import find_blocks

GGUF_NAME = "adapter.gguf"
# GGUF's names of architectures, where they are not transformers' model types without underscores.
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_bigcode": "starcoder"}
_TURNED = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn")  # rows in another order in some GGUF files


def gguf_tensors(network: PreTrainedModel, names: list[str]) -> tuple[str, dict[str, str]]:
    """GGUF's name of a model's architecture, and of its modules by theirs.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the architecture or a module has no name there, or its weight lies there in another order.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("format='gguf' needs the package gguf: pip install gguf") from error

    kind = network.config.model_type
    name = _ARCHITECTURES.get(kind, kind.replace("_", ""))
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        raise ValueError(f"format='gguf': GGUF has no architecture that is called like {kind!r}; export it as 'peft'")
    tensors = gguf.get_tensor_name_map(known[name], len(find_blocks(network)[1]))
    found = {}
    for module in names:
        stored = tensors.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if stored is None or module.endswith(_TURNED):
            raise ValueError(
                f"format='gguf': {module} has no tensor of its own order in GGUF files; export it as 'peft' and use "
                "llama.cpp's convert_lora_to_gguf.py, which has the base's files"
            )
        found[module] = stored
    return name, found


def write_gguf(target: Path, network: nn.Module, written: dict[str, tuple[Tensor, Tensor]], rank: int) -> None:
    """Write the modules' factors A (r, d_in) and B (d_out, r) into `adapter.gguf` in a folder, at once.

    Raises:
        ImportError, ValueError: see [`gguf_tensors`].
    """
    architecture, names = gguf_tensors(network, list(written))
    import gguf

    with saving_to(target, "the adapter"):
        target.mkdir(parents=True, exist_ok=True)
        with whole_file(target / GGUF_NAME) as file:
            writer = gguf.GGUFWriter(file, architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp multiplies by alpha / rank
            for module, (a, b) in written.items():
                writer.add_tensor(f"{names[module]}.lora_a", _array(a))
                writer.add_tensor(f"{names[module]}.lora_b", _array(b))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def _array(factor: Tensor) -> Any:
    return factor.detach().cpu().float().contiguous().numpy()
