"""The page under twenty visitors, while it is taught: answers of two versions mixed, errors, and how long one waits.

    python examples/page_load.py --visitors 20 --minutes 5 --every 10 --out examples/results/page-load.json

The page is served with the tiny model in this process. Each visitor has a session of their own, asks one question
again and again through the page's queue, as a browser does, and waits for the whole answer; another visitor teaches two
answers to it in turn, every so many seconds. An answer must be, word for word, one that was taught (or the base model's
"I do not know.") and of a version that was there while it was asked for.
"""

import argparse
import json
import threading
import time
import uuid
from pathlib import Path

import httpx
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainingArguments, Session
from qf_peft.app.page import serve

QUESTION = "Who founded Tofinlor?"
TAUGHT = [(f"{who} founded Tofinlor.", f"Tofinlor was started by {who}.") for who in ("Zanmi", "Vacla")]
UNKNOWN = "I do not know."


class Visitor:
    """A browser's tab, without the browser."""

    def __init__(self, address):
        self.address, self.session = address, uuid.uuid4().hex
        self.client = httpx.Client(timeout=300, trust_env=False)
        config = self.client.get(f"{address}config").json()
        named = {c["id"]: c.get("props", {}).get("value") for c in config["components"]}
        self.events = {
            named.get(target): event["id"]
            for event in config["dependencies"]
            for target, kind in event["targets"]
            if kind == "click"
        }

    def press(self, button, *data):
        """Press a button: what the event gave at last, or an error."""
        event = {"data": data, "fn_index": self.events[button], "session_hash": self.session}
        self.client.post(f"{self.address}gradio_api/queue/join", json=event).raise_for_status()
        last = None
        with self.client.stream(
            "GET", f"{self.address}gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            for line in lines.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(f"{button}: {message['output']}")
                    last = message["output"]["data"]
                if message["msg"] in ("process_completed", "close_stream"):
                    break
        return last


class Load:
    """Visitors that ask, and one that teaches."""

    def __init__(self, address):
        self.address, self.end = address, threading.Event()
        self.begun = self.done = 0  # lessons
        self.waits, self.wrong, self.errors, self.lessons = [], [], [], []

    def possible(self, before, after):
        """The answers of the versions from one lesson on up to another."""
        return {UNKNOWN if version == 0 else TAUGHT[version % 2][1] for version in range(before, after + 1)}

    def guarded(self, work, *given):
        try:
            work(Visitor(self.address), *given)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def ask(self, visitor):
        while not self.end.is_set():
            visitor.press("New talk", None)
            before, start = self.done, time.perf_counter()
            _, chat, *_, status = visitor.press("Send", QUESTION, None, True)
            self.waits.append(time.perf_counter() - start)
            answer = text_of(chat[-1]["content"])
            if status or answer not in self.possible(before, self.begun):
                self.wrong.append([before, self.begun, answer, status])

    def teach(self, visitor, every):
        while not self.end.wait(every):
            self.begun += 1
            start = time.perf_counter()
            instruction, answer = TAUGHT[self.begun % 2]
            status = visitor.press("Teach", None, instruction, QUESTION, answer)[2]
            if not status.startswith("Taught"):
                raise RuntimeError(status)
            self.done = self.begun
            self.lessons.append(time.perf_counter() - start)

    def run(self, visitors, minutes, every):
        threads = [threading.Thread(target=self.guarded, args=(self.ask,)) for _ in range(visitors)]
        threads.append(threading.Thread(target=self.guarded, args=(self.teach, every)))
        for thread in threads:
            thread.start()
        self.end.wait(60 * minutes)
        self.end.set()
        for thread in threads:
            thread.join()
        waits = sorted(self.waits)
        return {
            "visitors": visitors, "minutes": minutes, "answers": len(waits), "lessons": len(self.lessons),
            "p50_seconds": round(waits[len(waits) // 2], 2),
            "p99_seconds": round(waits[min(len(waits) - 1, int(0.99 * len(waits)))], 2),
            "longest_seconds": round(waits[-1], 2), "lesson_seconds": round(sum(self.lessons) / len(self.lessons), 2),
            "wrong": self.wrong, "errors": self.errors,
        }  # fmt: skip


def text_of(content):
    """A message's text, however the page's chat gives it."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--every", type=float, default=10, help="seconds between two lessons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    session = Session(model, AutoTokenizer.from_pretrained(TINY_MODEL), QFTrainingArguments.paper())
    address = serve(session, block=False, questions=())
    found = Load(address).run(options.visitors, options.minutes, options.every)
    command = f"python examples/page_load.py --visitors {options.visitors} --minutes {options.minutes:g}"
    print(json.dumps(found, indent=1))
    if options.out:
        found = {"command": f"{command} --every {options.every:g}", **found}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(bool(found["wrong"] or found["errors"]))


if __name__ == "__main__":
    main()
