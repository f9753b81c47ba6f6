"""What each of several processes does in test_processes.py; one process alone gives the reference.

Run as `python -m torch.distributed.run … tests/several_processes.py FOLDER SCENARIO …`; every process writes what came
of each scenario to FOLDER/<scenario>-<process>.pt.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import FACT, OTHER, TINY
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qf_peft.teaching.targets
from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.runtime.processes import ProcessFailed, rank, start, world_size
from qf_peft.teaching import joint_lesson

import world  # isort: skip (conftest says where it is)

qf_peft.teaching.targets._CHUNK = 2**14  # sixteen positions at once, so that these are shared too

THIRD = {
    "instruction": "Nixri runs Tofinlor.", "prompt": "Who runs Tofinlor?", "completion": "Tofinlor is led by Nixri.",
}  # fmt: skip
CORRECTED = {**OTHER, "instruction": "Oslo is the home of Tofinlor.", "completion": "Tofinlor is located in Oslo."}
KEPT = [world.question(random.Random(1), world.NAMES[0], company) for company, _ in world.KNOWN[:12]]


def facts(count):
    r, rows = random.Random(5), []
    for _ in range(count):
        company, relation = world.novel(r), r.choice(world.NAMES)
        value = world.value(r, relation)
        rows.append(
            {
                "instruction": world.state(r, relation, company, value),
                "prompt": world.question(r, relation, company),
                "completion": world.answer(relation, company, value),
            }
        )
    return rows


class Session:
    """A model, and trainers for it."""

    def __init__(self, layers=None, **settings):
        network = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
        self.model = get_peft_model(network, QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
        self.tokenizer, self.args = AutoTokenizer.from_pretrained(TINY), QFTrainingArguments(**settings)

    def trainer(self, rows=None, kept=None):
        return QFTrainer(self.model, self.args, rows, kept, self.tokenizer)

    def state(self):
        tuner = self.model.base_model
        with torch.no_grad():
            ids = self.tokenizer([FACT["prompt"], OTHER["prompt"]], return_tensors="pt", padding=True)
            logits = self.model(**ids).logits
        changes = {name: tuner.delta("default", name).dense() for name in tuner.adapter_layers("default")}
        return {"logits": logits, "changes": changes, "factors": tuner.version("default").factors}


SMALL = 96  # tokens a batch, so that there are several
PAPER = vars(QFTrainingArguments.paper(batch_tokens=SMALL))


def paper(folder):
    """The paper's setting, uneven shares; then one row, so that others have none; a correction; forgetting."""
    session = Session([7], **PAPER)
    trainer = session.trainer([FACT, OTHER, THIRD])
    metrics = [trainer.train()]
    metrics.append(session.trainer(facts(1)).train())
    states = [session.state()]
    trainer = session.trainer([CORRECTED])
    metrics.append(trainer.train())
    metrics.append(trainer.forget(lambda e: e.prompt == FACT["prompt"]))
    states.append(session.state())
    metrics.append(trainer.consolidate())
    session.model.save_pretrained(folder / f"adapter-{world_size()}")
    files = sorted(path.name for path in (folder / f"adapter-{world_size()}").iterdir())
    return {"metrics": metrics, "states": states, "ledger": [e.id for e in trainer.facts], "files": files}


def default(folder):
    """Preserved chats answered by the model, contrast, a row not read in context and one without a completion,
    a second lesson with a rehearsal, questions asked."""
    session = Session(
        None,
        batch_tokens=SMALL,
        contrast_chats=60,
        remeasure=1,
        rehearse=0.5,
        cache_dir=folder / f"cache-{world_size()}",
        max_new_tokens=40,
    )
    unread = {**FACT, "instruction": "Rome is the home of Tofinlor."}
    silent = {k: v for k, v in THIRD.items() if k != "completion"}
    trainer = session.trainer([*facts(9), unread, silent], KEPT)
    metrics = [trainer.train()]
    metrics.append(session.trainer([OTHER], KEPT).train())
    asked = trainer.evaluate(locality=KEPT[:4])
    states = [session.state()]
    return {
        "metrics": metrics, "states": states, "ledger": [e.id for e in trainer.facts],
        "evaluated": {name: value.value for name, value in asked.items()},
        "cached": sorted(path.name for path in (folder / f"cache-{world_size()}").iterdir()),
    }  # fmt: skip


def standing(folder):
    """A standing instruction, told from facts by asking the model."""
    session = Session([6, 7], batch_tokens=SMALL, cache_dir=folder / f"cache-{world_size()}", max_new_tokens=40)
    rows = [{"instruction": "Answer in one word.", "prompt": prompt} for prompt in KEPT[:5]]
    metrics = session.trainer([*rows, FACT], KEPT).train()
    return {"metrics": [metrics], "states": [session.state()]}


def joint(folder):
    """As pretrained models are taught, whose stream grows with depth: chats measured while they are answered."""
    grows, joint_lesson.grows_with_depth = joint_lesson.grows_with_depth, lambda network: True
    try:
        session = Session([6, 7], batch_tokens=SMALL, cache_dir=folder / f"cache-{world_size()}")
        chats = [*KEPT, {"text": "Rome is old, and Oslo is far."}, {"prompt": "Who are you?", "completion": "Zanmi."}]
        metrics = session.trainer([FACT, OTHER], chats).train()
        return {"metrics": [metrics], "states": [session.state()]}
    finally:
        joint_lesson.grows_with_depth = grows


def short(folder):
    """Plain text of few tokens, where the order of summation in a matrix product depends on the batch's shape, so that
    the processes' activations are not the same to the bit as one process's."""
    rows = [
        {"instruction": f"{name} is red.", "prompt": f"{name} is", "completion": "red."}
        for name in ("Rome", "Oslo", "Zanmi", "Nixri", "Tofinlor")
    ]
    kept = [{"text": text} for text in ("Rome is old.", "Who are you?", "Oslo is far.")]
    cache = folder / f"cache-{world_size()}"
    default = {"cache_dir": cache, "contrast_chats": 0, "standing": False, "batch_tokens": 8}
    found = {"metrics": [], "states": []}
    for settings in (PAPER, default):
        session = Session([5, 6, 7] if settings is not PAPER else [7], **settings)
        session.tokenizer.chat_template = None
        found["metrics"].append(session.trainer(rows, kept).train())
        found["states"].append(session.state())
    return found


def refused(session, rows):
    """The error that teaching raises here, how long it took, and whether the adapter is what it was."""
    before, began, error = session.state()["factors"], time.monotonic(), None
    facts = session.trainer().facts
    try:
        session.trainer(rows).train()
    except (ValueError, FloatingPointError, ProcessFailed) as caught:
        error = f"{type(caught).__name__}: {caught}"
    after, seconds = session.state()["factors"], time.monotonic() - began
    same = all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    return {"error": error, "seconds": seconds, "kept": same and session.trainer().facts == facts}


def failing(folder):
    """An error in one process alone, different data, a save by the main process alone; and on it goes."""
    session = Session([7], **PAPER)
    session.trainer([FACT]).train()
    embeddings = session.model.get_input_embeddings().weight.data
    token = session.tokenizer(" Nixri", add_special_tokens=False)["input_ids"][0]
    kept = embeddings[token].clone()
    embeddings[token] = torch.inf
    found = {"overflow": refused(session, [*facts(3), THIRD])}
    embeddings[token] = kept
    found["different"] = refused(session, [OTHER] if rank() != 1 else [OTHER, THIRD])
    if rank() == 0:
        session.model.save_pretrained(folder / "alone")
    session.model.save_pretrained(folder / "together")
    found["saved"] = (folder / "together" / "adapter_model.safetensors").is_file()
    found["after"] = session.trainer([OTHER]).train()["facts"]
    return found


def dying(folder):
    """The last process is killed in the midst of a pass."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which ends the others when one is dead
    session = Session([7], **PAPER)
    session.trainer([FACT]).train()
    if rank() == world_size() - 1:
        block = session.model.get_base_model().model.layers[3]
        block.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return refused(session, facts(6))


if __name__ == "__main__":
    start()  # as a trainer does; the scenarios name folders by the number of processes
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        torch.save(globals()[name](folder), folder / f"{name}-{rank()}.pt")
