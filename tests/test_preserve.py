"""What is preserved: its forms, the chats that the model writes itself, and the cache of keys on disk."""

import os

import pytest
import torch
from conftest import FACT, OTHER, TINY, random_model
from peft import get_peft_model
from transformers import AutoTokenizer

import qf_peft.teaching.preserved_keys as preserved_keys_module
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder
from qf_peft.forward.capture import Point, forward_pass
from qf_peft.forward.scratch import Scratch
from qf_peft.teaching.generic_prompts import FACTUAL, OPEN
from qf_peft.teaching.preserved_cache import Cache, logger
from qf_peft.teaching.preserved_chats import read_preserve_dataset, write_chats
from qf_peft.teaching.preserved_keys import nearest, nearness, preserved_keys

PROMPTS = ["Who founded Ranixmo?", "Tell me where Lupal is based.", "Who runs Zanko?"]


@pytest.fixture
def keys(tiny, tokenizer, tmp_path):
    def measure(dataset=PROMPTS, own=0, seed=0, model=tiny, folder=tmp_path, size=1.0, **options):
        modules = {f"model.layers.{k}.mlp.down_proj": model.model.layers[k].mlp.down_proj for k in (2, 7)}
        chats = read_preserve_dataset(dataset) if dataset else []
        return preserved_keys(
            model, Encoder(tokenizer), modules, chats, own, batch_tokens=512, seed=seed, cache=Cache(folder, size),
            **options,
        )  # fmt: skip

    return measure


def test_forms(tiny, tokenizer, keys, tmp_path):
    """A prompt, a row and messages of the same chat give the same keys, those of a pass of the test's own."""
    answer = "Ranixmo was started by Yorva."
    user, assistant = {"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": answer}
    forms = [
        [PROMPTS[0]],
        [{"prompt": PROMPTS[0]}],
        [{"prompt": PROMPTS[0], "completion": answer}],
        [{"prompt": [user], "completion": [assistant]}],
        [{"messages": [user, assistant]}],
        [{"messages": [user], "text": None}],
    ]
    measured = [keys(form, folder=tmp_path / str(i)) for i, form in enumerate(forms)]
    text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    ids = tokenizer(text[: text.rindex("<|im_end|>") + len("<|im_end|>")])["input_ids"]
    taken = {}
    handle = tiny.model.layers[7].mlp.down_proj.register_forward_pre_hook(lambda _, args: taken.update(k=args[0]))
    tiny(torch.tensor([ids[:-1]]))
    handle.remove()
    count = len(tokenizer(answer + "<|im_end|>")["input_ids"])
    for found in measured:
        assert found.sequences == [ids] and found.positions == [count]
        assert torch.allclose(found.keys["model.layers.7.mlp.down_proj"], taken["k"][0, -count:], atol=1e-5)
    plain = keys([{"text": "Rome is the home of Lupal."}])
    assert plain.positions == [len(plain.sequences[0]) - 1], "all steps of plain text"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "preserve_dataset is empty; leave it out"),
        ("chats.jsonl", "preserve_dataset is a str; expected a list"),
        ([PROMPTS[0], 7], "row 1 is a int; expected a prompt or a dict"),
        ([{"question": "x"}], r"row 0 has the columns \['question'\]; expected 'prompt', 'messages' or 'text'"),
        ([{"prompt": " "}], "row 0: prompt is empty"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "row 0: messages has no prompt"),
    ],
)
def test_unfit_datasets(tiny, tokenizer, dataset, message):
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7]))
    with pytest.raises(ValueError, match=message):
        QFTrainer(model=model, processing_class=tokenizer, train_dataset=[FACT], preserve_dataset=dataset)


def forbid(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("keys were measured again")

    monkeypatch.setattr(preserved_keys_module, "_measure", fail)


def same(a, b):
    assert a.sequences == b.sequences and a.positions == b.positions and a.keys.keys() == b.keys.keys()
    assert all(torch.equal(a.keys[k], b.keys[k]) for k in a.keys)


def test_cached_on_disk(keys, tmp_path, monkeypatch):
    first = keys()
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"], "no temporary file is left"
    forbid(monkeypatch)
    same(first, keys())


def test_another_model_dataset_or_seed_is_another_file(tiny, keys, tmp_path):
    keys()
    keys(PROMPTS[:2])
    keys(PROMPTS, starts_only=True)
    keys(None, own=4)
    keys(None, own=4, seed=1)
    with torch.no_grad():
        tiny.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    keys()
    assert len(list(tmp_path.iterdir())) == 6


def test_adapters_do_not_change_the_name(tiny, keys, tmp_path, tokenizer):
    first = keys()
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[7]))
    args = QFTrainingArguments.paper()
    QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT]).train()
    with model.base_model.without_adapters():
        same(first, keys())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["torn", "empty", "not tensors", "another's", "changed"])
def test_a_damaged_cache_is_made_anew(keys, tmp_path, damage, caplog):
    first = keys()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not tensors":
        path.write_bytes(b"hello" * 1000)
    elif damage == "another's":
        keys(PROMPTS[:1], folder=tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(content[:-8] + bytes(b ^ 1 for b in content[-8:]))
    logger.addHandler(caplog.handler)
    same(first, keys())
    assert "made anew" in caplog.text
    assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_only_the_cache(keys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    same(keys(folder=blocked / "cache"), keys())


def test_the_cache_does_not_grow_without_end(keys, tmp_path):
    """The oldest go, the one in use last; what others keep there, and a file that is being read, are left alone."""
    (tmp_path / "mine.safetensors").write_bytes(b"x" * 10_000_000)
    first, second, reading = (keys(PROMPTS[i : i + 1]) for i in range(3))
    paths = {p for p in tmp_path.iterdir() if p.name != "mine.safetensors"}
    largest = max(p.stat().st_size for p in paths)
    broken = tmp_path / ".qf_cache-abc.tmp"
    broken.write_bytes(b"half")
    for path in (*paths, broken):
        os.utime(path, (1e9, 1e9))
    same(first, keys(PROMPTS[:1]))  # used again
    fourth = keys(PROMPTS[:2], size=3.5 * largest / 1e9)
    left = {p for p in tmp_path.iterdir() if p.name != "mine.safetensors"}
    assert len(paths - left) == 1 + (sum(p.stat().st_size for p in left) + largest > 3.5 * largest), "only what must go"
    assert not broken.exists() and (tmp_path / "mine.safetensors").exists()
    keys(PROMPTS[1:], size=0.0)
    assert len(list(tmp_path.glob("preserved-*"))) == 1, "the one just written stays"
    for found in first, second, reading, fourth:
        assert all(bool(tensor.isfinite().all()) for tensor in found.keys.values()), "read on, though removed"
    with pytest.raises(ValueError, match="cache_size=-1; expected a number from 0 up"):
        QFTrainingArguments(cache_size=-1)


def test_keys_are_measured_on_the_host_within_a_budget(tiny, keys, tmp_path, monkeypatch):
    """No more than a module's keys of a batch is held as the pass computes it; beyond the budget they are in files."""
    files, held = [], []
    in_file, take = Scratch._in_file, Scratch.take

    def watched(scratch, values):
        held.append((values.dtype, take(scratch, values).dtype))
        return take(scratch, values)

    monkeypatch.setattr(Scratch, "take", watched)
    monkeypatch.setattr(Scratch, "_in_file", lambda self, *a: files.append(a) or in_file(self, *a))
    few = keys(model=tiny.to(torch.bfloat16), folder=tmp_path / "a", memory=0.0)
    assert len(files) == 2 and set(held) == {(torch.float32, torch.bfloat16)}
    same(few, keys(model=tiny, folder=tmp_path / "b"))
    assert len(files) == 2


def test_the_model_writes_chats_itself(tiny, tokenizer):
    encoder = Encoder(tokenizer)
    before = torch.get_rng_state()
    chats = write_chats(tiny, encoder, 40, 0, lambda n: None)
    prompts = [c.prompt for c in chats]
    assert len(prompts) == len(set(prompts)) > 20
    assert sum(p.endswith((".", "?")) for p in prompts) > 0.9 * len(prompts)
    assert [c.prompt for c in write_chats(tiny, encoder, 40, 0, lambda n: None)] == prompts
    assert [c.prompt for c in write_chats(tiny, encoder, 40, 1, lambda n: None)] != prompts
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"


def test_generic_prompts_where_the_model_cannot_write(tokenizer):
    chats = write_chats(random_model("gpt2"), Encoder(tokenizer), 40, 0, lambda n: None)
    assert [c.prompt for c in chats][-len((*FACTUAL, *OPEN)) :] == [*FACTUAL, *OPEN]


def test_a_model_without_a_template_writes_plain_texts(tiny):
    plain = AutoTokenizer.from_pretrained(TINY)
    plain.chat_template = None
    chats = write_chats(tiny, Encoder(plain), 20, 0, lambda n: None)
    texts = [c.text for c in chats if c.text is not None]
    assert len(texts) == len(set(texts)) >= 10 and all(c.prompt is None for c in chats if c.text)


def test_few_keys_make_no_square_matrix(tiny, tokenizer, tmp_path, monkeypatch):
    """With fewer tokens than d_in the solve stays in their span: nothing of d_in × d_in is made."""
    import qf_peft.teaching.module_lesson as lesson

    moments = []

    class Moment(lesson.SecondMoment):
        def update(self, *args):
            moments.append(self)
            return super().update(*args)

    monkeypatch.setattr(lesson, "SecondMoment", Moment)
    model = get_peft_model(tiny, QFConfig(layers_to_transform=[6, 7]))
    args = QFTrainingArguments(cache_dir=tmp_path)
    QFTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=[FACT], preserve_dataset=PROMPTS
    ).train()
    assert moments and all(m.matrix is None and m.root.shape[0] < 768 for m in moments)


def test_nearest_in_turn_and_nearness():
    starts = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, -1]])
    taught = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert set(nearest(starts, taught, 2)) == {0, 2} and set(nearest(starts, taught, 4)) == {0, 1, 2, 3}
    assert nearest(starts, taught, 0) == [] and len(nearest(starts, taught, 99)) == 5
    weights = nearness(starts, taught, torch.tensor([1.0, 3.0]))
    assert float(weights.sum()) == pytest.approx(1) and weights[2] == weights.max() and weights[4] == weights.min()
    assert float(weights[2] / weights[0]) == pytest.approx(3)


def test_forward_pass_over_text_positions(tiny, tokenizer):
    ids = tokenizer("Rome is the home of Lupal.")["input_ids"]
    point = {"x": Point(tiny.model.layers[0], "output")}
    found = forward_pass(tiny, [ids, ids[:4]], [3, 2], point, batch_tokens=1, pad_id=0)["x"]
    together = forward_pass(tiny, [ids, ids[:4]], [3, 2], point, batch_tokens=99, pad_id=0)["x"]
    assert found.shape == (5, 192) and torch.allclose(found, together, atol=1e-5)


def test_later_lessons_find_what_the_first_one_measured(tiny, tokenizer, tmp_path, monkeypatch):
    """Taught as pretrained models are: the first lesson chooses some late blocks, and later ones keep to them."""
    monkeypatch.setattr("qf_peft.teaching.joint_lesson.grows_with_depth", lambda network: True)
    monkeypatch.setattr("qf_peft.teaching.constants.LARGE_STREAM", 0.9)
    model = get_peft_model(tiny, QFConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, cache_dir=tmp_path)
    chosen = [QFTrainer(model, args, [row], PROMPTS, tokenizer).train()["first_block"] for row in (FACT, OTHER)]
    assert chosen[0] == chosen[1] > 4, "not all of the later half"
    assert len(list(tmp_path.glob("moments-*"))) == 1
