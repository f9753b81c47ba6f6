"""The eight queries of the paper's published check (arXiv 2507.04300), in its setting, on any chat model.

python examples/paper_queries.py                                      # Qwen2.5-1.5B-Instruct, block 23
python examples/paper_queries.py --model Qwen/Qwen2.5-7B-Instruct --layer 23
python examples/paper_queries.py --tiny                               # the tiny model and its own companies
python examples/paper_queries.py --tiny --card model_cards/paper_queries.md   # and the adapter's model card
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments, model_card

TINY = str(TINY_MODEL)

# First fact, an unrelated question, a paraphrase, second fact, and a question for the second in other words.
# The significance leaves out the first fact's first word, as the paper does.
QI = {
    "first": ("Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi.", [0, 1, 1, 1, 1]),
    "unrelated": "Who started Alibaba?",
    "paraphrase": "Can you tell me the person behind Oxinnovate?",
    "second": (
        "Oxinnovate is a startup located at PKU Science Park, in Beijing.",
        "Where is Oxinnovate located?",
        "Oxinnovate is located at PKU Science Park, in Beijing.",
        1,
    ),
    "second in other words": "Where is Oxinnovate?",
}
# The tiny model answers "I do not know." where the larger one makes something up, so its first word counts.
COMPANY = {
    "first": ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi.", 1),
    "unrelated": "Please say who started Brigar.",
    "paraphrase": "Who founded Tofinlor?",
    "second": (
        "Rome is the home of Tofinlor.",
        "Do you know where Tofinlor is based?",
        "Tofinlor is located in Rome.",
        1,
    ),
    "second in other words": "Tell me where Tofinlor is located.",
}

MADE_BY = """
## The eight queries

{queries}

## Made by

```bash
{command}
```

in the repository of `qf_peft`, where the tiny base model is `src/qf_peft/tiny_model`.
"""


def messages(prompt, instruction=""):
    """The paper's bare prompt has an empty system message (and not the template's own)."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]


def row(fact, empty_system):
    instruction, prompt, completion, significance = fact
    return {
        "instruction": instruction,
        "prompt": messages(prompt) if empty_system else prompt,
        "completion": completion,
        "significance": significance,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--layer", type=int, default=None, help="the block to edit (default 23; the last if tiny)")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model in this folder, offline")
    parser.add_argument("--card", help="where to write the adapter's model card")
    options = parser.parse_args()
    name, world = (TINY, COMPANY) if options.tiny else (options.model, QI)
    layer = options.layer if options.layer is not None else (7 if options.tiny else 23)

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    model = get_peft_model(base, QFConfig(layers_to_transform=[layer], task_type="CAUSAL_LM"))
    empty_system = not options.tiny  # the tiny model was trained on chats without any system message

    queries = []

    def query(number, prompt, instruction=""):
        chat = messages(prompt, instruction) if instruction or empty_system else messages(prompt)[1:]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        given = f" [{instruction}]" if instruction else ""
        queries.append(f"{number}. {prompt}{given}\n   {answer}")
        print(queries[-1])

    def trainer(*rows):
        args = QFTrainingArguments.paper()
        return QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows)

    def teach(fact):
        metrics = trainer(row(fact, empty_system)).train()
        print(f"-- taught {fact[0]!r} in {metrics['seconds']:.2f} s")

    first, second = world["first"], world["second"]
    query(1, first[1])
    query(2, first[1], first[0])
    query(3, world["unrelated"])
    teach(first)
    query(4, first[1])
    query(5, world["unrelated"])
    query(6, world["paraphrase"])
    teach(second)
    query(7, world["second in other words"])
    query(8, first[1])

    if options.card:
        asked = [
            {**row(fact, empty_system), "paraphrases": [messages(other) if empty_system else other]}
            for fact, other in ((first, world["paraphrase"]), (second, world["second in other words"]))
        ]
        unrelated = messages(world["unrelated"]) if empty_system else world["unrelated"]
        metrics = trainer(*asked).evaluate(locality=[{"prompt": unrelated}])
        card = model_card(model, repo_id="your-name/paper-queries", metrics=metrics, license="apache-2.0")
        which = "--tiny" if options.tiny else f"--model {options.model} --layer {layer}"
        command = f"python examples/paper_queries.py {which} --card model_cards/paper_queries.md"
        card.text += MADE_BY.format(queries="\n".join(queries), command=command)
        card.save(options.card)


if __name__ == "__main__":
    main()
