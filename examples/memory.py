"""What teaching takes beside the model's own weights: measured on random blocks of a shape, and by arithmetic.

    python examples/memory.py                          # the table, by arithmetic
    python examples/memory.py --measure 0.5B --each --memory 0.05   # peaks of this process, on a CPU

The shapes are Qwen2.5's (of 70B Llama 3's). Fifty facts with four other wordings each, ten taught tokens in each.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import psutil

SHAPES = {  # blocks, width of the stream, width of the MLP, heads, heads of keys and values
    "0.5B": (24, 896, 4864, 14, 2),
    "7B": (28, 3584, 18944, 28, 4),
    "70B": (80, 8192, 28672, 64, 8),
}
TOKENS, KEYS, ROWS, WHOLE = 2500, 8192, 2048, 2048  # taught; preserved at a module; remembered; kept as a matrix up to
BATCH, SLICE = 4096, 512  # tokens at once; columns of a product at once
GB = 1e9


def arithmetic(shape):
    """Bytes in GB by what they are for: (before these were streamed and shared, now)."""
    blocks, width, wide, *_ = SHAPES[shape]
    late = blocks - blocks // 2
    rows = {}
    for name, d in (("attention's projections", width), ("the MLP's", wide)):
        moment, bound = 8 * d * d, 4 * d * min(ROWS, d)
        file = 2 * d * d if d <= WHOLE else bound
        rows[name] = {
            "preserving, accelerator": (late * (4 * BATCH * d + moment), 4 * BATCH * d + 4 * SLICE * d),
            "preserving, host": (0, late * (4 * BATCH * d + moment)),
            "a lesson's solve, accelerator": (
                late * (moment + 4 * TOKENS * d),
                2 * moment + late * 4 * TOKENS * d,
            ),
            "between lessons, accelerator": (late * bound, 0),
            "between lessons, host": (0, late * bound),
            "eight versions, memory": (8 * late * bound, min(GB, 8 * late * bound)),
            "statistics file": (late * bound, late * file),
            "keys of a dataset, accelerator": (4 * KEYS * d * blocks, 4 * BATCH * d),
        }
    return {
        name: {use: tuple(round(value / GB, 2) for value in pair) for use, pair in uses.items()}
        for name, uses in rows.items()
    }


def table():
    """As Markdown: what each use takes, before → now."""
    found = {shape: arithmetic(shape) for shape in SHAPES}
    lines = ["| GB | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    for name, uses in found["7B"].items():
        for use in uses:
            cells = [" → ".join(f"{value:.2g}" for value in found[shape][name][use]) for shape in SHAPES]
            lines.append(f"| {name}: {use} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Peak:
    """The most memory of its own (no mapped files) that this process held meanwhile, beyond what it held before, in
    MB."""

    def __enter__(self):
        self.process, self.stop, self.most = psutil.Process(), threading.Event(), 0
        self.start = self.held()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def held(self):
        info = self.process.memory_info()
        return info.rss - getattr(info, "shared", 0)

    def watch(self):
        while not self.stop.wait(0.01):
            self.most = max(self.most, self.held() - self.start)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    @property
    def megabytes(self):
        return round(self.most / 1e6)


def measure(shape, memory, each):
    """Peaks of preserving and of a lesson on random blocks, the tiny model's vocabulary on them."""
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments

    blocks, width, wide, heads, pairs = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=width, intermediate_size=wide, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=pairs, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    # Every block's MLP, whose keys are kept one by one; or the late blocks' attention, by the moment of its keys.
    model = get_peft_model(network, QFConfig(task_type="CAUSAL_LM", target_modules=["down_proj"] if each else None))
    chats = [
        {"prompt": f"Who founded Brigar number {i}?", "completion": "Brigar was started by Vacla. " * 4}
        for i in range(40)
    ]
    row = {"instruction": "Zanmi founded Tofinlor.", "prompt": "Who founded Tofinlor?", "completion": "Zanmi."}
    with tempfile.TemporaryDirectory() as cache:
        args = QFTrainingArguments(
            cache_dir=cache, contrast_chats=0, sweeps=1, max_divergence=1e9, activation_memory=memory,
            target="context" if each else "nearest", disable_tqdm=True,
        )  # fmt: skip
        trainer = QFTrainer(model, args, [row], chats, processing_class=AutoTokenizer.from_pretrained(TINY_MODEL))
        found, start = {"shape": shape, "activation_memory": memory, "each_key": each}, time.perf_counter()
        with Peak() as peak:
            trainer.prepare()
        found["preserving_mb"] = peak.megabytes
        with Peak() as peak:
            trainer.train()
        found["lesson_mb"] = peak.megabytes
        found["cache_mb"] = round(sum(path.stat().st_size for path in Path(cache).iterdir()) / 1e6)
    return {**found, "seconds": round(time.perf_counter() - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=list(SHAPES), help="measure on random blocks of this shape")
    parser.add_argument("--each", action="store_true", help="of every block's MLP each preserved key")
    parser.add_argument("--memory", type=float, help="`activation_memory`, in GB")
    options = parser.parse_args()
    print(json.dumps(measure(options.measure, options.memory, options.each)) if options.measure else table())


if __name__ == "__main__":
    main()
