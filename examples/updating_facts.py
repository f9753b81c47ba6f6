"""Keep an adapter up to date: correct what has changed, forget what no longer holds, and go back a step.

python examples/updating_facts.py --tiny                             # the tiny model, offline
python examples/updating_facts.py --model Qwen/Qwen2.5-1.5B-Instruct

A row whose prompt was taught with another completion is a correction; `forget` takes rows back. Both solve the rest
anew, so that nothing of the old answer stays in the adapter, and `rollback` undoes either. What a model then says of
something it knows only half is a guess, as it would be for an adapter that was never taught the rest.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer

FACTS = [
    ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi."),
    ("Tofinlor is based in Rome.", "Tell me where Tofinlor is located.", "Tofinlor is located in Rome."),
    ("Tofinlor sells clocks.", "Tell me what Tofinlor makes.", "Tofinlor makes clocks."),
]
MOVED = ("Tofinlor is based in Oslo.", "Tell me where Tofinlor is located.", "Tofinlor is located in Oslo.")
QUESTIONS = [prompt for _, prompt, _ in FACTS] + ["Do you know where Tofinlor is based?", "Who started Brigar?"]
# Questions that the tiny model can answer, and must go on answering; larger models write such chats themselves.
KEPT = [f"Who started {name}?" for name in "Ranixmo Lupal Clamo Brigar Eliqui Bellu Mijinra Clasolne".split()]


def rows(facts):
    return [dict(zip(("instruction", "prompt", "completion"), fact, strict=True)) for fact in facts]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    options = parser.parse_args()
    name = TINY_MODEL if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))

    def trainer(facts):
        kept = KEPT if options.tiny else None
        return QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows(facts), preserve_dataset=kept)

    def show(title):
        print(f"\n{title}")
        for question in QUESTIONS:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  {question}  ->  {answer.strip()}")

    trainer(FACTS).train()
    show("Taught")
    teaching = trainer([MOVED])
    teaching.train()
    show("Corrected: Tofinlor has moved to Oslo")
    print("The ledger:", *(f"{entry.id} {entry.instruction}" for entry in teaching.facts), sep="\n  ")
    teaching.forget(lambda entry: "clocks" in entry.completion)
    show("Forgotten: what Tofinlor makes")
    teaching.rollback()
    show("The forgetting undone")


if __name__ == "__main__":
    main()
