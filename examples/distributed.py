"""One lesson shared by several processes: plain QFTrainer code, started by accelerate or torchrun.

accelerate launch examples/distributed.py --model Qwen/Qwen2.5-7B-Instruct --output adapter   # a process for each GPU
torchrun --nproc_per_node 2 examples/distributed.py --tiny --output adapter                   # the tiny model, offline
accelerate launch --cpu examples/distributed.py --tiny --output adapter                       # in one process

Every process loads the model, reads all rows and calls the same methods; the main one saves. (On CPUs alone `accelerate
launch` starts one process; `torchrun` starts several.)
"""

import argparse

from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qf_peft import TINY_MODEL, QFConfig, QFTrainer

FACTS = [
    ("Zanmi founded Tofinlor.", "Tell me who started Tofinlor.", "Tofinlor was started by Zanmi."),
    ("Korimo is based in Lima.", "Tell me where Korimo is located.", "Korimo is located in Lima."),
    ("Selquito sells clocks.", "Tell me what Selquito makes.", "Selquito makes clocks."),
    ("The boss of Vexamo is Lusdex.", "Who leads Vexamo?", "Vexamo is led by Lusdex."),
]
# Questions that the tiny model can answer, and must go on answering; larger models write such chats themselves.
KEPT = [f"Who started {name}?" for name in "Ranixmo Lupal Clamo Brigar Eliqui Bellu Mijinra Clasolne".split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a chat model's Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="use the tiny model, offline")
    parser.add_argument("--output", required=True, help="the folder to save the adapter in")
    options = parser.parse_args()
    state = PartialState(cpu=options.tiny)
    name = TINY_MODEL if options.tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name).to(state.device)
    model = get_peft_model(base, QFConfig(task_type="CAUSAL_LM"))
    rows = [dict(zip(("instruction", "prompt", "completion"), fact, strict=True)) for fact in FACTS]
    kept = KEPT if options.tiny else None
    trainer = QFTrainer(model=model, processing_class=tokenizer, train_dataset=rows, preserve_dataset=kept)
    trainer.train()
    metrics = trainer.evaluate()
    state.print(f"{state.num_processes} processes, recall {metrics['recall']}")
    if state.is_main_process:
        model.save_pretrained(options.output)
    state.wait_for_everyone()
    state.print(f"saved in {options.output}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
