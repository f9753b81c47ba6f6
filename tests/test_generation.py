"""Generation in batches behind what prompts share, and the keys taken on the way, beside one prompt at a time."""

import pytest
import torch
from conftest import ARCHITECTURES, random_model

from qf_peft.forward.generation import generate
from qf_peft.forward.recording import Recorder

SHARED = [(7 * i) % 500 + 500 for i in range(20)]  # what most prompts begin with
PROMPTS = [[*SHARED, *range(40, 40 + n)] for n in (3, 1, 9, 5)] + [[11, 12, 13], [*SHARED[:4], 15]]
STEPS = 7


class Numbers:
    """A tokenizer that writes token ids."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def alone(model, module, ids):
    """An answer to one prompt, without padding or anything cached before; and what a module reads of both."""
    whole = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=STEPS, do_sample=False
    )
    read = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0].reshape(-1, args[0].shape[-1])))
    model(whole[:, :-1])
    handle.remove()
    return whole[0, len(ids) :].tolist(), read[0]


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "short window"])
def test_answers_and_keys_are_those_of_one_prompt_alone(model_type):
    model = random_model("gemma2", sliding_window=16) if model_type == "short window" else random_model(model_type)
    model.generation_config.pad_token_id = 0
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    module = next(m for m in reversed(modules[:-1]) if m is not model.get_output_embeddings())
    if "moe" in model_type:  # its experts read some of the tokens only
        module = model.model.layers[-1].self_attn.o_proj
    found, said = {}, {}

    def take(part):
        assert list(part.keys) == ["last"] and (not part.before or list(part.before) == ["last"])
        pairs = zip(part.prompts, part.answers, part.keys["last"].split(part.lengths), strict=True)
        for prompt, answer, keys in pairs:
            said[prompt] = answer
            found[prompt] = torch.cat([part.before["last"], keys]) if part.before else keys

    recorder = Recorder({"last": module}, take)
    answers = generate(model, Numbers(), PROMPTS, max_new_tokens=STEPS, batch_tokens=70, recorder=recorder)
    assert sorted(found) == list(range(len(PROMPTS)))
    for i, ids in enumerate(PROMPTS):
        answer, keys = alone(model, module, ids)
        assert said[i] == answer
        assert answers[i] == (" ".join(map(str, answer[:-1] if answer[-1] == 2 else answer)), answer[-1] == 2)
        assert found[i].shape == keys.shape and torch.allclose(found[i], keys, rtol=1e-3, atol=1e-4)


def test_what_is_shared_is_run_once():
    model, tokens = random_model("llama"), []
    block = model.model.layers[0]
    handle = block.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[0] * args[0].shape[1]))
    generate(model, Numbers(), PROMPTS[:4], max_new_tokens=1, batch_tokens=1000)
    handle.remove()
    assert tokens == [len(SHARED), 4 * 9]


def test_a_model_whose_modules_read_something_else_is_not_recorded():
    """Here one that reads everything twice."""
    model, taken = random_model("llama"), []
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: (forward(hidden) + forward(hidden)) / 2
    recorder = Recorder({"last": mlp.down_proj}, taken.append)
    answers = generate(model, Numbers(), PROMPTS, max_new_tokens=3, batch_tokens=100, recorder=recorder)
    assert len(answers) == len(PROMPTS) and not taken
