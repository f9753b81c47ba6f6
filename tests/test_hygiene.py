"""What users expect: logging, HF_* variables, trackers, seeds, dry runs, interrupts that leave no trace."""

import json
import logging
import os
import struct
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import FACT, OTHER, TINY, ask
from peft import get_peft_model
from test_default_setting import facts
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.runtime import logs

CHATS = ["Who founded Ranixmo?", "Where is Molupal located?", "Tell me where Lupal is based."]


def make(tokenizer, rows, model=None, paper=True, preserved=None, layers=(6, 7), **settings):
    if model is None:
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(base, QFConfig(layers_to_transform=list(layers), task_type="CAUSAL_LM"))
    given = {"disable_tqdm": True, "max_new_tokens": 40, **settings}
    args = QFTrainingArguments.paper(**given) if paper else QFTrainingArguments(contrast_chats=0, **given)
    return QFTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, preserve_dataset=preserved)


def run(code, **variables):
    """A process of its own, in which nothing of this one's logging or environment is configured."""
    prepared = f"import logging, transformers\nTINY, FACT = {str(TINY)!r}, {FACT!r}\n{code}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prepared], capture_output=True, text=True, timeout=300,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


SPEAK = """
import qf_peft, qf_peft.teaching.lessons, sys
def speak():
    for level in ("info", "warning", "error"):
        getattr(qf_peft.teaching.lessons.logger, level)(f"said as {level}")
"""
CASES = [
    ("pass", ["warning", "error"]),
    ("logging.basicConfig(level=logging.INFO)", ["info", "warning", "error"]),
    ("logging.basicConfig(level=logging.ERROR)", ["error"]),
    ("logging.getLogger('qf_peft').setLevel(logging.ERROR)", ["error"]),
    ("logging.getLogger('qf_peft').setLevel(logging.CRITICAL); logging.basicConfig(level=10)", []),
    ("logging.getLogger('qf_peft.teaching.lessons').setLevel(logging.INFO)", ["info", "warning", "error"]),
    ("transformers.logging.set_verbosity_error()", ["error"]),
    ("transformers.logging.set_verbosity_info()", ["info", "warning", "error"]),
    ("transformers.logging.set_verbosity_error(); logging.basicConfig(level=logging.INFO)", ["error"]),
]


def said(err):
    return [line.split("said as ")[1] for line in err.splitlines() if "said as " in line]


def test_logging():
    """By the standard library's configuration or by transformers', whichever was set; each record once."""
    code = SPEAK
    for before, _ in CASES:
        code += f"""
{before}
speak()
print("---", file=sys.stderr)
logging.root.handlers.clear()
logging.root.setLevel(logging.WARNING)
for name in ("qf_peft", "qf_peft.teaching.lessons"): logging.getLogger(name).setLevel(logging.NOTSET)
transformers.logging.set_verbosity_warning()
"""
    out, err = run(code)
    for (before, expected), part in zip(CASES, err.split("---"), strict=False):
        assert said(part) == expected, before
    assert len(err.split("---")) == len(CASES) + 1 and not out


def test_a_logger_configured_before_the_import_is_left_alone(monkeypatch):
    monkeypatch.setattr(logging.Logger.manager, "loggerDict", {})
    theirs = logging.getLogger("qf_peft")
    theirs.setLevel(logging.ERROR)
    logs.configure()
    assert logging.getLogger("qf_peft") is theirs and theirs.level == logging.ERROR and not theirs.handlers
    logging.Logger.manager.loggerDict.clear()
    logging.getLogger("qf_peft.teaching.lessons")  # a module's only: theirs is not made yet
    logs.configure()
    logs.configure()
    assert len(logging.getLogger("qf_peft").handlers) == 1


def test_records_have_names_and_reach_handlers(tokenizer, caplog):
    unread = {**FACT, "instruction": "Rome is the home of Tofinlor."}
    trainer = make(tokenizer, [unread], disable_tqdm=True)
    seen, handler = [], logging.Handler()
    handler.emit = seen.append
    logging.getLogger("qf_peft").addHandler(handler)
    try:
        trainer.train()
    finally:
        logging.getLogger("qf_peft").removeHandler(handler)
    (record,) = seen
    assert record.name == "qf_peft.teaching.lessons" and record.levelno == logging.WARNING
    assert "not read in context" in record.getMessage() and record in caplog.records


TEACH = """
import torch, qf_peft
from pathlib import Path
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
model = get_peft_model(base, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
"""


def test_variables(tmp_path):
    """TRANSFORMERS_VERBOSITY is honoured; caches go to HF_HOME; offline nothing is asked of a Hub; there are no bars
    where none are wanted. HF_TOKEN and HF_ENDPOINT are tested in test_hub.py."""
    code = f"""{TEACH}{SPEAK}
speak()
import socket
def refused(*_): raise AssertionError("the network was used")
socket.socket.connect = refused
tokenizer = AutoTokenizer.from_pretrained(TINY)
trainer = QFTrainer(model=model, args=QFTrainingArguments(contrast_chats=0), train_dataset=[FACT],
                    preserve_dataset=["Who founded Ranixmo?"], processing_class=tokenizer)
trainer.train()
with trainer.progress() as bar:
    print(bar.disable)
try:
    qf_peft.QFConfig.from_pretrained("someone/adapter")
except AssertionError:
    raise
except Exception as error:
    print("not loaded", type(error).__name__)
"""
    out, err = run(
        code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
    )  # fmt: skip
    assert said(err) == ["error"]
    disabled, refused = out.splitlines()
    assert disabled == "True" and refused.startswith("not loaded")
    (cached,) = (tmp_path / "qf_peft").iterdir()
    assert cached.name.startswith("preserved-")


def test_bars_are_off_where_transformers_are(tokenizer):
    from transformers.utils import logging as transformers_logging

    trainer = make(tokenizer, [FACT], disable_tqdm=False)
    transformers_logging.disable_progress_bar()
    try:
        with trainer.progress() as bar:
            assert bar.disable
    finally:
        transformers_logging.enable_progress_bar()
    with trainer.progress() as bar:
        assert not bar.disable


class Tracker(GeneralTracker):
    """A user's own."""

    name, requires_logging_directory = "mine", False

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = None, [], False

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_of_the_users(tokenizer):
    mine = Tracker()
    trainer = make(tokenizer, [FACT], report_to=[mine])
    metrics = trainer.train()
    found = trainer.evaluate(unknown=CHATS)
    trainer.forget(trainer.facts[0].id)
    (first, taught), (second, asked), (third, forgot) = mine.logged
    assert (first, second, third) == (0, 1, 2) and taught == {f"train/{k}": v for k, v in metrics.items()}
    assert asked["eval/recall"] == found["recall"].value and asked["eval/recall_low"] == found["recall"].low
    assert forgot == {"train/facts": 0, "train/forgotten": 1}
    assert mine.config == trainer.args.to_dict() and "report_to" not in mine.config
    del trainer
    assert not mine.finished, "it is the user's to finish"
    json.dumps(mine.config)


def records(path):
    """The scalars in a TensorBoard file: TFRecords of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        found.update({value.tag: (event.step, value.simple_value) for value in event.summary.value})
    return found


def test_tensorboard(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    trainer = make(tokenizer, [FACT], report_to="tensorboard")
    metrics = trainer.train()
    trainer.evaluate()
    del trainer  # which ends the run
    found = {}
    for path in tmp_path.glob("**/events*"):
        found.update(records(path))
    assert found["train/kl_before"] == (0, pytest.approx(metrics["kl_before"])) and found["eval/recall"] == (1, 1.0)
    assert list(tmp_path.glob("qf_peft/*/hparams.yml")), "the settings too"


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_trackers_that_are_not_there(tokenizer):
    with pytest.raises(ValueError, match=r"report_to='nowhere': .*nowhere"):
        make(tokenizer, [FACT], report_to="nowhere")
    with pytest.raises(ValueError, match=r"report_to=\['comet_ml'\]: comet_ml is not installed"):
        make(tokenizer, [FACT], report_to=["comet_ml"])


def test_no_tracker_by_default(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tokenizer, [FACT]).train()
    assert not list(tmp_path.iterdir())
    assert next(f for f in fields(QFTrainingArguments) if f.name == "report_to").default is None


def test_seeds(tokenizer, tmp_path):
    """The same seed and data give the same adapter, whatever the global generators hold; another seed another one."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        trainer = make(
            tokenizer, facts(2, 1), paper=False, preserve_chats=6, seed=seed, cache_dir=tmp_path / str(number)
        )
        torch.manual_seed(number)
        state = torch.get_rng_state()
        trainer.train()
        found.append({k: v for k, v in trainer.model.state_dict().items() if "lora_" in k})
        assert torch.equal(torch.get_rng_state(), state), "nor are they touched"
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
    assert any(v.shape != found[2][k].shape or not torch.equal(v, found[2][k]) for k, v in found[0].items())


def everything(model, *folders):
    """All that must be as it was: weights, modes, flags, hooks, adapters' switches, ledger, versions, files."""
    tuner = model.base_model
    return {
        "weights": {k: (v.shape, v.flatten().tolist()) for k, v in model.state_dict().items() if "lora_" in k},
        "modes": {n: m.training for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "replaced": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "off": [n for n, m in model.named_modules() if getattr(m, "_disable_adapters", False)],
        "ledger": tuner.taught.get("default"),
        "versions": list(map(id, tuner.versions.get("default", []))),
        "rank": model.peft_config["default"].r,
        "files": {p: p.read_bytes() for folder in folders for p in folder.glob("**/*") if p.is_file()},
    }


@pytest.mark.parametrize("act", ["train", "correct", "forget", "evaluate", "prepare"])
def test_an_interrupt_leaves_everything_as_it_was(tokenizer, tmp_path, act):
    """KeyboardInterrupt from inside a forward pass, at several moments of everything that runs the model."""
    cache, saved = tmp_path / "cache", tmp_path / "saved"
    cache.mkdir()
    options = {"paper": False, "preserved": CHATS, "cache_dir": cache}
    trainer = make(tokenizer, [FACT], **options)
    trainer.train()
    model = trainer.model
    model.save_pretrained(saved)
    model.train()
    model.base_model.model.model.layers[0].eval()
    rows = [{**FACT, "completion": "Tofinlor was started by Vacla."}] if act == "correct" else [OTHER]
    layer = model.get_base_model().model.layers[7]
    moments = 0
    for after in (1, 2, 4, 7, 12, 20):
        # A cache of its own, so that what is preserved is measured too.
        again = make(tokenizer, rows, model, **{**options, "preserved": [*CHATS, f"Who are you? {after}"]})
        before, metrics, calls = everything(model, cache, saved), dict(again.metrics), []

        def interrupt(*_, calls=calls, after=after):
            calls.append(0)
            if len(calls) == after:
                raise KeyboardInterrupt

        handle = layer.register_forward_hook(interrupt)
        before["hooks"] = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        run = {
            "train": again.train, "correct": again.train, "evaluate": lambda again=again: again.evaluate(unknown=CHATS),
            "forget": lambda again=again: again.forget([]), "prepare": again.prepare,
        }[act]  # fmt: skip
        try:
            run()
        except KeyboardInterrupt:
            moments += 1
            cached = {p for p in before["files"] if p.parent == cache}
            now = everything(model, cache, saved)
            # A cache that was whole before the interrupt may stay; half a file may not.
            assert all(p.suffix == ".safetensors" for p in now["files"].keys() - cached if p.parent == cache)
            now["files"] = {p: data for p, data in now["files"].items() if p in before["files"]}
            assert now == before and again.metrics == metrics
        finally:
            handle.remove()
        if len(calls) < after:
            break
    assert moments >= 3
    model.eval()
    assert ask(model, tokenizer, FACT["prompt"]) in (FACT["completion"], "Tofinlor was started by Vacla.")


def test_interrupted_while_caching(tokenizer, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qf_peft.teaching.preserved_cache.save_file", interrupted)
    trainer = make(tokenizer, [FACT], paper=False, preserved=CHATS, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list(tmp_path.iterdir()) and trainer.facts == ()


def test_dry_run_counts_what_a_lesson_teaches(tokenizer, tmp_path, monkeypatch):
    rows = facts(4, 2)
    trainer = make(tokenizer, rows, paper=False, preserved=CHATS, cache_dir=tmp_path, layers=range(8))
    before = everything(trainer.model, tmp_path)
    network = trainer.model.get_base_model()
    forward, seen = type(network).forward, []

    def short(self, input_ids=None, **kwargs):
        seen.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(network), "forward", short)
        plan = trainer.dry_run()
    assert max(seen) <= 8, "no more than a few tokens, to see which kind of lesson it is"
    assert everything(trainer.model, tmp_path) == before and trainer.metrics == {}
    metrics = trainer.train()
    assert plan["facts"] == metrics["facts"] == 4 and plan["taught_tokens"] == metrics["taught_tokens"]
    assert plan["modules"] == list(trainer.model.base_model.adapter_layers("default"))
    assert metrics["forward_passes"] <= plan["forward_passes_at_most"] * 1.1
    assert plan["forward_passes"] < plan["forward_passes_at_most"]
    assert (plan["chats"], plan["chats_to_write"], plan["known"], plan["unanswered"]) == (3, 0, 0, 0)
    sequences = [trainer.encoder.encode(row) for row in trainer.rows]
    assert plan["tokens"] == sum(len(e.context_ids) + len(e.bare_ids) for e in sequences)
    assert plan["longest"] == max(len(e.context_ids) for e in sequences)
    json.dumps(plan)


def test_dry_run_of_corrections_open_rows_and_written_chats(tokenizer):
    trainer = make(tokenizer, [FACT, OTHER])
    trainer.train()
    rows = [{**FACT, "completion": "Tofinlor was started by Vacla."}, {k: OTHER[k] for k in ("instruction", "prompt")}]
    plan = make(tokenizer, rows, trainer.model, paper=False, preserve_chats=9).dry_run()
    assert (plan["facts"], plan["unanswered"], plan["known"], plan["corrected"]) == (2, 1, 2, 1)
    assert (plan["chats"], plan["chats_to_write"]) == (0, 9)
    assert make(tokenizer, rows, trainer.model).dry_run()["chats_to_write"] == 0, "the paper's setting preserves none"


def test_dry_run_counts_the_facts_taught_before(tokenizer):
    """From the eleventh fact on contrasting chats are written, whichever lesson it comes in."""
    written = []
    for count in (7, 9):
        trainer = make(tokenizer, facts(count, 2))
        trainer.train()
        more = QFTrainer(
            trainer.model, QFTrainingArguments(contrast_chats=30), [FACT, OTHER], CHATS, processing_class=tokenizer
        )
        written.append(more.dry_run()["chats_to_write"])
    assert written == [0, 30]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset is missing"),
        ([FACT, {**FACT, "completion": "No."}], "contradict"),
        ([{**FACT, "instruction": "word " * 3000}], "row 0 has .* tokens"),
    ],
)
def test_dry_run_finds_bad_rows(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, rows).dry_run()


def test_the_tokenizer_is_not_changed(tokenizer):
    fresh = AutoTokenizer.from_pretrained(TINY)
    make(tokenizer, [FACT]).train()
    assert tokenizer.padding_side == fresh.padding_side and len(tokenizer) == len(fresh)
