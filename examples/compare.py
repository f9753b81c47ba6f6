"""QF beside its rivals, for any chat model and any facts: one command, one table, one line that says which to take.

    pip install ".[examples]"
    python examples/compare.py FACTS.csv --model FOLDER_OR_ID             # your facts on your model
    python examples/compare.py --data english --model FOLDER --facts 1 10 50 200 --seeds 0 1 2
    python examples/compare.py --data zsre.jsonl --model FOLDER --facts 100 --steps 0 1 10 --orders --deletion
    python examples/compare.py --data tiny --facts 1 10                   # the tiny model that comes with the package

Data: `english` (invented facts in plain English), `tiny` (the tiny model's world), or a file: facts in CSV, JSON Lines,
JSON or Parquet with the columns instruction, prompt, completion, and perhaps paraphrases (asked, not taught) and answer
(what a right answer contains), in CSV divided by |; or records in zsRE's, CounterFact's, WikiBigEdit's, QAEdit's,
MQuAKE's and KnowEdit's published formats.

Every method is taught the same facts and asked each question alone, in the chat template, greedily to its own stop, as
in WILD (arXiv 2502.11177):

- reliability: the taught questions; generalisation: other wordings; portability, multi-hop: what follows from them.
  Exact: the whole answer is right after SQuAD's normalisation; contained: it holds the right answer. An answer that
  does not end, or repeats itself, is wrong. Exact depends on what was taught: records teach the bare answer.
- locality: the answer is the one before; known: general questions that could be answered still are; refusals kept: of
  questions about nobody; leaks: questions about something else that are now answered with a taught answer.
- seconds and memory: the lesson; what is made once a model is `once` in the JSON.

Every method with settings is tuned on other facts (other relations, a quarter of the records, or for your own facts the
English world's); what was tried and chosen stands in the JSON. A run that was broken off goes on where it was.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

from comparison.bench import Bench
from comparison.files import open_file
from comparison.methods import METHODS
from comparison.reporting import plot, report, verdict
from comparison.running import Comparison, Plan
from comparison.store import Store
from comparison.tasks import Data
from comparison.tiny import TinyWorld
from comparison.worlds import EnglishWorld, texts
from transformers.utils import logging

from qf_peft import TINY_MODEL

_SIZES = [1, 10, 100, 1000]
_LIBRARIES = ("qf-peft", "peft", "transformers", "torch")


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("file", nargs="?", help="a file of facts or records; the same as --data FILE")
    given.add_argument("--data", default="english", help="'english', 'tiny' or a file")
    given.add_argument("--model", help="a chat model, folder or id; with --data tiny the tiny model")
    given.add_argument("--facts", type=int, nargs="+", help="how many are taught; by default 1 10 100 1000, as far as "
                       "there are so many, and of your own facts all")  # fmt: skip
    given.add_argument("--seeds", type=int, nargs="+", default=[0])
    given.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                       help=", ".join(METHODS) + "; by default all")  # fmt: skip
    given.add_argument("--steps", type=int, nargs="+", default=[0],
                       help="facts a lesson: 0 all at once, 1 one after another, 10 in tens")  # fmt: skip
    given.add_argument("--orders", action="store_true", help="also teach the same facts in three orders")
    given.add_argument("--deletion", action="store_true", help="also take a fact back, and compare with never taught")
    given.add_argument("--limit", type=int, help="questions of each kind at most; by default all")
    given.add_argument("--tokens", type=int, default=512, help="of an answer at most")
    given.add_argument("--tune-up-to", type=int, default=100, help="larger lessons take what was best at so many facts")
    given.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    given.add_argument("--device", help="by default a GPU where there is one")
    given.add_argument("--batch-tokens", type=int, default=4096, help="tokens that go through the model at once")
    given.add_argument("--text", type=Path, help="text for perplexity; by default some English paragraphs")
    given.add_argument("--harness", nargs="+", default=[], metavar="TASK", help="tasks of the LM Evaluation Harness, "
                       'such as mmlu gsm8k (pip install ".[harness]")')  # fmt: skip
    given.add_argument("--harness-limit", type=int, help="questions of each such task at most")
    given.add_argument("--harness-folder", type=Path, help="a folder with tasks of your own")
    given.add_argument("--out", type=Path, default=Path("compare"), help="where JSON, table, plot and answers go")
    given.add_argument("--cache", type=Path, help="where QF keeps what it makes once a model; by default in --out")
    return given


def load(source: str) -> Data:
    return (
        {"english": EnglishWorld, "tiny": TinyWorld}[source]() if source in ("english", "tiny") else open_file(source)
    )


def sizes(options: argparse.Namespace, data: Data) -> list[int]:
    """How many facts are taught: those asked for, or the usual numbers as far as there are so many."""
    if options.facts is None:
        own = data.most is not None and data.held is None  # a file of facts: all of them
        return [data.most] if own else [n for n in _SIZES if data.most is None or n <= data.most] or [data.most]
    for number in options.facts:
        if number < 1 or (data.most is not None and number > data.most):
            most = "any number" if data.most is None else data.most
            raise ValueError(f"--facts {number}: {data.name} has {most} of facts to teach, from 1 on")
    return options.facts


def prepared(options: argparse.Namespace) -> tuple[Comparison, Store]:
    """The comparison that the options ask for, and what there is of it.

    Raises:
        ValueError, FileNotFoundError: the options, the file or what lies in --out are wrong.
    """
    data = load(options.file or options.data)
    if options.model is None and options.data != "tiny":
        raise ValueError("--model is missing: give a chat model's folder or id (or --data tiny)")
    most = [number for number in (options.limit, options.harness_limit) if number is not None]
    if min(options.steps) < 0 or min(options.tokens, options.tune_up_to, options.batch_tokens, *most) < 1:
        raise ValueError("--steps must be 0 or more; limits and numbers of tokens and facts 1 or more")
    own_texts = [options.text.read_text(encoding="utf-8")] if options.text is not None else texts()
    plan = Plan(
        facts=sizes(options, data), seeds=options.seeds, methods=options.methods, steps=options.steps,
        orders=options.orders, deletion=options.deletion, limit=options.limit, tune_up_to=options.tune_up_to,
        texts=own_texts, harness=options.harness, harness_limit=options.harness_limit,
        harness_folder=options.harness_folder,
    )  # fmt: skip
    bench = Bench(
        options.model or TINY_MODEL, options.cache or options.out / "cache", dtype=options.dtype,
        device=options.device, tokens=options.tokens, batch_tokens=options.batch_tokens,
    )  # fmt: skip
    header = {
        "model": bench.name, "data": data.name, "dtype": options.dtype, "device": bench.device.type,
        "tokens": options.tokens, "limit": options.limit, "versions": {name: version(name) for name in _LIBRARIES},
    }  # fmt: skip
    store = Store(options.out, header)
    return Comparison(bench, data, plan, store), store


def main(arguments: list[str] | None = None) -> None:
    given = parser()
    options = given.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        comparison, store = prepared(options)
    except (ValueError, FileNotFoundError) as error:
        given.error(str(error))
    comparison.run()
    text = report(store.found)
    (options.out / "compare.md").write_text(text, encoding="utf-8")
    plot(store.runs, options.out / "compare.png")
    print(text)
    print(verdict(store.runs, store.found["header"]["model"], store.found["header"]["data"]))


if __name__ == "__main__":
    main()
