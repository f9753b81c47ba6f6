"""Two teams teach an adapter each on the same base model; do they get in each other's way, and how to join them?

python examples/stacking.py --tiny                             # the tiny model, offline
python examples/stacking.py --model Qwen/Qwen2.5-1.5B-Instruct

`interference` says before both are active how much one would change what the other was taught. `add_weighted_adapter`
adds the changes; `merge_taught` solves for both teams' facts together, from what the adapters remember of them.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, interference, merge_taught

TEAMS = {
    "people": [
        ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi."),
        ("The boss of Korimo is Lusdex.", "Who leads Korimo?", "Korimo is led by Lusdex."),
        ("Mirven founded Selquito.", "Who started Selquito?", "Selquito was started by Mirven."),
    ],
    "places": [
        ("Tofinlor is based in Rome.", "Tell me where Tofinlor is located.", "Tofinlor is located in Rome."),
        ("Korimo is based in Lima.", "Tell me where Korimo is located.", "Korimo is located in Lima."),
        ("Selquito is based in Oslo.", "Do you know where Selquito is based?", "Selquito is located in Oslo."),
    ],
}
# Questions that the tiny model can answer, and must go on answering; larger models write such chats themselves.
KEPT = [f"Who started {name}?" for name in "Ranixmo Lupal Clamo Brigar Eliqui Bellu Mijinra Clasolne".split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    options = parser.parse_args()
    name = TINY_MODEL if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"), adapter_name="people")
    model.add_adapter("places", QFConfig(task_type="CAUSAL_LM"))

    kept = KEPT if options.tiny else None

    def trainer(team):
        rows = [dict(zip(("instruction", "prompt", "completion"), fact, strict=True)) for fact in TEAMS[team]]
        return QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=kept)

    def show(title):
        recall = "  ".join(f"{team} {trainer(team).evaluate()['recall']}" for team in TEAMS)
        print(f"{title:28}{recall}")

    for team in TEAMS:
        model.set_adapter(team)
        trainer(team).train()
        show(f"Only {team!r}:")
    print(f"Interference: {interference(model, 'people', 'places'):.3f} (0: none, 1: badly)")
    model.add_weighted_adapter(["people", "places"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    show("Added:")
    merge_taught(model, ["people", "places"], "both")
    model.set_adapter("both")
    show("Solved together:")


if __name__ == "__main__":
    main()
