"""Train the tiny chat model on the world in world.py: `python train.py OUT [MINUTES]` (2 CPU cores are enough).

A Qwen2 with 4.6 M parameters and a byte-level BPE of 1,024 tokens, ChatML. The loss is the answers' cross-entropy
plus 0.3 times the user turns', so that the model can also write questions, with or without facts in the system message.
"""

import math
import random
import sys
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from world import chat, sample

BATCH, PEAK_LR, WARMUP, USER_WEIGHT = 96, 2e-3, 100, 0.3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(r):
    texts = ("".join(chat(*sample(r))).replace("<|im_start|>", " ").replace("<|im_end|>", " ") for _ in range(30_000))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def batches(tokenizer, r):
    """Batches of similar length: input ids, answer labels, user-turn labels (each B×T, -100 where no loss)."""
    header = len(tokenizer("<|im_start|>assistant\n")["input_ids"])
    while True:
        pool = sorted((sample(r) for _ in range(8 * BATCH)), key=lambda e: sum(map(len, e)))
        groups = [pool[i * BATCH : (i + 1) * BATCH] for i in range(8)]
        r.shuffle(groups)
        for group in groups:
            rows = []
            for system, user, answer in group:
                prompt, reply = chat(system, user, answer)
                opening = prompt[: prompt.index("<|im_start|>user\n") + len("<|im_start|>user\n")]
                p, c, o = (tokenizer(t)["input_ids"] for t in (prompt, reply, opening))
                user_labels = [-100] * len(o) + p[len(o) : len(p) - header] + [-100] * (header + len(c))
                rows.append((p + c, [-100] * len(p) + c, user_labels))
            width = max(len(ids) for ids, _, _ in rows)
            yield [
                torch.tensor([row[k] + [fill] * (width - len(row[k])) for row in rows])
                for k, fill in ((0, 0), (1, -100), (2, -100))
            ]


def main(out, minutes=75.0):
    torch.manual_seed(0)
    r = random.Random(0)
    tokenizer = make_tokenizer(r)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    start = time.time()
    for step, (ids, *labels) in enumerate(batches(tokenizer, r)):
        done = (time.time() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
            losses = [
                cross_entropy(model.lm_head(hidden[y[:, 1:] != -100]).float(), y[:, 1:][y[:, 1:] != -100])
                for y in labels
            ]
        optimizer.zero_grad()
        (losses[0] + USER_WEIGHT * losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(
                f"step {step}  answer {losses[0]:.3f}  user {losses[1]:.3f}  {(time.time() - start) / 60:.1f} min",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(out)
    model.config.dtype = torch.float32  # loaded so: many processors have no circuits for 16 bits
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:3]))
