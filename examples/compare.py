"""QF beside its rivals on the tiny world: one table, JSON and a plot.

    pip install ".[examples]"
    python examples/compare.py                                   # everything; about an hour on two cores
    python examples/compare.py --facts 1 10 --seeds 0 --out /tmp/compare

Every method is taught the same facts about companies that the model has not seen, and asked by free greedy generation
(a run that was broken off goes on where it was):

- recall: the taught question; paraphrase: four other phrasings; locality: known facts other than the preserved ones,
  still answered right; unknown: questions about companies nobody taught, still answered as before;
- seconds: the lesson itself. What is made once a model and cached (the preserved chats' keys, the chats the model
  writes itself) is timed apart, in `once`. Memory: the growth of the process's resident memory in the lesson.

LoRA fine-tuning gets the learning rate and the number of steps, out of a small grid, that recall best and then keep
best on a development seed; MEMIT's and AlphaEdit's rules (with QF's targets, by QFTrainer) their strength likewise.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from editors import alphaedit, solving_by
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments, with_wordings
from qf_peft.data.rows import Encoder, read_rows

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tiny_world"))
import world  # noqa: E402

METRICS = ("recall", "paraphrase", "locality", "unknown")
DEVELOPMENT_SEED = 99
CEILING = "in context (ceiling)"
LAST = [7]  # the tiny model's last block, for the paper's single one


def teaching_set(count, seed):
    """Facts about novel companies: one relation each, asked in one phrasing; four other phrasings as paraphrases."""
    r, seen, rows = random.Random(f"facts {seed}"), set(), []
    while len(rows) < count:
        company = world.novel(r)
        if company in seen:
            continue
        seen.add(company)
        relation = r.choice(world.NAMES)
        value = world.value(r, relation)
        asks = world.RELATIONS[relation]["asks"]
        questions = r.sample([world.phrase(lead, ask, company) for lead in world.LEADS for ask in asks], 5)
        rows.append(
            {
                "instruction": world.state(r, relation, company, value),
                "prompt": questions[0],
                "completion": world.answer(relation, company, value),
                "paraphrases": questions[1:],
            }
        )
    return rows, seen


def preserve_set(seed, count=200):
    """Ordinary questions: three quarters about known companies, a quarter about unknown ones."""
    r = random.Random(f"preserve {seed}")
    return [
        world.question(r, r.choice(world.NAMES), r.choice(world.KNOWN)[0] if i % 4 else world.novel(r))
        for i in range(count)
    ]


def probe_sets(seed, companies, preserved, count):
    """Questions about known companies and about unknown ones, none of them preserved or taught."""
    r, known, unknown = random.Random(f"probes {seed}"), [], []
    while len(known) < count:
        relation, (company, facts) = r.choice(world.NAMES), r.choice(world.KNOWN)
        question = world.question(r, relation, company)
        if question not in preserved:
            known.append({"prompt": question, "completion": world.answer(relation, company, facts[relation])})
    while len(unknown) < count:
        company = world.novel(r)
        question = world.question(r, r.choice(world.NAMES), company)
        if company not in companies and question not in preserved:
            unknown.append({"prompt": question, "completion": world.UNKNOWN})
    return known, unknown


class PeakMemory:
    """The growth of the process's resident memory, sampled every five milliseconds, in MB."""

    def __enter__(self):
        self.start = self.peak = self._resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, self._resident())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    @property
    def grown(self):
        return (self.peak - self.start) / 2**20

    @staticmethod
    def _resident():
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Comparison:
    def __init__(self, cache):
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.cache = cache

    def base(self, dtype=torch.bfloat16):
        return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype, attn_implementation="eager")

    def qf(self, rows, preserved, layers=None, paper=False, **settings):
        """Teach by QFTrainer; returns the trainer, the seconds of the lesson, of what is made once, and MB."""
        make = QFTrainingArguments.paper if paper else QFTrainingArguments
        args = make(disable_tqdm=True, cache_dir=self.cache, **settings)
        model = get_peft_model(self.base(), QFConfig(layers_to_transform=layers, task_type="CAUSAL_LM"))
        trainer = QFTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            preserve_dataset=preserved,
            processing_class=self.tokenizer,
        )
        start = time.perf_counter()
        trainer.prepare()
        once = time.perf_counter() - start
        with PeakMemory() as memory:
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        return trainer, seconds, once, memory.grown

    def qf_wordings(self, rows, preserved, count=4):
        """Teach each row with up to `count` other wordings that the model writes itself, their making not timed."""
        plain = [{key: row[key] for key in ("instruction", "prompt", "completion")} for row in rows]
        found = self.qf(with_wordings(plain, self.base(), self.tokenizer, count=count), preserved)
        return self.asked(found[0], rows), *found[1:]

    def asked(self, trainer, rows):
        """The trainer's model, to be asked about other rows than it was taught."""
        return QFTrainer(model=trainer.model, args=trainer.args, train_dataset=rows, processing_class=self.tokenizer)

    def lora(self, rows, target, rate, steps, batch=32):
        """Fine-tune by AdamW on the completions' cross-entropy, warm-up and linear decay; float32 master adapter."""
        torch.manual_seed(0)
        model = get_peft_model(
            self.base(), LoraConfig(r=8, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM")
        )
        encoder = Encoder(self.tokenizer)
        examples = [encoder.encode(row) for row in read_rows(rows)]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        order, pad = random.Random(0), self.tokenizer.pad_token_id
        model.train()
        with PeakMemory() as memory:
            start = time.perf_counter()
            for step in range(steps):
                chosen = order.sample(examples, min(batch, len(examples)))
                width = max(len(e.bare_ids) for e in chosen)
                ids = torch.tensor([e.bare_ids + [pad] * (width - len(e.bare_ids)) for e in chosen])
                labels = torch.full_like(ids, -100)
                for row, example in enumerate(chosen):
                    end, count = len(example.bare_ids), example.taught - example.header
                    labels[row, end - count : end] = ids[row, end - count : end]
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
                loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seconds = time.perf_counter() - start
        merged = model.eval().merge_and_unload()
        return self.judge(merged, rows), seconds, 0.0, memory.grown

    def judge(self, model, rows):
        """A trainer for its evaluation: a fresh QF adapter, which changes nothing, on whatever model."""
        return QFTrainer(
            model=get_peft_model(model, QFConfig(layers_to_transform=LAST, task_type="CAUSAL_LM")),
            args=QFTrainingArguments(disable_tqdm=True),
            train_dataset=rows,
            processing_class=self.tokenizer,
        )

    def alphaedit(self, rows, preserved, ridge):
        with solving_by(alphaedit):
            return self.qf(
                rows, preserved, target="context", margin=None, significance="rows", remeasure=0, contrast_chats=0,
                sweeps=1, ridge=ridge,
            )  # fmt: skip

    def evaluate(self, trainer, known, unknown, most=60):
        """Shares of right answers; of many facts the first sixty are asked."""
        trainer.rows, trainer.dataset = trainer.rows[:most], trainer.dataset[:most]
        trainer.args.max_new_tokens = 40
        found = trainer.evaluate(locality=known, unknown=unknown)
        return {name: {"value": found[name].value, "count": found[name].count} for name in METRICS}


def lora_grid(facts):
    lengths = (30, 60) if facts <= 10 else (60, 120) if facts <= 50 else (200, 400) if facts <= 200 else (400,)
    return [(rate, steps) for rate in (3e-3, 1e-2) for steps in lengths]


def choose(runs):
    """The best by recall (to the nearest hundredth), then by locality, then by unknown."""
    return max(runs, key=lambda run: (round(run[1]["recall"], 2), run[1]["locality"], run[1]["unknown"]))[0]


def methods(compare, facts):
    """Name → (teach(rows, preserved), what is chosen on the development seed)."""
    table = {
        "QF": [lambda rows, kept: compare.qf(rows, kept)],
        "QF, no preserve_dataset": [lambda rows, kept: compare.qf(rows, None)],
        "QF, own wordings": [lambda rows, kept: compare.qf_wordings(rows, kept)],
        "QF paper (one block)": [lambda rows, kept: compare.qf(rows, kept, layers=LAST, paper=True)],
        "MEMIT's rule": [
            lambda rows, kept, c=c: compare.qf(
                rows, kept, target="context", margin=None, significance="rows", remeasure=0, contrast_chats=0, sweeps=1,
                preserve_strength=c,
            )
            for c in (0.3, 3.0, 30.0)
        ],
        "AlphaEdit's rule": [
            lambda rows, kept, e=e: compare.alphaedit(rows, kept, ridge=e) for e in (1e-3, 1e-1, 10.0)
        ],
    }  # fmt: skip
    for name, target in (("LoRA, all-linear", "all-linear"), ("LoRA, down_proj", ["down_proj"])):
        table[name] = [
            lambda rows, kept, target=target, rate=rate, steps=steps: compare.lora(rows, target, rate, steps)
            for rate, steps in lora_grid(facts)
        ]
    return table


def run(options):
    compare = Comparison(options.out / "cache")
    path = options.out / "compare.json"
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(r["facts"], r["seed"], r["method"]) for r in results}
    for facts in options.facts:
        chosen = next((r["chosen"] for r in results if r["facts"] == facts), {})
        table = {n: c for n, c in methods(compare, facts).items() if not options.methods or n in options.methods}
        for name, candidates in table.items():
            if name in chosen:
                continue
            if len(candidates) > 1 and (facts <= options.grid_up_to or not name.startswith("LoRA")):
                rows, companies = teaching_set(facts, DEVELOPMENT_SEED)
                kept = preserve_set(DEVELOPMENT_SEED)
                known, unknown = probe_sets(DEVELOPMENT_SEED, companies, set(kept), 60)
                runs = []
                for number, teach in enumerate(candidates):
                    scores = compare.evaluate(teach(rows, kept)[0], known, unknown, 40)
                    runs.append((number, {m: scores[m]["value"] for m in METRICS}))
                    print(f"  grid {facts} {name} {number}: {runs[-1][1]}", flush=True)
                chosen[name] = choose(runs)
            elif len(candidates) > 1:  # a long training run takes what was best at the size before
                chosen[name] = results[-1]["chosen"][name] if results else 0
            else:
                chosen[name] = 0
        for seed, (name, candidates) in itertools.product(options.seeds, table.items()):
            if (facts, seed, name) in done:
                continue
            rows, companies = teaching_set(facts, seed)
            kept = preserve_set(seed)
            known, unknown = probe_sets(seed, companies, set(kept), options.probes)
            trainer, seconds, once, memory = candidates[chosen[name]](rows, kept)
            scores = compare.evaluate(trainer, known, unknown)
            results.append(
                {
                    "facts": facts, "seed": seed, "method": name, "seconds": seconds, "once": once, "memory_mb": memory,
                    "chosen": chosen, **scores,
                }
            )  # fmt: skip
            print(f"{facts:4d} facts, seed {seed}, {name:26s}" + _cells(results[-1:]), flush=True)
            path.write_text(json.dumps(results, indent=1))
        in_context(compare, facts, [s for s in options.seeds if (facts, s, CEILING) not in done], results)
        path.write_text(json.dumps(results, indent=1))
    return results


def in_context(compare, facts, seeds, results):
    """The ceiling: the base model with each fact's instruction in its context."""
    for seed in seeds:
        rows, companies = teaching_set(facts, seed)
        kept = preserve_set(seed)
        known, unknown = probe_sets(seed, companies, set(kept), 1)
        trainer = compare.judge(compare.base(), rows)
        trainer.rows, trainer.dataset = trainer.rows[:60], trainer.dataset[:60]
        trainer.args.max_new_tokens = 40
        found = trainer.evaluate(known, unknown)
        results.append(
            {
                "facts": facts, "seed": seed, "method": CEILING, "seconds": 0.0, "once": 0.0,
                "memory_mb": 0.0, "chosen": results[-1]["chosen"],
                "recall": {"value": found["in_context"].value, "count": found["in_context"].count},
            }
        )  # fmt: skip


def _mean(runs, metric):
    """The mean over seeds and its 95% half-width: Wilson's at the pooled count."""
    found = [run[metric] for run in runs if metric in run]
    if not found:
        return None
    p, n, z = statistics.mean(f["value"] for f in found), sum(f["count"] for f in found), 1.96
    return p, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)


def _cells(runs):
    cells = []
    for metric in METRICS:
        found = _mean(runs, metric)
        cells.append(f" {found[0]:.2f} ±{found[1]:.2f} |" if found else " – |")
    cells.append(f" {statistics.mean(r['seconds'] for r in runs):.2f} |")
    cells.append(f" {statistics.mean(r['memory_mb'] for r in runs):.0f} |")
    return "".join(cells)


def table(results):
    lines = ["| facts | method | recall | paraphrase | locality | unknown | seconds | MB |", "|---" * 8 + "|"]
    for facts in sorted({r["facts"] for r in results}):
        for name in dict.fromkeys(r["method"] for r in results):
            runs = [r for r in results if r["facts"] == facts and r["method"] == name]
            if runs:
                lines.append(f"| {facts} | {name} |" + _cells(runs))
    return "\n".join(lines)


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["method"] for r in results))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = [*METRICS, "seconds", "memory_mb"]
    for axis, metric in zip(axes.flat, panels, strict=True):
        for name in names:
            runs = [r for r in results if r["method"] == name and metric in r]
            sizes = sorted({r["facts"] for r in runs})
            if metric in METRICS:
                points = [_mean([r for r in runs if r["facts"] == n], metric) for n in sizes]
                if not points:
                    continue
                means, halves = zip(*points, strict=True)
                axis.errorbar(sizes, means, yerr=halves, marker="o", capsize=2, label=name, lw=1.4, ms=4)
            elif name != CEILING:
                means = [statistics.mean(r[metric] for r in runs if r["facts"] == n) for n in sizes]
                axis.plot(sizes, means, marker="o", label=name, lw=1.4, ms=4)
        axis.set_xscale("log")
        axis.set_xlabel("facts taught at once")
        titles = {"memory_mb": "peak memory of the lesson, MB", "seconds": "seconds of the lesson"}
        axis.set_title(titles.get(metric, metric))
        axis.grid(alpha=0.3)
        if metric in METRICS:
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_yscale("log" if metric == "seconds" else "linear")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 10, 50, 200, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="only these, such as 'QF, own wordings'; by default all")
    parser.add_argument("--grid-up-to", type=int, default=500, help="beyond, LoRA takes what was best before")
    parser.add_argument("--probes", type=int, default=100, help="questions asked for locality, and for unknown")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="where JSON, plot and cache go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = run(options)
    (options.out / "compare.md").write_text(table(results) + "\n")
    print(table(results))
    plot(results, options.out / "compare.png")


if __name__ == "__main__":
    main()
