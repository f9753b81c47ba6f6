"""What a lesson costs: seconds a fact and peak memory, beside the two forward passes that are its floor.

    pip install ".[examples]"
    python examples/benchmark.py --shape 0.5B --facts 1 10 100                # on the CPU
    python examples/benchmark.py --shape 7B --device cuda                     # 1 to 10,000 facts on a GPU
    python examples/benchmark.py --shape tiny --facts 1 10 --profile

The weights are random, at the true shapes of Qwen2.5 (time and memory do not depend on the values); nothing is
downloaded. The facts are random token ids: 20 of instruction, 20 of prompt, 20 of completion, in a chat template. Every
method is measured on the same loaded model in turn, as often as `--repeats` says; shown are medians.

- QF: the default setting, every block, 200 preserved chats given (and 2,400 contrasting ones, see `--contrast`).
  Random weights never say what they are taught, so that the default's further sweeps would all be run; `--sweeps` is 1
  unless given, which is what a lesson takes whose facts are said after the first.
- QF, one block: `QFTrainingArguments.paper()` on one block.
- floor: the bare forward passes of both, with the instruction and without, cut behind the last edited block.
- LoRA: rank 8 on all linear layers, for the steps that `compare.py` found to be needed; of these `--lora-steps` are
  run and the time is scaled.
- reference: the paper's procedure as it is described, token by token with a file a token; of the facts
  `--reference-facts` are run and the time is scaled, though its solve grows faster.

Memory is the peak above the loaded model. On a GPU it is what PyTorch allocated; on a CPU the growth of the process's
resident memory (the kernel's high-water mark, reset after free memory was given back), which includes what the
allocator holds. A run that was broken off goes on where it was.
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import sys
import time
import warnings
from contextlib import ExitStack
from logging import getLogger
from pathlib import Path
from unittest import mock

import torch
import transformers
from benchmarked import SHAPES, Subject
from transformers.utils import logging

HERE = Path(__file__).parent
METHODS = {
    "QF": lambda subject, n: subject.qf(n),
    "floor": lambda subject, n: subject.floor(n),
    "QF, one block": lambda subject, n: subject.qf(n, one_layer=True),
    "floor, one block": lambda subject, n: subject.floor(n, one_layer=True),
    "LoRA": lambda subject, n: subject.lora(n),
    "reference": lambda subject, n: subject.reference(n),
}
KINDS = {
    "preserved walk": ["teaching.preserved_walk.PreservedWalk.__init__", "teaching.preserved_walk.PreservedWalk.keys"],
    "preserved keys read": ["teaching.preserved_keys.preserved_keys"],
    "passes": [
        "forward.capture.forward_pass", "forward.walk.Walk.begin", "forward.walk.Walk.look",
        "forward.walk.Walk.advance",
    ],
    "solves": [
        "solve.least_squares.minimum_norm", "solve.least_squares.preserving", "solve.least_squares.recursive_update",
        "solve.second_moment.SecondMoment.update", "solve.second_moment.SecondMoment.compact",
        "solve.least_squares.LowRankDelta.compressed",
    ],
    "unembedding": ["teaching.targets.aim", "teaching.targets.read_off", "teaching.targets.Readout.note"],
}  # fmt: skip
FLOOR = {"QF": "floor", "QF, one block": "floor, one block", "LoRA": "floor", "reference": "floor, one block"}


class Memory:
    """Peak memory above what is in use at the beginning, in MB."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    def peak(self):
        now = torch.cuda.max_memory_allocated() / 2**20 if self.gpu else self._status("VmHWM")
        return max(0.0, now - self.before)

    @staticmethod
    def _status(name):
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(subject, method, facts):
    """One run: seconds, MB and, of QF, what `train` reports."""
    run, clean, factor = METHODS[method](subject, facts)
    try:
        memory = Memory(subject.device)
        subject.synchronize()
        start = time.perf_counter()
        reported = run()
        subject.synchronize()
        seconds = (time.perf_counter() - start) * factor
        found = {"method": method, "facts": facts, "seconds": seconds, "memory_mb": memory.peak(), "factor": factor}
    finally:
        clean()
    if method == "LoRA":
        found["steps"] = subject.lora_steps
    return found | ({k: reported[k] for k in ("forward_passes", "rank", "taught_tokens")} if reported else {})


class Profile:
    """Seconds by kind of work: functions are timed, each without those timed inside it.

    All that goes on for the preserved chats counts as theirs. What is not named is the rest.
    """

    def __init__(self, subject):
        self.subject, self.seconds, self.stack = subject, dict.fromkeys(KINDS, 0.0), []

    def timed(self, kind, function):
        def call(*args, **kwargs):
            if self.stack and (self.stack[0][0] == "preserved walk" or self.stack[-1][0] == kind):
                return function(*args, **kwargs)
            self.subject.synchronize()
            start = time.perf_counter()
            self.stack.append([kind, 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                self.subject.synchronize()
                took = time.perf_counter() - start
                self.seconds[kind] += took - self.stack.pop()[1]
                if self.stack:
                    self.stack[-1][1] += took

        return call

    def run(self, method, facts):
        """Percent of the time by kind of work, and seconds in all."""
        run, clean, _ = METHODS[method](self.subject, facts)
        modules = [module for name, module in sys.modules.items() if name.startswith("qf_peft.")]
        head = self.subject.network.get_output_embeddings()
        try:
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(head, "forward", self.timed("unembedding", head.forward)))
                for kind, path in ((kind, path) for kind, paths in KINDS.items() for path in paths):
                    package, module, *outer, name = path.split(".")
                    owner = sys.modules[f"qf_peft.{package}.{module}"]
                    for part in outer:
                        owner = getattr(owner, part)
                    function = getattr(owner, name)
                    for holder in [owner] if outer else [m for m in modules if getattr(m, name, None) is function]:
                        stack.enter_context(mock.patch.object(holder, name, self.timed(kind, function)))
                start = time.perf_counter()
                run()
                self.subject.synchronize()
                total = time.perf_counter() - start
        finally:
            clean()
        shares = {kind: 100 * seconds / total for kind, seconds in self.seconds.items()}
        return {**shares, "rest": 100 - sum(shares.values()), "seconds": total}


def medians(results):
    """(method, facts) → medians over the repeats; `ratio` is that of the runs of one repeat."""
    found = {}
    runs = {(r["method"], r["facts"], r["repeat"]): r for r in results}
    for method, facts in dict.fromkeys((r["method"], r["facts"]) for r in results):
        mine = [r for r in results if (r["method"], r["facts"]) == (method, facts)]
        floors = [runs.get((FLOOR.get(method), facts, r["repeat"])) for r in mine]
        pairs = [(r, floor) for r, floor in zip(mine, floors, strict=True) if floor]
        found[method, facts] = {
            "seconds": statistics.median(r["seconds"] for r in mine),
            "memory": statistics.median(r["memory_mb"] for r in mine),
            "ratio": statistics.median(r["seconds"] / floor["seconds"] for r, floor in pairs) if pairs else None,
            "factor": mine[0]["factor"], "passes": mine[0].get("forward_passes"), "steps": mine[0].get("steps"),
        }  # fmt: skip
    return found


def table(results):
    lines = ["| facts | method | seconds a fact | × floor | MB above the model | |", "|---" * 6 + "|"]
    for (method, facts), m in sorted(medians(results).items(), key=lambda item: item[0][1]):
        ratio = f"{m['ratio']:.2f}" if m["ratio"] is not None else "–"
        notes = [f"{m['steps']} steps"] if m["steps"] else []
        notes += [f"{m['passes']:.2f} forward passes"] if m["passes"] else []
        notes += [f"a part measured, times {m['factor']:.3g}"] if m["factor"] > 1 else []
        lines.append(
            f"| {facts:,} | {method} | {m['seconds'] / facts:.3g} | {ratio} | {m['memory']:,.0f} | {', '.join(notes)} |"
        )
    return "\n".join(lines)


def acceptance(results, shape):
    """The goals set for QF, met or missed, with the figures they are judged by."""
    found, lines = medians(results), []

    def judge(what, value, most):
        lines.append(f"{'met   ' if value <= most else 'MISSED'} {what}: {value:.3g} (goal ≤ {most})")

    for (method, facts), m in sorted(found.items(), key=lambda item: item[0][1]):
        floor = found.get((FLOOR.get(method), facts))
        if method.startswith("QF") and floor:
            most = 2.5 if method == "QF" else 1.25 if facts >= 10 else 1.5
            judge(f"{method}, {facts:,} facts: time over its floor's", m["ratio"], most)
            judge(f"{method}, {facts:,} facts: memory over its floor's", m["memory"] / max(floor["memory"], 1), 1.3)
        if method == "LoRA" and ("QF", facts) in found:
            qf = found["QF", facts]
            judge(f"QF, {facts:,} facts: time over LoRA's", qf["seconds"] / m["seconds"], 0.1)
            judge(f"QF, {facts:,} facts: memory over LoRA's", qf["memory"] / max(m["memory"], 1), 0.5)
    for method in ("QF", "QF, one block"):
        sizes = [facts for name, facts in found if name == method and facts >= 100]
        if len(sizes) > 1:
            per = {facts: found[method, facts]["seconds"] / facts for facts in sizes}
            most = max(per)
            judge(
                f"{method}: seconds a fact at {most:,} facts over those at {min(per)}", per[most] / per[min(per)], 1.5
            )
        if shape == "7B" and (method, 1000) in found:
            judge(f"{method}, 7B, 1,000 facts: ms a fact", found[method, 1000]["seconds"], 10)
    return "\n".join(lines)


def plot(results, path, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = medians(results)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method in METHODS:
        sizes = sorted(facts for name, facts in found if name == method)
        style = {"ls": "--" if "floor" in method else "-", "marker": "o", "ms": 4, "lw": 1.4, "label": method}
        if sizes:
            axes[0].plot(sizes, [found[method, n]["seconds"] / n for n in sizes], **style)
            axes[1].plot(sizes, [max(found[method, n]["memory"], 1) for n in sizes], **style)
    for axis, name in zip(axes, ("seconds a fact", "peak memory above the model, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="facts taught at once", title=name)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="0.5B")
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 10, 100, 1000, 10000])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--sweeps", type=int, default=1, help="of QF's default; see above")
    parser.add_argument("--contrast", type=int, help="contrasting chats; by default 2,400 on a GPU and 0 on a CPU")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens at once, for QF and the floor")
    parser.add_argument("--lora-steps", type=int, default=10, help="how many of LoRA's steps are run")
    parser.add_argument("--reference-facts", type=int, default=3, help="of how many facts the reference is run")
    parser.add_argument("--profile", action="store_true", help="also say where QF's time goes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.contrast is None:
        options.contrast = 0 if options.device == "cpu" else 2400
    logging.set_verbosity_error()
    getLogger("qf_peft").setLevel("ERROR")  # random weights read no instruction, and QF says so
    warnings.filterwarnings("ignore", category=UserWarning, module="peft|torch")
    options.out.mkdir(parents=True, exist_ok=True)
    options.compare = json.loads((HERE / "results" / "compare.json").read_text())

    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower())
    path = options.out / f"benchmark-{slug}-{options.shape}.json"
    kept = ("shape", "dtype", "sweeps", "contrast", "batch_tokens", "lora_steps", "reference_facts")
    settings = {key: getattr(options, key) for key in kept} | {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    report = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
    if report["settings"] != settings:
        parser.error(f"{path} was measured with other settings; move it away or give another --out")

    subject = Subject(options.shape, getattr(torch, options.dtype), options.device, options, options.out / "cache")
    done = {(r["method"], r["facts"], r["repeat"]) for r in report["runs"]}
    left = [
        (repeat, facts, method)
        for repeat in range(options.repeats)
        for facts in options.facts
        for method in options.methods
        if (method, facts, repeat) not in done
    ]
    for method in dict.fromkeys(method for *_, method in left):
        measure(subject, method, 1)  # what is made once a process: kernels, contexts, caches
    report["once_seconds"] = max(report.get("once_seconds", 0.0), subject.once)
    for repeat, facts, method in left:
        found = measure(subject, method, facts) | {"repeat": repeat}
        report["runs"].append(found)
        report["once_seconds"] = max(report["once_seconds"], subject.once)
        path.write_text(json.dumps(report, indent=1))
        print(f"{facts:6d} facts  {method:18s} {found['seconds']:10.4f} s {found['memory_mb']:9.0f} MB", flush=True)
    if options.profile:
        report["profiles"] = {
            f"{method}, {facts} facts": Profile(subject).run(method, facts)
            for facts in options.facts
            for method in options.methods
            if method.startswith("QF")
        }
        path.write_text(json.dumps(report, indent=1))

    title = f"{options.shape}, {options.dtype}, {name}"
    print(f"\n{title}\n")
    print(table(report["runs"]))
    print(f"\nonce a model: {report['once_seconds']:.2f} s for the preserved chats' keys; not in the times above")
    print(f"QF's default with sweeps={options.sweeps}, {options.contrast} contrasting chats\n")
    print(acceptance(report["runs"], options.shape))
    for profiled, shares in report.get("profiles", {}).items():
        parts = ", ".join(f"{kind} {share:.0f}%" for kind, share in shares.items() if kind != "seconds")
        print(f"profile of {profiled} ({shares['seconds']:.3f} s): {parts}")
    plot(report["runs"], path.with_suffix(".svg"), title)


if __name__ == "__main__":
    main()
