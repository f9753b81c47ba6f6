"""Fine-tuning by gradients: LoRA on the completions, LocFT-BF, and prompt baking."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qf_peft.data.rows import Row, read_rows
from qf_peft.forward.blocks import block_ends, find_blocks
from qf_peft.forward.generation import generate
from qf_peft.solve.least_squares import LowRankDelta

from .bench import Bench, Unfit
from .learners import Change, Learner, Rows, lora_change

Pair = tuple[list[int], int]  # token ids, and how many of the last ones are to be predicted


def worded(rows: Rows) -> list[Row]:
    """The rows, and each again with every wording that is taught along."""
    checked = read_rows(rows)
    return [one for row in checked for one in (row, *(replace(row, prompt=text) for text in row.wordings))]


def batches(items: Sequence[Any], size: int, r: random.Random) -> Iterator[list[Any]]:
    """An epoch's minibatches, in a new order."""
    order = r.sample(items, len(items))
    return (order[first : first + size] for first in range(0, len(order), size))


def padded(pairs: Sequence[Pair], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (−100 where nothing is predicted), padded on the right: each (n, width)."""
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, count) in enumerate(pairs):
        end = len(tokens)
        ids[row, :end], mask[row, :end] = torch.tensor(tokens), 1
        labels[row, end - count : end] = ids[row, end - count : end]
    return ids.to(device), mask.to(device), labels.to(device)


class LoRA(Learner):
    """LoRA by AdamW on the completions' cross-entropy, the end of the turn included; the rate warms up over five steps
    and decays linearly. Further lessons train the same adapter on.

    Settings:
        target: "all-linear" or "mlp" (the modules that end the blocks' MLPs).
        rate: the highest learning rate.
        epochs: passes over a lesson's rows, `batch` rows a step.
    """

    rank = 16

    def __init__(
        self,
        bench: Bench,
        preserved: list[Any] | None = None,
        *,
        target: str,
        rate: float,
        epochs: int,
        batch: int = 10,
    ) -> None:
        super().__init__(bench, preserved, target=target, rate=rate, epochs=epochs, batch=batch)
        self.rate, self.epochs, self.batch = rate, epochs, batch
        modules = "all-linear" if target == "all-linear" else sorted(block_ends(self.model, attention=False))
        torch.manual_seed(0)
        self.model = get_peft_model(
            self.model,
            LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=modules, task_type="CAUSAL_LM"),
        )

    def examples(self, rows: Rows) -> list[Any]:
        """What minibatches are drawn from."""
        return [self.bench.encoder.answer_ids(row, True) for row in worded(rows)]

    def loss(self, chosen: list[Any]) -> Tensor:
        """The mean loss of a minibatch."""
        ids, mask, labels = padded(chosen, self.bench.tokenizer.pad_token_id, self.bench.device)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def learn(self, rows: Rows) -> None:
        examples, r = self.examples(rows), random.Random(0)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)
        total = self.epochs * -(-len(examples) // self.batch)
        steps = (chosen for _ in range(self.epochs) for chosen in batches(examples, self.batch, r))
        self.model.train()
        for step, chosen in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1, (step + 1) / 5) * (1 - step / total)
            self.loss(chosen).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()

    def change(self) -> Change:
        return lora_change(self.model)


class PromptBaking(LoRA):
    """LoRA trained so that the bare model predicts what the model with the instruction in context predicts: the mean KL
    from the latter to the former, along answers (arXiv 2409.13697).

    Settings:
        own: whether the answers are the model's own, sampled with the instruction in context, besides the given ones.
        Others as LoRA's.
    """

    sampled, answer_tokens = 2, 64

    def __init__(self, bench: Bench, preserved: list[Any] | None = None, *, own: bool = True, **setting: Any) -> None:
        super().__init__(bench, preserved, **setting)
        self.own = own
        self.setting = {**self.setting, "own": own}

    def examples(self, rows: Rows) -> list[tuple[Pair, Pair]]:
        """For each answer the sequence without and with the instruction, and how many steps predict the answer."""
        plain = worded(rows)
        answered = list(plain)
        if self.own:
            with self.model.disable_adapter():
                for seed in range(self.sampled):
                    found = generate(
                        self.model, self.bench.tokenizer, [self.bench.encoder.prompt_ids(row, True) for row in plain],
                        max_new_tokens=self.answer_tokens, batch_tokens=self.bench.batch_tokens, sample_seed=seed,
                    )  # fmt: skip
                    pairs = zip(plain, found, strict=True)
                    answered += [replace(row, completion=text, significance=1.0) for row, (text, _) in pairs if text]
        pairs = []
        for number, row in enumerate({repr(row): row for row in answered}.values()):
            try:
                example = self.bench.encoder.encode(row)
            except ValueError:
                if number < len(plain):
                    raise
                continue  # a sampled answer that is not tokenised alike with and without the instruction
            steps = example.taught - example.header
            pairs.append(((example.bare_ids, steps), (example.context_ids, steps)))
        return pairs

    def loss(self, chosen: list[tuple[Pair, Pair]]) -> Tensor:
        in_context = self._predictions([context for _, context in chosen], adapted=False)
        bare = self._predictions([bare for bare, _ in chosen], adapted=True)
        return nn.functional.kl_div(bare, in_context, log_target=True, reduction="batchmean")

    def _predictions(self, pairs: list[Pair], adapted: bool) -> Tensor:
        """Log probabilities at the steps that predict the answers, (steps, vocabulary) float32."""
        ids, mask, labels = padded(pairs, self.bench.tokenizer.pad_token_id, self.bench.device)
        with nullcontext() if adapted else self.model.disable_adapter(), torch.set_grad_enabled(adapted):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, :-1][labels[:, 1:] >= 0].float().log_softmax(-1)


class LocFT(Learner):
    """LocFT-BF (arXiv 2509.22072): Adam on the weight of one block's MLP end, over minibatches of all facts epoch by
    epoch, the end token in the target. As in its authors' code a minibatch of loss below 0.01 is passed over, and
    training ends with an epoch of mean loss below that.

    Settings:
        rate: the learning rate (theirs 5e-4).
        depth: where the block is, as a share of the depth (theirs .21 in Qwen2.5-7B, .69 in Llama-3-8B).
        epochs: at most (theirs 25).
        batch: rows a step (theirs 100, of 3,000).
    """

    enough = 0.01

    def __init__(
        self, bench: Bench, preserved: list[Any] | None = None, *, rate: float, depth: float, epochs: int = 25,
        batch: int = 10,
    ) -> None:  # fmt: skip
        super().__init__(bench, preserved, rate=rate, depth=depth, epochs=epochs, batch=batch)
        self.rate, self.epochs, self.batch = rate, epochs, batch
        path, blocks = find_blocks(self.model)
        number, ends = int(depth * len(blocks)), block_ends(self.model, attention=False)
        found = [
            n for n, _ in blocks[number].named_modules() if any(n.split(".")[-1] == e.split(".")[-1] for e in ends)
        ]
        if not found:
            raise Unfit(f"block {number} has no linear module that ends its MLP")
        self.name = f"{path}.{number}.{found[-1]}"
        self.weight = self.model.get_submodule(self.name).weight
        self.before = self.weight.detach().clone()
        # Steps are taken in float32: in 16 bits most of them would be rounded away.
        self.master = self.weight.detach().float().clone()

    def learn(self, rows: Rows) -> None:
        examples, r = [self.bench.encoder.answer_ids(row, True) for row in worded(rows)], random.Random(0)
        self.model.requires_grad_(False)
        self.weight.requires_grad_(True)
        optimizer = torch.optim.Adam([self.master], lr=self.rate)
        for _ in range(self.epochs):
            losses = []
            for chosen in batches(examples, self.batch, r):
                loss = self._loss(chosen)
                losses += [float(loss.detach())] * len(chosen)
                if losses[-1] >= self.enough:
                    loss.backward()
                    self.master.grad = self.weight.grad.float()
                    optimizer.step()
                    self.weight.data.copy_(self.master)
                    self.weight.grad = None
            if sum(losses) / len(losses) < self.enough:
                break

    def _loss(self, chosen: list[Pair]) -> Tensor:
        """The mean over the rows of each row's mean over its target's tokens."""
        ids, mask, labels = padded(chosen, self.bench.tokenizer.pad_token_id, self.bench.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return (losses.sum(1) / (labels[:, 1:] >= 0).sum(1)).mean()

    @torch.no_grad()
    def change(self) -> Change:
        apart = (self.weight - self.before).float().cpu()
        return {self.name: LowRankDelta(A=apart, B=torch.eye(len(apart)))}
