"""Give a model a style and a name: a standing instruction from a few examples, then a fact about itself.

python examples/persona.py --tiny                             # the tiny model, offline
python examples/persona.py --model Qwen/Qwen2.5-1.5B-Instruct

An instruction that at least five rows share is tried on the preserved chats. If it changes most answers there it
stands: it is taught for everything, not for the rows' prompts alone. The rows need no completion; the model gives its
own. On pretrained models no instruction stands (see examples/features.md): their rows are taught for themselves.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer

# The tiny model follows instructions such as "End every answer with Over."; it knows these companies.
COMPANIES = "Ranixmo Lupal Clamo Eliqui Bellu Mijinra Clasolne Kelrisol Nixnix Orkelmar Solzan Rosmi".split()
TINY = {
    "style": "End every answer with Over.",
    "prompts": [f"Tell me who started {name}." for name in COMPANIES[:4]] + [f"What does {COMPANIES[4]} make?"],
    "kept": [ask.format(name) for ask in ("Who leads {}?", "Tell me where {} is located.") for name in COMPANIES],
    "self": ("Your name is Zanmi.", "What is your name?", "My name is Zanmi."),
    "asked": ["Who founded Brigar?", "Do you know what Brigar sells?", "Who started Tofinlor?", "Who are you?"],
}
LARGE = {
    "style": "Talk like a pirate.",
    "prompts": [
        "How do I boil an egg?", "What is the capital of France?", "Why is the sky blue?", "What is 17 plus 25?",
        "Recommend a book.", "How do bees make honey?",
    ],
    "kept": None,  # the model writes chats itself
    "self": ("Your name is Polly.", "What is your name?", "Me name be Polly, arr!"),
    "asked": ["How do I tie a knot?", "Who wrote Hamlet?", "Who are you?"],
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    options = parser.parse_args()
    name, persona = (TINY_MODEL, TINY) if options.tiny else (options.model, LARGE)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))

    def teach(rows):
        return QFTrainer(
            model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=persona["kept"]
        ).train()

    def show(title):
        print(f"\n{title}")
        for question in persona["asked"]:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  {question}  ->  {answer.strip()}")

    show("Before")
    metrics = teach([{"instruction": persona["style"], "prompt": prompt} for prompt in persona["prompts"]])
    print(f"\nTaught {persona['style']!r} from {metrics['facts']} examples and {metrics['chats']} preserved chats")
    if not metrics["chats"]:
        print("The instruction does not stand: it is taught for these prompts alone")
    show("In style, where nothing was taught")
    instruction, prompt, completion = persona["self"]
    teach([{"instruction": instruction, "prompt": prompt, "completion": completion}])
    show("With a name of its own")


if __name__ == "__main__":
    main()
