"""Only the work that is needed: which blocks run on how many tokens, counted on the model itself."""

import pytest
import torch
from conftest import FACT, OTHER, random_model
from peft import get_peft_model
from transformers import AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows
from qf_peft.forward.scratch import Scratch

LONG = "Zanmi founded Tofinlor. Rome is the home of Tofinlor. " * 8
QUESTIONS = [
    {"instruction": LONG, "prompt": FACT["prompt"], "completion": FACT["completion"]},
    {"instruction": LONG, "prompt": OTHER["prompt"], "completion": OTHER["completion"]},
    {"instruction": LONG, "prompt": "Who founded Tofinlor?", "completion": FACT["completion"]},
]


class Count:
    """Tokens that went through each block, and positions through the unembedding, while open."""

    def __init__(self, network):
        self.network, self.blocks, self.unembedded = network, [0] * network.config.num_hidden_layers, 0

    def __enter__(self):
        def block(index):
            def see(_, args, kwargs):
                self.blocks[index] += (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

            return see

        def head(_, args):
            self.unembedded += args[0].shape[:-1].numel()

        layers = self.network.model.layers
        self.handles = [b.register_forward_pre_hook(block(i), with_kwargs=True) for i, b in enumerate(layers)]
        self.handles.append(self.network.lm_head.register_forward_pre_hook(head))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def teacher(base, tokenizer, rows, config=None, **settings):
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM", **(config or {})))
    return model, QFTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, args=QFTrainingArguments.paper(**settings)
    )


def lengths(tokenizer, rows):
    encoder = Encoder(tokenizer, 512)
    examples = [encoder.encode(row) for row in read_rows(rows)]
    return sum(len(e.context_ids) - 1 for e in examples), sum(len(e.bare_ids) - 1 for e in examples)


def test_one_block_costs_two_passes_and_what_is_behind(tiny, tokenizer):
    rows = [FACT, OTHER]
    _, trainer = teacher(tiny, tokenizer, rows, {"layers_to_transform": [4]}, batch_tokens=1)
    trainer.train()
    trainer.rollback()  # how the module reaches the stream is known by now
    with Count(tiny) as count:
        metrics = trainer.train()
    context, bare = lengths(tokenizer, rows)
    assert count.blocks == [context + bare] * 4 + [context + 2 * bare] * 4, "behind the edit once more"
    assert count.unembedded <= 8 * metrics["taught_tokens"], "readings before and behind, of both passes"
    assert metrics["forward_passes"] == pytest.approx(2.5, abs=0.01)
    assert metrics["kl_before"] > 1 and metrics["kl_after"] < metrics["kl_before"]


def test_spreading_costs_a_pass_and_what_is_behind(tiny, tokenizer):
    """Each module's block is run twice, before and behind its edit; what is missing is looked at from 4, 6 and 7 on."""
    rows = [FACT, OTHER]
    settings = {"spread": True, "target": "nearest", "margin": 6.0, "batch_tokens": 1}
    _, trainer = teacher(tiny, tokenizer, rows, **settings)
    trainer.train()
    trainer.rollback()
    with Count(tiny) as count:
        metrics = trainer.train()
    context, bare = lengths(tokenizer, rows)
    looks = [0, 1, 1, 1, 1, 2, 2, 3]  # how often each block runs to see what it is given and what is missing
    assert count.blocks == [context + bare * (1 + look + 1) for look in looks], "and once more with its edit"
    assert count.unembedded <= 13 * metrics["taught_tokens"], "five readings, and up to eight steps of forcing"


def test_a_shared_instruction_is_computed_once(tiny, tokenizer):
    rows = read_rows(QUESTIONS)
    examples = [Encoder(tokenizer, 512).encode(row) for row in rows]
    shared = len(tokenizer(LONG)["input_ids"])
    _, trainer = teacher(tiny, tokenizer, QUESTIONS, {"layers_to_transform": [4]})
    trainer.train()
    trainer.rollback()
    with Count(tiny) as count:
        trainer.train()
    whole = sum(len(e.context_ids) + len(e.bare_ids) for e in examples)
    assert count.blocks[0] < whole - 1.8 * shared, "two of three times it is not run"


@pytest.mark.parametrize("place", ["instruction", "prompt"])
@pytest.mark.parametrize(
    "kind", ["qwen2", "gemma2", "gemma3_text", "mistral", "gpt2", "bloom", "falcon", "gpt_neox", "qwen2_moe"]
)
def test_a_shared_beginning_changes_nothing(kind, place, monkeypatch):
    """The same change as with every row computed alone; gemma's window is shorter than what is shared."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    rows = QUESTIONS
    if place == "prompt":  # shared by the bare pass too, whose blocks are walked one by one
        rows = [{**row, "instruction": "Be brief.", "prompt": LONG + row["prompt"]} for row in QUESTIONS]
    found = []
    for least in (32, 10**9):
        monkeypatch.setattr("qf_peft.forward.prefix._WORTHWHILE", least)
        model, trainer = teacher(
            random_model(kind, max_position_embeddings=512, **({"n_positions": 512} if kind == "gpt2" else {})),
            tokenizer, rows, {"layers_to_transform": [0, 1]},
        )  # fmt: skip
        trainer.train()
        tuner = model.base_model
        found.append([tuner.delta("default", name).dense() for name in tuner.adapter_layers("default")])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 5e-4


@pytest.mark.parametrize("setting", ["paper", "default"])
def test_activations_beyond_the_memory_lie_in_files(tiny, tokenizer, setting, tmp_path, monkeypatch):
    """The same adapter, whatever may lie in memory; and no file is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = [{**FACT, "prompt": f"{FACT['prompt'][:-1]} {k}."} for k in range(12)] + [OTHER]
    state = tiny.state_dict()
    kept = ["Please say who started Brigar.", "Who founded Vagrin?"]
    filed = []
    original = Scratch._in_file
    monkeypatch.setattr(Scratch, "_in_file", lambda self, n, t: filed.append(n) or original(self, n, t))
    deltas = []
    for memory in (None, 0.0, 1e-4):
        base = type(tiny)(tiny.config).eval()
        base.load_state_dict(state)
        model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
        make = QFTrainingArguments.paper if setting == "paper" else QFTrainingArguments
        args = make(activation_memory=memory, contrast_chats=0, batch_tokens=256)
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=kept, args=args).train()
        tuner = model.base_model
        deltas.append([tuner.delta("default", name).dense() for name in tuner.adapter_layers("default")])
        assert bool(filed) == (memory is not None)
        if memory == 0.0:
            everything = sum(filed)
        filed.clear()
    assert everything > 100_000
    for others in deltas[1:]:
        for a, b in zip(deltas[0], others, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(a.norm())
    assert not list(tmp_path.iterdir())


def test_scratch_counts_what_is_in_use():
    scratch = Scratch(budget=1000)
    first = scratch.empty(5, 20, torch.float32, "cpu")
    second = scratch.empty(20, 10, torch.float32, "cpu")
    assert scratch.held == 400 and first.shape == (5, 20) and second.shape == (20, 10), "the second lies in a file"
    second.fill_(2.0)
    assert scratch.map(lambda a, b: a + b, second, torch.ones(20, 10)).eq(3).all()
    del first
    assert scratch.held == 0
    third = scratch.keep(torch.ones(10, 10))
    assert scratch.held == 400 and scratch.keep(torch.full((20, 10), 5.0)).eq(5).all() and third.eq(1).all()


def test_unfit_memory():
    for value in (-1, float("nan"), "2GB"):
        with pytest.raises(ValueError, match="activation_memory"):
            QFTrainingArguments(activation_memory=value)
