"""Teach, push to the Hub, and load back from there: as a QF adapter, and as plain LoRA without qf_peft's classes.

python examples/hub_round_trip.py --tiny                               # against a Hub on this machine's loopback
python examples/hub_round_trip.py --model Qwen/Qwen2.5-1.5B-Instruct --repo me/oxinnovate   # after `hf auth login`

What is pushed: the adapter, the same as a LoRA adapter in `lora/`, and a model card with the evaluation. The taught
texts stay here. The repository is private unless you say `--public`.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

FACT = {
    "instruction": "Zanmi founded Tofinlor.",
    "prompt": "Tell me who started Tofinlor.",
    "completion": "Tofinlor was started by Zanmi.",
}


def round_trip(base_model, repo, private):
    from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qf_peft import QFConfig, QFTrainer, QFTrainingArguments, push_to_hub

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    base = AutoModelForCausalLM.from_pretrained(base_model, device_map="auto")
    # One fact in one block, by the paper's setting: the last of the tiny model's, three quarters up a larger one's.
    depth = base.config.get_text_config().num_hidden_layers
    block = depth - 1 if depth < 12 else round(0.82 * depth)
    model = get_peft_model(base, QFConfig(layers_to_transform=[block], task_type="CAUSAL_LM"))
    args = QFTrainingArguments.paper()
    trainer = QFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=[FACT])
    trainer.train()
    commit = push_to_hub(model, repo, metrics=trainer.evaluate(), license="apache-2.0", private=private)
    print(f"Pushed: {commit.commit_message}")

    def answer(model):
        chat = [{"role": "user", "content": FACT["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print(f"As a QF adapter:  {answer(AutoPeftModelForCausalLM.from_pretrained(repo, device_map='auto'))}")
    base = AutoModelForCausalLM.from_pretrained(base_model, device_map="auto")
    print(f"As plain LoRA:    {answer(PeftModel.from_pretrained(base, repo, subfolder='lora'))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id")
    parser.add_argument("--repo", default="me/tofinlor", help="the repository to push to, user/name")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model and a Hub on loopback")
    options = parser.parse_args()
    if not options.tiny:
        return round_trip(options.model, options.repo, not options.public)

    # The tests' server speaks as much of the Hub's protocol as its client needs. The client reads where its Hub is when
    # it is imported, which is why nothing that imports it stands at the top of this file.
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from hub_server import HubServer

    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        os.environ.update(hub.environment(home))
        from qf_peft import TINY_MODEL

        hub.add("someone/tiny-world", TINY_MODEL)
        round_trip("someone/tiny-world", options.repo, not options.public)
        print("In the repository:", *sorted(hub.repos[options.repo].files()), sep="\n  ")


if __name__ == "__main__":
    main()
