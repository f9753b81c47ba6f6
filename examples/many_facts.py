"""A thousand single facts, one after another: what the n-th costs, and what is still known of the first.

    python examples/many_facts.py --facts 1000 --out facts.json                      # the tiny model
    python examples/real_model.py smollm2
    python examples/many_facts.py --model smollm2 --facts 1000 --out facts.json      # a real one: hours

Each fact is a lesson of its own, in one process. Every `--every` lessons: seconds a lesson since the last look
(rehearsal included), the process's memory, the saved adapter's size, and how many of the first and of the last fifty
facts are answered as taught, by free greedy generation.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import read_rows
from qf_peft.evaluate.metrics import Evaluator, normalise

FIRST = 50


def invented(model, count):
    """Facts that the model can read: of the tiny world, or in English."""
    if model is None:
        from comparison.tiny import preserve_set, teaching_set

        return teaching_set(count, 0)[0], preserve_set(0)
    sys.path.insert(0, str(Path(__file__).parent / "english_world"))
    import english

    return english.facts(count, 0), None


class Life:
    """A model that is taught one fact after another."""

    def __init__(self, model, kept, settings):
        self.tokenizer = AutoTokenizer.from_pretrained(model or TINY_MODEL)
        base = AutoModelForCausalLM.from_pretrained(model or TINY_MODEL, dtype="float32")
        self.model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
        self.kept, self.args = kept, QFTrainingArguments(disable_tqdm=True, **settings)

    def trainer(self, rows=None):
        return QFTrainer(self.model, self.args, rows, self.kept, processing_class=self.tokenizer)

    def teach(self, row):
        start = time.perf_counter()
        self.trainer([row]).train()
        return time.perf_counter() - start

    def recall(self, rows):
        trainer = self.trainer()
        answers = Evaluator(trainer.network, trainer.encoder).answers(read_rows(rows))
        right = [answer == normalise(row["completion"]) for answer, row in zip(answers, rows, strict=True)]
        return sum(right) / len(right)

    def size(self):
        """Of the adapter on disk, in MB, its statistics included."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a chat model's folder or Hub id; by default the tiny one")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--cache", help="where what is preserved is kept; by default in Hugging Face's cache")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, kept = invented(options.model, options.facts)
    life, process, points, seconds = Life(options.model, kept, {"cache_dir": options.cache}), psutil.Process(), [], []
    life.trainer().prepare()
    for number, row in enumerate(rows, 1):
        seconds.append(life.teach(row))
        if number % options.every and number != len(rows):
            continue
        points.append(
            {
                "facts": number,
                "seconds_mean": round(statistics.mean(seconds), 3),
                "seconds_median": round(statistics.median(seconds), 3),
                "memory_mb": round(process.memory_info().rss / 1e6),
                "file_mb": round(life.size(), 2),
                "recall_first": round(life.recall(rows[: min(FIRST, number)]), 3),
                "recall_last": round(life.recall(rows[max(0, number - FIRST) : number]), 3),
                "rank": life.model.peft_config["default"].r,
            }
        )
        seconds = []
        print(points[-1], flush=True)
        if options.out:
            named = f" --model {Path(options.model).name}" if options.model else ""
            command = f"python examples/many_facts.py{named} --facts {options.facts} --every {options.every}"
            options.out.write_text(json.dumps({"command": command, "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
