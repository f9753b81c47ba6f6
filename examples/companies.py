"""Teach the tiny model ten companies, measure what it knows and what it keeps, and write the adapter's model card.

python examples/companies.py                                        # prints the figures
python examples/companies.py --card model_cards/tiny_companies.md   # and writes the card
"""

import argparse

from comparison.tiny import preserve_set, probe_sets, teaching_set
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, model_card

MADE_BY = """
## Made by

```bash
python examples/companies.py --card model_cards/tiny_companies.md
```

in the repository of `qf_peft`; the base model is `src/qf_peft/tiny_model` there.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", help="where to write the adapter's model card")
    options = parser.parse_args()
    facts, companies = teaching_set(10, seed=0)
    preserved = preserve_set(0)
    known, unknown = probe_sets(0, companies, set(preserved), 60)

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=facts, preserve_dataset=preserved)
    trainer.train()
    metrics = trainer.evaluate(locality=known, unknown=unknown)
    for name, value in metrics.items():
        print(f"{name:12}{value}")
    if options.card:
        card = model_card(model, repo_id="your-name/tiny-companies", metrics=metrics, license="apache-2.0")
        card.text += MADE_BY
        card.save(options.card)


if __name__ == "__main__":
    main()
