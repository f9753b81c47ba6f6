"""What `benchmark.py` measures: a random model of a true shape, random facts, and the rivals on them."""

import random
import tempfile
import time
from copy import copy
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qf_peft import TINY_MODEL, QFConfig, QFTrainer, QFTrainingArguments
from qf_peft.data.rows import Encoder, read_rows
from qf_peft.teaching.preserved_chats import Chat

# hidden size, MLP's width, blocks, heads, key-value heads, vocabulary, tied: from the models' published configurations
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = 20  # of an instruction, a prompt, a completion; each word is one token
CHATS = 200  # preserved


def random_network(shape, dtype, device):
    """A Qwen2 model of a true shape with random weights, made on the device."""
    if shape == "tiny":
        config = AutoConfig.from_pretrained(TINY_MODEL)
    else:
        hidden, width, blocks, heads, kv_heads, vocabulary, tied = SHAPES[shape]
        config = AutoConfig.for_model(
            "qwen2", hidden_size=hidden, intermediate_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, rope_theta=1e6,
            max_position_embeddings=32768, rms_norm_eps=1e-6, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def word_tokenizer(vocabulary):
    """A tokenizer with a word for every id, so that random ids are text; in a chat template like Qwen's."""
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))])}
    made = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=[SPECIAL[1]]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Subject:
    """The model under measurement and what is taught to it."""

    def __init__(self, shape, dtype, device, options, cache):
        self.network = random_network(shape, dtype, device)
        self.vocabulary, self.device = self.network.config.vocab_size, torch.device(device)
        self.tokenizer = word_tokenizer(self.vocabulary)
        self.encoder = Encoder(self.tokenizer)
        self.options, self.cache = options, cache
        depth = self.network.config.num_hidden_layers
        self.layer = round(depth * 23 / 28)  # the paper edits block 23 of 28
        self.once = 0.0
        self.lora_steps = 0
        self.preserved = [{"prompt": p, "completion": c} for p, c in self.pairs("preserved", CHATS)]

    def texts(self, seed, count):
        r = random.Random(f"{seed} {count}")
        most = self.vocabulary - len(SPECIAL)
        return [" ".join(f"w{r.randrange(most)}" for _ in range(WORDS)) for _ in range(count)]

    def pairs(self, seed, count):
        return list(zip(self.texts(f"{seed} asked", count), self.texts(f"{seed} said", count), strict=True))

    def facts(self, count):
        parts = (self.texts(part, count) for part in ("instruction", "prompt", "completion"))
        return [{"instruction": i, "prompt": p, "completion": c} for i, p, c in zip(*parts, strict=True)]

    def examples(self, count):
        return [self.encoder.encode(row) for row in read_rows(self.facts(count))]

    def written(self, network, encoder, count, seed, progress):
        """In place of the chats that a model writes itself: random weights write none that end."""
        return [Chat(prompt, completion) for prompt, completion in self.pairs(f"own {seed}", count)]

    # Each method prepares untimed and returns a function that is measured, one that cleans up, and the factor by which
    # the time is to be multiplied where only a part is run.

    def qf(self, count, one_layer=False, **settings):
        o = self.options
        common = {"disable_tqdm": True, "cache_dir": self.cache, "batch_tokens": o.batch_tokens}
        if one_layer:
            args = QFTrainingArguments.paper(**common)
        else:
            args = QFTrainingArguments(sweeps=o.sweeps, contrast_chats=o.contrast, **common, **settings)
        config = QFConfig(task_type="CAUSAL_LM", layers_to_transform=[self.layer] if one_layer else None)
        trainer = QFTrainer(
            model=get_peft_model(self.network, config), args=args, train_dataset=self.facts(count),
            preserve_dataset=None if one_layer else self.preserved, processing_class=self.tokenizer,
        )  # fmt: skip
        with mock.patch("qf_peft.teaching.preserved_keys.write_chats", self.written):
            start = time.perf_counter()
            trainer.prepare()
            self.synchronize()
            self.once = max(self.once, time.perf_counter() - start)
        return trainer.train, lambda: self.bare_again(trainer.model), 1.0

    def floor(self, count, one_layer=False):
        """The two bare forward passes, up to the last edited block: no hooks, no unembedding, no mask, no cache."""
        decoder = copy(self.network.get_decoder())
        decoder._modules = dict(decoder._modules)
        if one_layer:
            decoder.layers = nn.ModuleList(list(decoder.layers)[: self.layer + 1])
        decoder.norm = nn.Identity()
        sequences = [e.context_ids[:-1] for e in self.examples(count)], [e.bare_ids[:-1] for e in self.examples(count)]

        @torch.no_grad()
        def run():
            for ids in sequences:  # all of a kind are of one length, so that nothing is padded
                size = max(1, self.options.batch_tokens // len(ids[0]))
                for first in range(0, count, size):
                    decoder(input_ids=torch.tensor(ids[first : first + size], device=self.device), use_cache=False)

        return run, lambda: None, 1.0

    def lora(self, count, batch=32):
        """The first steps of LoRA on all linear layers (rank 8, AdamW, float32 master adapter)."""
        network = get_peft_model(
            self.network, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        examples = self.examples(count)
        steps = lora_steps(count, self.options.compare)
        part = min(steps, self.options.lora_steps)
        self.lora_steps = steps
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
        r = random.Random(0)

        def run():
            network.train()
            for _ in range(part):
                chosen = r.sample(examples, min(batch, count))
                ids = torch.tensor([e.bare_ids for e in chosen], device=self.device)
                labels = ids.clone()
                answer = chosen[0].taught - chosen[0].header
                labels[:, :-answer] = -100
                loss = network(input_ids=ids, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        def clean():
            optimizer.state.clear()
            for parameter in network.parameters():
                parameter.grad = None
            self.bare_again(network.eval())

        return run, clean, steps / part

    def reference(self, count):
        """The paper's procedure: each taught token is forced one by one, with its instruction and without; what the
        edited module reads and the stream before its MLP are saved in a file a token; W' is solved from the files."""
        block = self.network.get_decoder().layers[self.layer]
        linear, norm = block.mlp.down_proj, block.post_attention_layernorm
        old, part = linear.weight.data, min(count, self.options.reference_facts)
        examples = self.examples(count)[:part]
        folder = tempfile.TemporaryDirectory()
        seen = {}

        def forced(ids, taught, path):
            cache, inputs = None, ids[: len(ids) - taught]
            for step in range(taught):
                output = self.network(
                    input_ids=torch.tensor([inputs], device=self.device), past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                output.logits.argmax(-1)  # what it would have said; the completion's token is forced instead
                cache = output.past_key_values
                torch.save({name: value[0, -1].float().cpu() for name, value in seen.items()}, f"{path}-{step}.pt")
                inputs = [ids[len(ids) - taught + step]]

        def note(name):
            return lambda _, args: seen.__setitem__(name, args[0].detach())

        @torch.no_grad()
        def run():
            handles = [linear.register_forward_pre_hook(note("key")), norm.register_forward_pre_hook(note("stream"))]
            for number, e in enumerate(examples):
                forced(e.context_ids, e.taught, Path(folder.name, f"context-{number}"))
                forced(e.bare_ids, e.taught, Path(folder.name, f"bare-{number}"))
            for handle in handles:
                handle.remove()

            def load(kind, name):
                paths = [
                    Path(folder.name, f"{kind}-{i}-{s}.pt") for i, e in enumerate(examples) for s in range(e.taught)
                ]
                return torch.stack([torch.load(path)[name] for path in paths], dim=1).to(self.device)

            x, y = load("context", "key"), load("bare", "key")
            change = load("context", "stream") - load("bare", "stream")
            weight = old.float()
            solved = weight - (weight @ (y - x) - change) @ torch.linalg.pinv(y)
            linear.weight.data = solved.to(old.dtype)

        def clean():
            linear.weight.data = old
            folder.cleanup()

        return run, clean, count / part

    def bare_again(self, model):
        """The network without the adapter."""
        model.unload()
        if hasattr(self.network, "peft_config"):
            del self.network.peft_config

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def lora_grid(facts):
    """The rates and steps among which `results/compare.json` says which were chosen."""
    lengths = (30, 60) if facts <= 10 else (60, 120) if facts <= 50 else (200, 400) if facts <= 200 else (400,)
    return [(rate, steps) for rate in (3e-3, 1e-2) for steps in lengths]


def lora_steps(count, compared):
    """The steps that LoRA on all linear layers needs on the tiny model: those chosen in `results/compare.json` at the
    next larger number of facts, and beyond its largest no fewer."""
    sizes = sorted({run["facts"] for run in compared})
    size = next((s for s in sizes if s >= count), sizes[-1])
    chosen = next(run["chosen"]["LoRA, all-linear"] for run in compared if run["facts"] == size)
    return lora_grid(size)[chosen][1]
