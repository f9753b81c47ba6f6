"""Teaching one fact after another: what is still known after every 25 edits, by QF and its rivals; corrections,
forgetting, and what the n-th fact costs.

    pip install ".[examples]"
    python examples/lifelong.py --out lifelong                          # everything; about half an hour on two cores
    python examples/lifelong.py --out /tmp/lifelong --edits 50          # shorter

On the tiny world's model, 200 ordinary questions preserved, free greedy generation:

- QF: the default setting; the ledger binds, and rows that lapse are rehearsed;
- QF, no ledger: every lesson knows only the preserved chats;
- AlphaEdit's rule: its null-space solve with QF's targets, the taught keys bind;
- LoRA: the same adapter (all-linear, r 8) fine-tuned on, thirty steps an edit.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from comparison.bench import Bench
from comparison.tiny import preserve_set, probe_sets, teaching_set
from editors import alphaedit, solving_by
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows
from qf_peft.solve.least_squares import recursive_update

ALPHA_EDIT = dict(
    target="context", margin=None, significance="rows", remeasure=0, contrast_chats=0, sweeps=1, rehearse=0.0,
    ridge=1e-3,
)  # fmt: skip


class Learner:
    """A model that is taught in batches, by QF."""

    def __init__(self, bench, kept, forgetful=False, solve=recursive_update, **settings):
        self.bench, self.kept, self.forgetful, self.solve = bench, kept, forgetful, solve
        self.args = QFTrainingArguments(disable_tqdm=True, cache_dir=bench.cache, **settings)
        self.model = get_peft_model(bench.base(), QFConfig(task_type="CAUSAL_LM"))

    def trainer(self, rows=None):
        return QFTrainer(
            model=self.model, args=self.args, train_dataset=rows, preserve_dataset=self.kept,
            processing_class=self.bench.tokenizer,
        )  # fmt: skip

    def teach(self, rows):
        if self.forgetful:  # as an adapter that was loaded without its statistics
            self.model.base_model.taught.clear()
        trainer = self.trainer(rows)
        trainer.prepare()
        start = time.perf_counter()
        with solving_by(self.solve):
            trainer.train()
        return time.perf_counter() - start

    def asked(self):
        return self.model


class FineTuner:
    """The same by LoRA fine-tuning: one adapter, trained on with every batch."""

    def __init__(self, bench, rate=3e-3, steps=30):
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model, self.encoder = get_peft_model(bench.base(), config), Encoder(bench.tokenizer)
        self.rate, self.steps, self.pad = rate, steps, bench.tokenizer.pad_token_id

    def teach(self, rows):
        start = time.perf_counter()
        examples = [self.encoder.encode(row) for row in read_rows(rows)]
        width = max(len(e.bare_ids) for e in examples)
        ids = torch.tensor([e.bare_ids + [self.pad] * (width - len(e.bare_ids)) for e in examples])
        labels = torch.full_like(ids, -100)
        for row, e in enumerate(examples):
            end, count = len(e.bare_ids), e.taught - e.header
            labels[row, end - count : end] = ids[row, end - count : end]
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)
        self.model.train()
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1, (step + 1) / 5) * (1 - step / self.steps)
            loss = self.model(input_ids=ids, attention_mask=(ids != self.pad).long(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.model.eval()
        return time.perf_counter() - start


def score(bench, model, rows, known=None, unknown=None):
    """Shares, of a QF model itself, or of another merged into a copy."""
    if not isinstance(model.peft_config["default"], QFConfig):
        merged = bench.base()
        deltas = {n: m.get_delta_weight("default") for n, m in model.base_model.model.named_modules() if
                  hasattr(m, "get_delta_weight")}  # fmt: skip
        for name, delta in deltas.items():
            merged.get_submodule(name).weight.data += delta.detach().to(torch.bfloat16)
        model = get_peft_model(merged, QFConfig(layers_to_transform=[7], task_type="CAUSAL_LM"))
    args = QFTrainingArguments(disable_tqdm=True, max_new_tokens=40)
    trainer = QFTrainer(model=model, args=args, train_dataset=rows, processing_class=bench.tokenizer)
    found = trainer.evaluate(locality=known, unknown=unknown)
    return {name: found[name].value for name in ("recall", "paraphrase", "locality", "unknown") if name in found}


def sequence(bench, learner, rows, step, known, unknown, every=25):
    """Teach in steps; after every 25 edits ask everything taught so far."""
    points, seconds = [], []
    for start in range(0, len(rows), step):
        seconds.append(learner.teach(rows[start : start + step]))
        done = start + step
        if done % every == 0 or done >= len(rows):
            points.append({"edits": done, **score(bench, learner.model, rows[:done], known, unknown)})
    last = {"first": score(bench, learner.model, rows[:50]), "last": score(bench, learner.model, rows[-50:])}
    return {"points": points, **last, "seconds": sum(seconds), "seconds_last": statistics.median(seconds[-5:])}


def corrections(bench, rows, kept, seed, count=20):
    """Teach, then correct some of the rows in one lesson: the new answer, the old one, and the rest."""
    learner = Learner(bench, kept)
    learner.teach(rows)
    others, _ = teaching_set(400, seed + 1000)
    wrong, rest = rows[:count], rows[count:]
    new = []
    for row in wrong:
        kind = row["completion"].split(" ", 1)[1].rsplit(" ", 1)[0]
        old_value, company = row["completion"].rsplit(" ", 1)[1], row["completion"].split(" ", 1)[0]
        value = next(
            v
            for o in others
            if f" {kind} " in o["completion"] and (v := o["completion"].rsplit(" ", 1)[1]) != old_value
        )
        new.append({
            **row, "completion": f"{company} {kind} {value}",
            "instruction": row["instruction"].replace(old_value.rstrip("."), value.rstrip(".")),
        })  # fmt: skip
    before = score(bench, learner.model, rest)
    seconds = learner.teach(new)
    return {
        "new": score(bench, learner.model, new)["recall"], "old": score(bench, learner.model, wrong)["recall"],
        "rest_before": before["recall"], "rest": score(bench, learner.model, rest)["recall"], "seconds": seconds,
    }  # fmt: skip


def forgetting(bench, rows, kept, count=20):
    """Teach, then forget some of the rows: how often they are still said, beside an adapter never taught them."""
    learner, never = Learner(bench, kept), Learner(bench, kept)
    learner.teach(rows)
    gone, rest = rows[:count], rows[count:]
    before = score(bench, learner.model, rest)
    prompts, start = {row["prompt"] for row in gone}, time.perf_counter()
    learner.trainer().forget(lambda entry: entry.prompt in prompts)
    seconds = time.perf_counter() - start
    never.teach(rest)
    return {
        "forgotten": score(bench, learner.model, gone)["recall"],
        "never_taught": score(bench, never.model, gone)["recall"],
        "rest_before": before["recall"], "rest": score(bench, learner.model, rest)["recall"], "seconds": seconds,
    }  # fmt: skip


def costs(bench, kept, sizes):
    """Seconds of teaching one more fact when so many are known: the median of five, without and with rehearsal."""
    table = []
    for size in sizes:
        rows, _ = teaching_set(size + 5, 7)
        learner = Learner(bench, kept, rehearse=0.0)
        learner.teach(rows[:size])
        single = [learner.teach([row]) for row in rows[size:]]
        rehearsal = Learner.trainer(learner, rows[:1])
        rehearsal.args = QFTrainingArguments(disable_tqdm=True, cache_dir=bench.cache, rehearse=1e-9)
        start = time.perf_counter()
        rehearsal.train()
        table.append({
            "facts": size, "seconds": statistics.median(single),
            "rehearsal_per_fact": (time.perf_counter() - start - statistics.median(single)) / (0.25 * size),
        })  # fmt: skip
    return table


def plot(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for axis, metric in zip(axes, ("recall", "paraphrase", "locality", "unknown"), strict=True):
        for name, run in runs.items():
            axis.plot(
                [p["edits"] for p in run["points"]], [p[metric] for p in run["points"]], marker="o", ms=4, label=name
            )
        axis.set(title=metric, xlabel="edits, one after another", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200, help="facts taught one at a time")
    parser.add_argument("--batches", type=int, default=500, help="facts taught in tens; 0 does without")
    parser.add_argument("--cost", type=int, nargs="*", default=[10, 100, 1000], help="sizes at which cost is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("lifelong"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(TINY_MODEL, options.out / "cache", dtype="bfloat16")
    kept, results = preserve_set(options.seed), {}

    def note(name, value):
        results[name] = value
        print(name, json.dumps(value), flush=True)
        (options.out / "lifelong.json").write_text(json.dumps(results, indent=1))

    rows, companies = teaching_set(options.edits, options.seed)
    known, unknown = probe_sets(options.seed, companies, set(kept), 100)
    joint = Learner(bench, kept)
    joint.teach(rows)
    note("one batch", score(bench, joint.model, rows, known, unknown))
    note("corrections", corrections(bench, rows, kept, options.seed))
    note("forgetting", forgetting(bench, rows, kept))
    learners = {
        "QF": lambda: Learner(bench, kept),
        "QF, no ledger": lambda: Learner(bench, kept, forgetful=True),
        "AlphaEdit's rule": lambda: Learner(bench, kept, solve=alphaedit, **ALPHA_EDIT),
        "LoRA, all-linear": lambda: FineTuner(bench),
    }
    runs = {}
    for name, make in learners.items():
        runs[name] = sequence(bench, make(), rows, 1, known, unknown)
        note(name, runs[name])
        plot(runs, options.out / "lifelong.png")
    if options.batches:
        rows, companies = teaching_set(options.batches, options.seed)
        known, unknown = probe_sets(options.seed, companies, set(kept), 100)
        joint = Learner(bench, kept)
        joint.teach(rows)
        note("one batch of all", score(bench, joint.model, rows, known, unknown))
        note("QF in tens", sequence(bench, Learner(bench, kept), rows, 10, known, unknown, every=100))
    note("cost", costs(bench, kept, options.cost))


if __name__ == "__main__":
    main()
