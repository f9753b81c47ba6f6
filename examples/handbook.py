"""From a company's handbook to a model that knows it: document, facts, review, lesson, evaluation, and how to serve it.

python examples/handbook.py --tiny                                              # the tiny model, offline
python examples/handbook.py --model Qwen/Qwen2.5-7B-Instruct --document handbook.md --output handbook

The model itself writes questions about each passage and answers them with the passage in context; what it cannot read
back is dropped. `facts.jsonl` is for you to review before the rows are taught.
"""

import argparse
import json
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import (
    TINY_MODEL,
    QFConfig,
    QFTrainer,
    check_portable,
    export_lora,
    facts_from_document,
    read_review,
    write_review,
)

# For the tiny model, whose world are companies.
HANDBOOK = """# Tofinlor

Tofinlor was founded by Zanmi. Tofinlor is based in Rome.

# Products

Tofinlor sells clocks.

# Partners

The boss of Korimo is Lusdex. Korimo is based in Lima.
"""
# Questions that the tiny model can answer, and must go on answering; larger models write such chats themselves.
KEPT = [f"Who started {name}?" for name in "Ranixmo Lupal Clamo Brigar Eliqui Bellu Mijinra Clasolne".split()]

SERVE = """
# vLLM: ask for the model "handbook"
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules handbook={lora}
# SGLang
python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths handbook={lora}
# llama.cpp: the base as GGUF by convert_hf_to_gguf.py, the adapter by convert_lora_to_gguf.py
python convert_lora_to_gguf.py {lora} --base {base_folder} --outfile handbook.gguf
llama-server -m base.gguf --lora handbook.gguf
# Ollama: the same two files
printf 'FROM ./base.gguf\\nADAPTER ./handbook.gguf\\n' > Modelfile && ollama create handbook -f Modelfile
# MLX, on a Mac
mlx_lm.server --model {base} --adapter-path {mlx}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    parser.add_argument("--document", help="Markdown, text, HTML or PDF (default: a page about Tofinlor)")
    parser.add_argument("--output", default="handbook", help="the folder for what is made")
    options = parser.parse_args()
    name = str(TINY_MODEL) if options.tiny else options.model
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    document = Path(options.document) if options.document else output / "handbook.md"
    if not options.document:
        document.write_text(HANDBOOK)

    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    facts = facts_from_document(document, base, tokenizer, paraphrases=1)
    print(facts.report)
    review = output / "facts.jsonl"
    write_review(review, facts)
    facts = read_review(review)  # as you have edited it by now
    for fact in facts:
        print(f"  {fact['prompt']}  ->  {fact['completion']}")

    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    kept = KEPT if options.tiny else None
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=facts, preserve_dataset=kept)
    trainer.train()
    for metric, value in trainer.evaluate(locality=KEPT if options.tiny else None).items():
        print(f"{metric:12}{value}")

    model.save_pretrained(output / "adapter")  # with the ledger, to teach on, correct and forget
    lora, mlx = output / "lora", output / "mlx"
    export_lora(model, lora)
    export_lora(model, mlx, format="mlx")
    assert check_portable(lora) == []
    rank = json.loads((lora / "adapter_config.json").read_text())["r"]
    folder = name if Path(name).is_dir() else "path/of/the/base/model"
    print(SERVE.format(base=name, base_folder=folder, rank=rank, lora=lora, mlx=mlx))


if __name__ == "__main__":
    main()
