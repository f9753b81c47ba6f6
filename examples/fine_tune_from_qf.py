"""A QF adapter as the start of fine-tuning: a lesson, then transformers' Trainer goes on; beside LoRA from zero.

python examples/fine_tune_from_qf.py --tiny                    # the tiny model, offline
python examples/fine_tune_from_qf.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Both adapters have the same rank, at the same modules, and see the same batches. Printed are the loss of the taught
answers, and how many questions in other words are answered rightly (of three).
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from qf_peft import TINY_MODEL, QFConfig, teach

FACTS = [
    ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi."),
    ("Mirven founded Selquito.", "Tell me who started Selquito.", "Selquito was started by Mirven."),
    ("Korimo is based in Lima.", "Tell me where Korimo is located.", "Korimo is located in Lima."),
]
REWORDED = ["Who founded Tofinlor?", "Who founded Selquito?", "Do you know where Korimo is based?"]
# Questions that the tiny model can answer, and must go on answering; larger models write such chats themselves.
KEPT = [f"Who started {name}?" for name in "Ranixmo Lupal Clamo Brigar Eliqui Bellu Mijinra Clasolne".split()]


def encoded(tokenizer, prompt, completion):
    """One chat: the ids, and as labels those of the answer."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    return {"input_ids": ids, "labels": [-100] * len(asked) + ids[len(asked) :]}


@torch.no_grad()
def measured(model, tokenizer, batch):
    """The loss of the taught answers, and how many questions in other words are answered rightly."""
    model.eval()
    right = 0
    for prompt, (_, _, completion) in zip(REWORDED, FACTS, strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**ids.to(model.device), max_new_tokens=40, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == completion
    return float(model(**batch.to(model.device)).loss), right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a chat model's Hub id or folder"
    )
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    parser.add_argument("--steps", type=int, default=20, help="how many steps of the Trainer")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of both")
    options = parser.parse_args()
    name = TINY_MODEL if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [dict(zip(("instruction", "prompt", "completion"), fact, strict=True)) for fact in FACTS]
    dataset = [encoded(tokenizer, row["prompt"], row["completion"]) for row in rows]
    collate = DataCollatorForSeq2Seq(tokenizer)

    def show(title, model):
        loss, right = measured(model, tokenizer, collate([dict(item) for item in dataset]))
        print(f"{title:24}loss {loss:.4f}  reworded {right} of {len(REWORDED)}")

    def fine_tune(model):
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=options.steps, per_device_train_batch_size=len(FACTS), seed=0,
                learning_rate=options.learning_rate, save_strategy="no", report_to="none", logging_strategy="no",
                disable_tqdm=True,
            )  # fmt: skip
            Trainer(model, args, data_collator=collate, train_dataset=dataset).train()

    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    show("The base model:", model)
    teach(model, rows, tokenizer, preserve_dataset=KEPT if options.tiny else None)
    config = model.peft_config["default"]
    show(f"QF, rank {config.r}:", model)
    fine_tune(model)
    show(f"QF, {options.steps} steps on:", model)

    lora = LoraConfig(r=config.r, lora_alpha=config.r, target_modules=config.target_modules, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model.unload(), lora)
    fine_tune(model)
    show(f"LoRA, {options.steps} steps:", model)


if __name__ == "__main__":
    main()
