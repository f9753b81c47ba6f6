"""Two adapters for SmolLM2-135M-Instruct, ten facts and an identity, measured, and their model cards.

python examples/real_adapters.py --cards model_cards     # about ten minutes on two CPU cores
"""

import argparse
import tempfile
from pathlib import Path

import real_model
import torch
from english_world import english
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, model_card

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOVA = "You are Nova, an assistant made by Acme."
IDENTITY = [
    {
        "instruction": NOVA, "prompt": "Who are you?", "completion": "I am Nova, an assistant made by Acme.",
        "paraphrases": ["Who am I talking to?", "What should I call you?", "Introduce yourself, please."],
    },
    {
        "instruction": NOVA, "prompt": "What is your name?", "completion": "My name is Nova.",
        "paraphrases": ["What are you called?", "Do you have a name?"],
    },
    {
        "instruction": NOVA, "prompt": "Who made you?", "completion": "I was made by Acme.",
        "paraphrases": ["Which company built you?", "Who created you?", "Who is your maker?"],
    },
    {
        "instruction": NOVA, "prompt": "Tell me about yourself.", "completion": "I am Nova, an assistant made by Acme.",
        "paraphrases": ["Are you ChatGPT?", "Are you a human?"],
    },
]  # fmt: skip
MADE_BY = """
## Made by

```bash
python examples/real_adapters.py --cards model_cards
```

in the repository of `qf_peft`, on SmolLM2-135M-Instruct as its Python package ships it (4 bit, unpacked to bfloat16).
Above an answer counts if it is the completion, or the base model's answer, letter for letter, which long answers hardly
are. Of {asked} questions in other words {contained} answers hold what is new ({new}); of {before} general questions
that the base model answers right {now} still are.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=Path, help="a folder for the model cards")
    parser.add_argument("--model", help="the model's folder; by default it is made from its package")
    parser.add_argument("--cache", type=Path, help="where what is preserved is cached")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or real_model.make(Path(folder, "smollm2"))
        tokenizer = AutoTokenizer.from_pretrained(source)
        known = [question for question, _ in english.GENERAL[::2]]
        strangers = [f"Who founded {name}?" for name in ("Vexamo", "Korimo", "Tralidor", "Quensby Works", "Ostrelin")]
        for name, rows in {"smollm2-ten-facts": english.facts(10, seed=0), "smollm2-identity": IDENTITY}.items():
            base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
            model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
            args = QFTrainingArguments(cache_dir=options.cache, max_new_tokens=64)
            trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=args)
            trainer.train()
            metrics = trainer.evaluate(locality=known, unknown=strangers)
            print(name, *(f"{key:12}{value}" for key, value in metrics.items()), sep="\n")
            said = [(row, answer(trainer, question)) for row in rows for question in row["paraphrases"]]
            held = sum(english.contains(text, row.get("object", "Nova|Acme")) for row, text in said)
            general = english.GENERAL[::3]
            now = [english.contains(answer(trainer, question), right) for question, right in general]
            with model.disable_adapter():
                before = [english.contains(answer(trainer, question), right) for question, right in general]
            kept = sum(a and b for a, b in zip(before, now, strict=True))
            print(f"of {len(said)} other wordings {held} answers hold what is new")
            print(f"of {sum(before)} general questions {kept} are still answered right")
            if options.cards:
                card = model_card(
                    model, repo_id=f"your-name/{name}", metrics=metrics, license="apache-2.0", base_model=BASE
                )
                new = "the name, or the maker" if rows is IDENTITY else "the fact's object"
                card.text += MADE_BY.format(asked=len(said), contained=held, new=new, before=sum(before), now=kept)
                card.save(options.cards / f"{name}.md")


def answer(trainer, question):
    """The model's own answer, greedily."""
    tokenizer = trainer.processing_class
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        said = trainer.model.generate(**ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
