"""Anything as rows, files, settings and adapter folders: a right reading or a clear error, and nothing else happens.

Each test draws 40 examples, always the same; `QF_PEFT_FUZZ=500 python -m pytest tests/test_fuzz.py` draws 500 new ones.
"""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import FACT, OTHER, TINY, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.files import load_rows
from qf_peft.data.ledger import entry, from_lines, to_lines
from qf_peft.data.rows import Encoder, Row, read_rows

MANY = int(os.environ.get("QF_PEFT_FUZZ", "0"))
fuzz = settings(
    max_examples=MANY or 40, derandomize=not MANY, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
CLEAR = (ValueError, OSError, SafetensorError)
WEIGHTS, CONFIG, LEDGER, STATISTICS = (
    "adapter_model.safetensors", "adapter_config.json", "qf_ledger.jsonl", "qf_statistics.safetensors",
)  # fmt: skip
ENCODER = Encoder(AutoTokenizer.from_pretrained(TINY), max_length=512)

text = st.text(max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]) | text, "content": text})
    | values,
    max_size=4,
)
columns = ["instruction", "prompt", "completion", "significance", "wordings", "messages"]
rows = st.dictionaries(st.sampled_from(columns) | text, text | messages | values, max_size=6) | values


def clear(work):
    """What it gives, or None after an error that says what is wrong."""
    try:
        return work()
    except CLEAR as error:
        assert str(error).strip(), f"{type(error).__name__} without a word"
        return None


@fuzz
@given(st.lists(rows, max_size=3) | rows)
def test_rows(given_rows):
    for row in clear(lambda: read_rows(given_rows)) or []:
        assert isinstance(row, Row)
        example = clear(lambda row=row: ENCODER.encode(row)) if row.completion is not None else None
        if example is not None:
            assert len(example.context_ids) <= 512 and len(example.targets) == example.taught == len(
                example.significance
            )


@fuzz
@given(
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "txt", ""]),
    st.binary(max_size=200) | st.lists(rows, max_size=3) | text,
)
def test_files(kind, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows." + kind)
        if isinstance(content, list):
            lines = [json.dumps(row) for row in content]
            content = "\n".join(lines) if kind == "jsonl" else json.dumps(content)
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        found = clear(lambda: load_rows(str(path)))
        assert found is None or all(isinstance(row, dict) for row in found)
        assert path.read_bytes() == content


@fuzz
@given(text, text, text.filter(str.strip), st.lists(text, max_size=2), st.floats(0, 10) | st.lists(st.floats(0, 10)))
def test_the_ledger_holds_any_text(instruction, prompt, completion, wordings, significance):
    if isinstance(significance, list):
        significance = tuple(significance)
    made = entry(Row(0, instruction, prompt, completion, significance, tuple(wordings)))
    assert from_lines(to_lines([made, made]), "here") == (made, made)


@fuzz
@given(
    st.dictionaries(st.sampled_from([*QFTrainingArguments.__dataclass_fields__]), values, max_size=3),
    st.dictionaries(st.sampled_from([*QFConfig.__dataclass_fields__]), values, max_size=3),
)
def test_settings(arguments, options):
    made = clear(lambda: QFTrainingArguments(**arguments))
    if made is not None:
        json.dumps(made.to_dict())
        assert made.divergence_of(50) > 0 and (made.activation_bytes is None or made.activation_bytes >= 0)
    config = clear(lambda: QFConfig(**options))
    assert config is None or config.r >= 1


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A model with a taught adapter, and two saved ones of the same shape."""
    folders = []
    for row in FACT, OTHER:
        model = get_peft_model(random_model("llama"), QFConfig(task_type="CAUSAL_LM"))
        args = QFTrainingArguments.paper(disable_tqdm=True)
        QFTrainer(model, args, [row], processing_class=tokenizer).train()
        folders.append(tmp_path_factory.mktemp("saved"))
        model.save_pretrained(folders[-1])
    return model, folders


def cut(folder, draw):
    path = folder / draw(st.sampled_from([WEIGHTS, CONFIG, LEDGER, STATISTICS]))
    path.write_bytes(path.read_bytes()[: draw(st.integers(0, path.stat().st_size - 1))])


def changed(folder, draw):
    path = folder / draw(st.sampled_from([WEIGHTS, CONFIG, LEDGER, STATISTICS]))
    data = bytearray(path.read_bytes())
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
        data[place] = draw(st.integers(0, 255))
    path.write_bytes(bytes(data))


def missing(folder, draw):
    (folder / draw(st.sampled_from([WEIGHTS, CONFIG, LEDGER, STATISTICS]))).unlink()


def swapped(folder, draw, other):
    name = draw(st.sampled_from([WEIGHTS, CONFIG, LEDGER, STATISTICS]))
    shutil.copy(other / draw(st.sampled_from([name, WEIGHTS, STATISTICS])), folder / name)


def shapes(folder, draw):
    name = draw(st.sampled_from([WEIGHTS, STATISTICS]))
    tensors = load_file(folder / name)
    which = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from(["transposed", "empty", "row", "dtype", "nan", "inf", "scalar", "renamed", "more"]))
    tensor = tensors.pop(which)
    tensors[draw(text) if kind == "renamed" else which] = {
        "transposed": tensor.T.contiguous(), "empty": tensor[:0], "row": tensor[1:].clone(),
        "dtype": tensor.to(draw(st.sampled_from([torch.int8, torch.float64, torch.bool, torch.bfloat16]))),
        "nan": tensor * float("nan"), "inf": tensor + float("inf"), "scalar": torch.tensor(1.0),
    }.get(kind, tensor)  # fmt: skip
    if kind == "more":
        tensors[draw(text) or "base_model.model.model.embed_tokens.weight"] = torch.ones(1024, 32)
    metadata = None
    if name == STATISTICS:
        length = struct.unpack("<Q", (folder / name).read_bytes()[:8])[0]
        metadata = json.loads((folder / name).read_bytes()[8 : 8 + length])["__metadata__"]
    save_file(tensors, folder / name, metadata=metadata)


def header(folder, draw):
    path = folder / draw(st.sampled_from([WEIGHTS, STATISTICS]))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    size = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1]) | st.integers(0, 2**64 - 1))
    fake = json.dumps(draw(values)).encode()
    path.write_bytes(
        struct.pack("<Q", len(fake)) + fake + data[8 + length :]
        if draw(st.booleans())
        else struct.pack("<Q", size) + data[8:]
    )


def configured(folder, draw):
    config = json.loads((folder / CONFIG).read_text())
    names = [*(config.keys() - {"peft_type"}), "unknown"]  # an adapter of another type is not ours
    for name in draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=3)):
        config[name] = draw(values)
    (folder / CONFIG).write_text(json.dumps(config))


def tricks(folder, draw):
    name = draw(st.sampled_from([WEIGHTS, CONFIG, LEDGER, STATISTICS]))
    kind = draw(st.sampled_from(["link", "folder", "dangling", "loop", "pickle", "incoming"]))
    path = folder / name
    if kind == "pickle":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif kind == "incoming":  # a save that was taken over and broken off, of anything
        (folder / ".qf_incoming").mkdir()
        (folder / ".qf_incoming" / name).write_bytes(draw(st.binary(max_size=50)))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"link": "/etc/passwd", "dangling": folder / "nowhere", "loop": path}[kind])


def is_ours(folder):
    """Whether a folder's configuration says that it is a QF adapter's."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "QF"


KINDS = [cut, changed, missing, swapped, shapes, header, configured, tricks]


@pytest.mark.parametrize("corrupt", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_corrupted_adapters(made, corrupt):
    model, (saved, other) = made
    whole = load_file(saved / WEIGHTS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ledger, config = model.base_model.taught["default"], model.peft_config["default"].to_dict()

    @fuzz
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "adapter")
            shutil.copytree(saved, folder)
            corrupt(folder, data.draw, **({"other": other} if corrupt is swapped else {}))
            try:
                found = clear(lambda: model.load_adapter(folder, adapter_name="x"))
            except (TypeError, KeyError):  # PEFT's own, before it knows that the adapter is ours
                if is_ours(folder):
                    raise
                found = None
            if found is not None and (folder / WEIGHTS).is_file():
                tensors = load_file(folder / WEIGHTS)
                held = {n: p for n, p in model.named_parameters() if ".x." in n}
                assert all(bool(p.isfinite().all()) for p in held.values())
                for name, tensor in tensors.items():
                    assert torch.equal(held[name.replace(".weight", ".x.weight")], tensor.to(torch.float32)), name
                taught = model.base_model.taught.get("x")
                assert taught is None or taught.entries
                assert tensors.keys() == whole.keys() or corrupt in (shapes, swapped, configured, header, changed)
            if "x" in model.peft_config:
                model.delete_adapter("x")
        after = dict(model.named_parameters())
        assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())
        assert model.base_model.taught == {"default": ledger} and model.active_adapter == "default"
        assert model.peft_config["default"].to_dict() == config

    attempt()
