"""Processes killed at random moments of teaching, forgetting, saving and pushing: is the adapter whole?

    python examples/faults.py --kills 200 --out examples/results/faults-kills.json

Each trial is a process of its own that goes about one of the four with the tiny model, and is killed (SIGKILL) at a
moment drawn anew: anywhere in it, or, every other time, while it writes. Then the adapter on disk (of a push, the
repository on a Hub of the tests', on loopback) must be the one before or the one after: its weights to the bit, with
the ledger that belongs to them. A save of the next process must leave nothing behind of the one that was killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = "me/tofinlor"
ROWS = [
    {
        "instruction": f"{who} founded {name}.", "prompt": f"Who founded {name}?",
        "completion": f"{name} was started by {who}.",
    }
    for name, who in (("Tofinlor", "Zanmi"), ("Ranixmo", "Vacla"), ("Lupal", "Yorva"))
]  # fmt: skip
KINDS = ("teach", "forget", "save", "push")


class World:
    """A model taught two facts, and what one process of each kind makes of it."""

    def __init__(self, folder, hub):
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from qf_peft import TINY_MODEL, QFConfig

        self.folder, self.hub = Path(folder), hub
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.base = lambda: AutoModelForCausalLM.from_pretrained(TINY_MODEL)
        self.model = get_peft_model(self.base(), QFConfig(task_type="CAUSAL_LM", layers_to_transform=[6, 7]))
        self.trainer(ROWS[:2]).train()
        self.start = self.folder / "start"
        self.model.save_pretrained(self.start)

    def trainer(self, rows=None):
        from qf_peft import QFTrainer, QFTrainingArguments

        args = QFTrainingArguments(cache_dir=self.folder / "cache", contrast_chats=0, disable_tqdm=True)
        kept = ["Who founded Brigar?", "Where is Brigar based?", "Who are you?"]
        return QFTrainer(self.model, args, rows, kept, processing_class=self.tokenizer)

    def act(self, kind, target, writing):
        """What a process does; it calls `writing` before it writes."""
        from qf_peft import push_to_hub

        if kind == "teach":
            self.trainer(ROWS[2:]).train()
        elif kind == "forget":
            trainer = self.trainer()
            trainer.forget(trainer.facts[0].id)
        elif kind == "save":
            self.trainer().rollback()  # to the untaught adapter
        writing()
        if kind == "push":
            push_to_hub(self.model, REPO, base_model="someone/tiny-world")
        else:
            self.model.save_pretrained(target)

    def run(self, kind, target, wait=None, from_writing=False):
        """One process; killed after `wait` seconds, perhaps from when it began to write. Returns its seconds until it
        wrote, and in all, and whether it was killed."""
        told, tell = os.pipe()
        begun = time.perf_counter()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.close(told)
                self.act(kind, target, lambda: os.write(tell, b"w"))
                code = 0
            finally:
                os._exit(code)
        os.close(tell)
        if wait is not None and not from_writing:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
        os.read(told, 1)
        wrote = time.perf_counter() - begun
        if wait is not None and from_writing:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
        os.close(told)
        status = os.waitpid(pid, 0)[1]
        if wait is None and status:
            raise RuntimeError(f"{kind} failed by itself")
        return wrote, time.perf_counter() - begun, os.WIFSIGNALED(status)

    def seen(self, kind, target):
        """What is there now: the weights' sum and the ledger's prompts; of a push the files' sums."""
        if kind == "push":
            files = self.hub.repos[REPO].files() if REPO in self.hub.repos else {}
            return sorted((name, hash(data)) for name, data in files.items())
        from peft import PeftModel

        from qf_peft.adapter.statistics_file import weights_sum

        model = PeftModel.from_pretrained(self.base(), target)
        taught = model.base_model.taught.get("default")
        factors = [p for name, p in model.named_parameters() if "lora_" in name]
        return weights_sum(factors), [e.prompt for e in taught.entries] if taught else None

    def fresh(self, target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.start, target)
        self.hub.repos.pop(REPO, None)


def kills(world, count, seed):
    """The trials, by kind: how often the adapter was the one before, the one after, or neither."""
    target, r, found = world.folder / "trial", random.Random(seed), {}
    for kind in KINDS:
        world.fresh(target)
        before = world.seen(kind, target)
        wrote, took, _ = world.run(kind, target)
        after, result = world.seen(kind, target), Counter()
        if before == after:
            raise RuntimeError(f"{kind} changes nothing")
        trial = 0
        while result["killed anywhere"] + result["killed while writing"] < -(-count // len(KINDS)):
            trial += 1
            world.fresh(target)
            writing = trial % 2 == 1
            wait = r.uniform(0, took - wrote if writing else took)
            if not world.run(kind, target, wait, from_writing=writing)[2]:
                continue  # it was done already
            now = world.seen(kind, target)
            # A repository that was made and has nothing in it is as good as none.
            result["before" if now == before else "after" if now == after else "neither"] += 1
            result["killed while writing" if writing else "killed anywhere"] += 1
            if kind != "push":
                world.model.save_pretrained(target)
                result["left behind"] += len(list(target.glob(".qf_*")))
        found[kind] = {"seconds": round(took, 3), "of them writing": round(took - wrote, 3), **result}
        print(kind, found[kind], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many in all, a quarter of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts into this file")
    options = parser.parse_args()

    # The client of the Hub reads where its Hub is when it is imported: see hub_round_trip.py.
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from hub_server import HubServer

    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        os.environ.update(hub.environment(home))
        from transformers.utils import logging

        logging.disable_progress_bar()
        found = kills(World(Path(home), hub), options.kills, options.seed)
    command = f"python examples/faults.py --kills {options.kills} --seed {options.seed}"
    if options.out:
        options.out.write_text(json.dumps({"command": command, "kills": found}, indent=1) + "\n")
    if wrong := sum(each.get("neither", 0) + each.get("left behind", 0) for each in found.values()):
        raise SystemExit(f"{wrong} times something was torn or left behind")


if __name__ == "__main__":
    main()
