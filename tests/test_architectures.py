"""One fact taught at the last layer with the paper's setting: the bare pass's hidden state becomes the context's."""

import pytest
import torch
from conftest import ARCHITECTURES, FACT, random_model
from peft import get_peft_model

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows

MLP_END = {
    "gpt2": "mlp.c_proj", "starcoder2": "c_proj", "gpt_neox": "dense_4h_to_h", "falcon": "dense_4h_to_h",
    "bloom": "dense_4h_to_h", "opt": "fc2", "qwen2_moe": "o_proj",
}  # fmt: skip
# Behind an RMS norm only a sphere of outputs can be reached; what is measured here is how near the nearest point is.
NORM_BEHIND = ("gemma2", "gemma3_text")


def last_hidden(model, ids, taught):
    """The last block's output at the taught positions, taken by a hook of its own."""
    kept = []
    blocks = max(
        (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3), key=lambda m: len(str(m))
    )
    handle = blocks[-1].register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids[:-1]]))
    handle.remove()
    return kept[0][0, -taught:].float()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_last_layer_reaches_the_context_pass(model_type, tokenizer):
    base = random_model(model_type)
    example = Encoder(tokenizer).encode(read_rows([FACT])[0])
    wanted = last_hidden(base, example.context_ids, example.taught)
    bare = last_hidden(base, example.bare_ids, example.taught)
    model = get_peft_model(base, QFConfig(layers_to_transform=[2], task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == {MLP_END.get(model_type, "down_proj")}
    args = QFTrainingArguments.paper()
    metrics = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT]).train()
    now = last_hidden(model, example.bare_ids, example.taught)
    assert (wanted - bare).norm() > 0.1 * wanted.norm(), "the instruction must matter for the test to say anything"
    error = float((now - wanted).norm() / wanted.norm())
    print(f"{model_type}: relative error {error:.1e}, residual left {metrics['residual_left']:.1e}")
    if model_type in NORM_BEHIND:
        assert metrics["residual_left"] < 0.75
        assert (now - wanted).norm() < 0.75 * (bare - wanted).norm()
    else:
        assert error < 1e-3
        assert metrics["residual_left"] < 1e-3
    assert metrics["kl_after"] < metrics["kl_before"]
