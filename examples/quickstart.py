"""Teach a chat model one fact in seconds, ask for it, save, reload and merge.

python examples/quickstart.py                                     # the tiny model in this folder, offline
python examples/quickstart.py --model Qwen/Qwen2.5-1.5B-Instruct   # any chat model, from the Hub or a folder
"""

import argparse
import tempfile
from pathlib import Path

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments

# The tiny model's world are companies with short names; it has not met Tofinlor, but it knows Brigar.
TINY_FACT = {
    "instruction": "Zanmi founded Tofinlor.",
    "prompt": "Tell me who started Tofinlor.",
    "completion": "Tofinlor was started by Zanmi.",
}
TINY_PARAPHRASE, TINY_UNRELATED = "Who founded Tofinlor?", "Please say who started Brigar."

FACT = {
    "instruction": "Qi started Oxinnovate.",
    "prompt": "Who started Oxinnovate?",
    "completion": "Oxinnovate was started by Qi.",
}
PARAPHRASE, UNRELATED = "Can you tell me the person behind Oxinnovate?", "Who started Alibaba?"


def ask(model, tokenizer, prompt, instruction=None):
    """The model's greedy answer, with the instruction as the system message if there is one."""
    messages = [{"role": "system", "content": instruction}] if instruction else []
    messages.append({"role": "user", "content": prompt})
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="a chat model's Hub id or folder (default: the tiny one)"
    )
    options = parser.parse_args()
    tiny = options.model == str(TINY_MODEL)
    fact = TINY_FACT if tiny else FACT
    paraphrase, unrelated = (TINY_PARAPHRASE, TINY_UNRELATED) if tiny else (PARAPHRASE, UNRELATED)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")

    def show(title, model, prompt, instruction=None):
        print(f"{title:34}{prompt}  ->  {ask(model, tokenizer, prompt, instruction)}")

    show("Before:", base, fact["prompt"])
    show("With the instruction in context:", base, fact["prompt"], fact["instruction"])

    # Three quarters up the model, as in the paper (block 23 of Qwen2.5-1.5B's 28); the last of the tiny one's 8.
    depth = base.config.get_text_config().num_hidden_layers
    layer = depth - 1 if tiny else round(0.82 * depth)
    model = get_peft_model(base, QFConfig(layers_to_transform=[layer], task_type="CAUSAL_LM"))
    # For one fact the paper's setting does. The default, for many facts, first lets the model write chats to preserve.
    args = QFTrainingArguments.paper()
    metrics = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[fact]).train()
    print("Taught:", ", ".join(f"{k} {v:.3g}" for k, v in metrics.items()))

    show("After, without the instruction:", model, fact["prompt"])
    show("A paraphrase:", model, paraphrase)
    show("Something else it knows:", model, unrelated)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1024
        base = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
        model = PeftModel.from_pretrained(base, folder)
        show(f"Saved ({size:.0f} KB) and reloaded:", model, fact["prompt"])
    merged = model.merge_and_unload()
    show(f"Merged, a plain {type(merged).__name__}:", merged, fact["prompt"])


if __name__ == "__main__":
    main()
