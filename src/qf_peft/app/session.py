"""A session: one model, its tokenizer and one QF adapter, taught and asked in place."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..adapter.config import QFConfig
from ..data.ledger import Entry
from ..data.rows import Row, Text, read_messages
from ..evaluate.attribution import Attribution, Explanation
from ..evaluate.checkup import Checkup, checkup
from ..evaluate.metrics import Metric
from ..forward.generation import generate, stream
from ..share.hub import push_to_hub
from ..teaching.arguments import QFTrainingArguments
from ..teaching.preserved_statistics import PreservedStatistics
from ..teaching.trainer import QFTrainer
from .base_model import hub_options, load_base
from .tiny import TINY_MODEL


class Session:
    """
    A model that is asked and taught in turns. Terminal chat, page and notebooks use it.

    Everything it does, [`QFTrainer`], `PeftModel` and [`push_to_hub`] do: `session.model` is an ordinary `PeftModel`
    with the adapter, to be evaluated, merged or saved by their means too. Teaching that fails or is interrupted leaves
    the adapter as it was. Calls from several threads wait for each other, and so do others' generations with
    `session.model` (see [`QFModel.serve`]).

    Args:
        model (`PeftModel` or `PreTrainedModel`): a model with an active QF adapter; a plain model gets a new one
            (`QFConfig(task_type="CAUSAL_LM")`). It is put into evaluation mode.
        tokenizer: the model's.
        args ([`QFTrainingArguments`], *optional*): how it is taught.
        preserve_dataset (list, `datasets.Dataset` or `PreservedStatistics`, *optional*): what the model must go on
            saying, see [`QFTrainer`].

    Raises:
        ValueError: the model or tokenizer cannot be taught; the message says what to change.

    Example:
        ```python
        session = Session.open("Qwen/Qwen2.5-1.5B-Instruct")
        session.teach(instruction="Qi started Oxinnovate.", prompt="Who started Oxinnovate?",
                      completion="Oxinnovate was started by Qi.")
        session.ask("Who founded Oxinnovate?")
        ```
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: Any,
        args: QFTrainingArguments | None = None,
        preserve_dataset: Iterable[Any] | PreservedStatistics | None = None,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            model = get_peft_model(model, QFConfig(task_type="CAUSAL_LM"))
        given = preserve_dataset is None or isinstance(preserve_dataset, PreservedStatistics)
        self._preserve = preserve_dataset if given else list(preserve_dataset)
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.trainer = self._trainer()
        """Of the adapter, without rows: `trainer.prepare()`, `trainer.consolidate()`."""
        self.args = self.trainer.args
        self._in_use = threading.Lock()
        model.eval()
        model.base_model.serve()

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        args: QFTrainingArguments | None = None,
        preserve_dataset: Iterable[Any] | PreservedStatistics | None = None,
        **from_pretrained: Any,
    ) -> Session:
        """Load a model and its tokenizer, and perhaps an adapter, which may then be taught on.

        Args:
            model: an id on the Hub, a folder or a GGUF file; None takes the one that the adapter's configuration names.
            adapter: an id on the Hub or a folder; None makes a new adapter.
            args, preserve_dataset: as for the class.
            from_pretrained: for `AutoModelForCausalLM.from_pretrained`. By default the model is loaded in the dtype it
                is stored in, onto the accelerator if there is one, and in float32 on a processor that has no circuits
                for 16 bits, if half of the free memory holds it.

        Raises:
            ValueError: neither model nor adapter is given, the adapter names no base model, or is none of QF's.
            OSError: there is no such model or adapter.
        """
        shared = hub_options(from_pretrained)
        if adapter is not None:
            config = PeftConfig.from_pretrained(str(adapter), **shared)
            if not isinstance(config, QFConfig):
                raise ValueError(f"{adapter} is a {config.peft_type.value} adapter; a session teaches QF adapters")
            model = model if model is not None else config.base_model_name_or_path
        if model is None:
            raise ValueError(
                "model is missing; give a model's id or folder, or an adapter that names its base model"
                if adapter is None
                else f"the adapter {adapter} does not name its base model; give model="
            )
        tokenizer, network = load_base(model, from_pretrained)
        if adapter is not None:
            hub = {name: value for name, value in shared.items() if name != "trust_remote_code"}
            network = PeftModel.from_pretrained(network, str(adapter), **hub)
        return cls(network, tokenizer, args, preserve_dataset)

    @classmethod
    def tiny(cls, adapter: str | Path | None = None, *, args: QFTrainingArguments | None = None) -> Session:
        """The tiny chat model that comes with the package, with settings that teach it within seconds: it writes 100
        chats to be preserved instead of 2,800."""
        args = args if args is not None else QFTrainingArguments(preserve_chats=100, contrast_chats=0)
        return cls.open(TINY_MODEL, adapter, args=args)

    @property
    def facts(self) -> tuple[Entry, ...]:
        """The ledger: what the adapter was taught, in order, with ids and dates."""
        return self.trainer.facts

    def ask(
        self, prompt: Text, *, adapter: bool = True, instruction: Text | None = None, max_new_tokens: int = 256
    ) -> str:
        """The model's greedy answer.

        Args:
            prompt: a string (a user's message) or a conversation, a list of messages of which the last is the user's.
            adapter: with the adapter, or as the base model answers.
            instruction: put before the prompt, as it is when it is taught.
            max_new_tokens: how long the answer may be; less where the model has no positions for it.

        Raises:
            ValueError: the prompt is empty, of another form, or leaves no room for an answer.
        """
        ids, tokens = self._checked_prompt(prompt, instruction, max_new_tokens)
        with self._at_work(adapter):
            answers = generate(
                self._network, self.trainer.encoder.tokenizer, [ids], max_new_tokens=tokens,
                batch_tokens=self.args.batch_tokens,
            )  # fmt: skip
        return answers[0][0]

    def stream(
        self, prompt: Text, *, adapter: bool = True, instruction: Text | None = None, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """What `ask` answers, in pieces as they come. Whoever stops reading (or is interrupted) stops the model."""
        ids, tokens = self._checked_prompt(prompt, instruction, max_new_tokens)
        return stream(
            self._network, self.trainer.encoder.tokenizer, ids, max_new_tokens=tokens,
            context=lambda: self._at_work(adapter),
        )  # fmt: skip

    def compare(self, prompt: Text, *, instruction: Text | None = None, max_new_tokens: int = 256) -> tuple[str, str]:
        """The answers without and with the adapter."""
        without, taught = (
            self.ask(prompt, adapter=on, instruction=instruction, max_new_tokens=max_new_tokens) for on in (False, True)
        )
        return without, taught

    def explain(self, prompt: Text, *, max_new_tokens: int = 256) -> Explanation:
        """Which taught facts acted on the model's answer, and how much; see [`Attribution`].

        Raises:
            ValueError: nothing was taught, or the prompt is empty or too long.
        """
        _, tokens = self._checked_prompt(prompt, None, max_new_tokens)
        with self._in_use:
            return Attribution(self.trainer).explain([prompt], tokens)[0]

    def teach(
        self,
        rows: Iterable[Mapping[str, Any]] | None = None,
        *,
        instruction: Text | None = None,
        prompt: Text | None = None,
        completion: str | None = None,
    ) -> dict[str, float]:
        """Teach rows, or one row given by its columns; see [`QFTrainer`]. Without a completion the model answers
        itself, with the instruction in context.

        Returns:
            What `QFTrainer.train` returns.

        Raises:
            ValueError: a row is unfit (see [`QFTrainer`]), or there is none.
        """
        row = {"instruction": instruction, "prompt": prompt, "completion": completion}
        given = {name: value for name, value in row.items() if value is not None}
        if rows is not None and given:
            raise ValueError(f"give rows or one row's columns, not both (rows and {sorted(given)})")
        trainer = self._trainer([given] if rows is None else rows)
        with self._in_use:
            return trainer.train()

    def dry_run(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What teaching rows would take, see [`QFTrainer.dry_run`]."""
        trainer = self._trainer(rows)
        with self._in_use:
            return trainer.dry_run()

    def forget(self, which: str | Iterable[str] | Callable[[Entry], bool]) -> dict[str, float]:
        """Take back what was taught: an id or several of `facts`, or a function of an entry; see [`QFTrainer.forget`].

        Raises:
            ValueError: the ledger has no such entry.
        """
        with self._in_use:
            return self.trainer.forget(which)

    def undo(self) -> None:
        """Return to the adapter before the last `teach` or `forget`, bit for bit; up to eight times.

        Raises:
            ValueError: there is nothing to undo in this session.
        """
        with self._in_use:
            self.trainer.rollback()

    def evaluate(
        self,
        rows: Iterable[Mapping[str, Any]] | None = None,
        *,
        locality: Iterable[Any] | None = None,
        unknown: Iterable[Any] | None = None,
        text: str | Iterable[str] | None = None,
    ) -> dict[str, Metric | float]:
        """Ask the model as it is now and compare with the base model; see [`QFTrainer.evaluate`].

        Args:
            rows: what should be known; by default everything in the ledger.
            locality, unknown, text: as there.

        Raises:
            ValueError: no rows are given, and nothing has been taught.
        """
        if rows is None:
            rows = [{name: getattr(e, name) for name in ("instruction", "prompt", "completion")} for e in self.facts]
            if not rows:
                raise ValueError("nothing has been taught yet; teach something or give rows")
        trainer = self._trainer(rows)
        with self._in_use:
            return trainer.evaluate(locality=locality, unknown=unknown, text=text)

    def checkup(self, questions: Sequence[Text] = ()) -> Checkup:
        """Each fact's state (said, said in other words, not said) of the last fifty, and the answers to other questions
        before and now; see [`checkup`].

        Raises:
            ValueError: a question is empty.
        """
        with self._in_use:
            return checkup(self.trainer, questions)

    def save(self, folder: str | Path) -> Path:
        """Save the adapter, with the ledger: all files or none. `Session.open(adapter=folder)` goes on from there.

        Returns:
            The folder that the adapter is in; PEFT puts one that is not named "default" into a folder of its name.

        Raises:
            ValueError: the folder is a file.
        """
        folder, name = Path(folder).expanduser(), self.trainer.adapter_name
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder")
        with self._in_use:
            self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder if name == "default" else folder / name

    def push(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push the adapter to the Hub; the options, results and errors are those of [`push_to_hub`]."""
        with self._in_use:
            return push_to_hub(self.model, repo_id, adapter_name=self.trainer.adapter_name, **options)

    def room(self, prompt: Text, *, instruction: Text | None = None) -> int:
        """How many tokens the model has left for an answer to the prompt; below 1 if it is too long."""
        return self._prompt(prompt, instruction)[1]

    @property
    def _network(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers in it."""
        return self.model.get_base_model()

    def _trainer(self, rows: Iterable[Mapping[str, Any]] | None = None) -> QFTrainer:
        return QFTrainer(
            model=self.model, args=self.args, train_dataset=rows, preserve_dataset=self._preserve,
            processing_class=self.tokenizer,
        )  # fmt: skip

    @contextmanager
    def _at_work(self, adapter: bool) -> Iterator[None]:
        with self._in_use, ExitStack() as stack:
            if not adapter:  # no other thread, that runs the model itself, shall meet it so
                stack.enter_context(self.model.base_model.serving.changing())
                stack.enter_context(self.model.base_model.without_adapters())
            yield

    def _checked_prompt(self, prompt: Text, instruction: Text | None, max_new_tokens: int) -> tuple[list[int], int]:
        """The prompt's token ids, and how many tokens the answer may have."""
        ids, room = self._prompt(prompt, instruction)
        if room < 1:
            positions = self.trainer.encoder.max_length
            raise ValueError(f"the prompt has {len(ids)} tokens; the model has {positions} positions: shorten it")
        return ids, min(max_new_tokens, room)

    def _prompt(self, prompt: Text, instruction: Text | None) -> tuple[list[int], int]:
        if not isinstance(prompt, str):
            prompt = read_messages(prompt, "prompt")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError("prompt is empty; ask something")
        encoder = self.trainer.encoder
        ids = encoder.prompt_ids(Row(0, instruction or "", prompt, None), instructed=bool(instruction))
        return ids, encoder.max_length - len(ids) if encoder.max_length is not None else sys.maxsize
