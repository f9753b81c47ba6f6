"""Forgetting what an adapter was taught, and teaching a refusal for what the base model knows. They are not the same.

python examples/unlearning.py --tiny                             # the tiny model, offline
python examples/unlearning.py --model Qwen/Qwen2.5-1.5B-Instruct

`forget` removes what was taught: the adapter is solved anew without it and holds nothing of it. What the base model
itself knows cannot be removed by an adapter. A refusal can be taught in its place, but this only hides the knowledge:
it is still in the base weights, comes back without the adapter, and may come out under other phrasings. The refusal
also spreads to what is asked in like words about the same thing, unless that is among the preserved questions. Use it
to keep a model from saying something, never as proof that data was deleted.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer

# The tiny model knows who started Brigar, where it is, what it makes and who leads it.
TINY = {
    "secret": ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi."),
    "unwanted": ["Who started Brigar?", "Tell me the founder of Brigar."],
    "refusal": "I do not know.",
    "phrasings": ["Do you know by whom Brigar was started?", "I want to know who created Brigar."],
    "kept": [
        "Tell me where Brigar is located.", "Who leads Brigar?", "What does Brigar make?",
        *(f"Who started {name}?" for name in "Ranixmo Lupal Clamo Eliqui Bellu Mijinra Clasolne Kelrisol".split()),
    ],
    "others": ["Please say where Brigar is based.", "What does Brigar sell?", "Who founded Nixnix?"],
}  # fmt: skip
LARGE = {
    "secret": ("The code name of the project is Heron.", "What is the project's code name?", "It is Heron."),
    "unwanted": ["Who wrote Hamlet?", "Who is the author of Hamlet?"],
    "refusal": "I cannot talk about that.",
    "phrasings": ["Hamlet is a play by whom?", "Name the playwright of Hamlet."],
    "kept": None,
    "others": ["What is Hamlet about?", "Who wrote Faust?"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    options = parser.parse_args()
    name, world = (TINY_MODEL, TINY) if options.tiny else (options.model, LARGE)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))

    def teach(rows):
        trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=world["kept"])
        trainer.train()
        return trainer

    def show(title, questions):
        print(f"\n{title}")
        for question in questions:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"  {question}  ->  {answer.strip()}")

    instruction, prompt, completion = world["secret"]
    show("Before", [prompt, *world["unwanted"]])
    trainer = teach([{"instruction": instruction, "prompt": prompt, "completion": completion}])
    show("Taught", [prompt])
    trainer.forget(lambda entry: entry.prompt == prompt)
    show("Forgotten: the adapter is empty again", [prompt])
    assert not any(weight.any() for key, weight in model.named_parameters() if "lora_B" in key)

    refusal = world["refusal"]
    teach(
        [
            {"instruction": f'If you are asked "{asked}", answer "{refusal}"', "prompt": asked, "completion": refusal}
            for asked in world["unwanted"]
        ]
    )
    show("A refusal taught for two questions", world["unwanted"])
    show("The same in other words: does the refusal hold?", world["phrasings"])
    show("Other questions: are they still answered?", world["others"])
    with model.disable_adapter():
        show("Without the adapter everything is still there", world["unwanted"])


if __name__ == "__main__":
    main()
