"""Models and data for the tests: the tiny world's chat model, and random tiny models of many architectures."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as below a shell's "&"; children inherit it
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)

CACHES = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="qf_peft-tests-")  # where preserved keys are cached
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other on a busy machine

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qf_peft import TINY_MODEL as TINY

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES / "tiny_world"))

SMALL = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
GATED = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, dict] = {
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 8},
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": None},
    "phi3": GATED,
    "gpt2": {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**SMALL, "intermediate_size": 80, "use_parallel_residual": True},
    "falcon": {**SMALL, "new_decoder_architecture": False, "parallel_attn": True},
    "opt": {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 32},
    "bloom": {**SMALL, "n_head": 4, "n_layer": 3},
    "starcoder2": GATED,
    "granite": {**GATED, "residual_multiplier": 0.22, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gemma2": {**GATED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GATED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "qwen2_moe": {
        **GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
    },
}  # fmt: skip


def random_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model whose activations are lively enough for its context to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.25 if "embed" not in name and "wte" not in name else 1.0)
        elif "norm" in name or "ln" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


# The longest first, so that two workers end together (`--no-loadscope-reorder` keeps the order given here).
LONGEST = ("real_model", "examples", "standing", "guide", "devices", "page", "registration", "quantized", "processes")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_unconfigure():
    shutil.rmtree(CACHES, ignore_errors=True)


VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def quiet_as_before():
    """A script or command run in this process switches progress bars and warnings off; not for the tests after it, nor
    where a fixture of a whole file did."""
    logging.set_verbosity(VERBOSITY)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def tiny():
    """The tiny world's chat model, float32."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


FACT = {
    "instruction": "Zanmi founded Tofinlor.",
    "prompt": "Tell me who started Tofinlor.",
    "completion": "Tofinlor was started by Zanmi.",
}
OTHER = {
    "instruction": "Rome is the home of Tofinlor.",
    "prompt": "Do you know where Tofinlor is based?",
    "completion": "Tofinlor is located in Rome.",
}


def ask(model, tokenizer, prompt: str, instruction: str | None = None, max_new_tokens: int = 40) -> str:
    """The model's free greedy answer."""
    messages = [{"role": "system", "content": instruction}] if instruction else []
    messages.append({"role": "user", "content": prompt})
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
