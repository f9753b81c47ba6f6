"""The settings of a QFTrainer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class QFTrainingArguments:
    """
    Settings of [`QFTrainer`].

    Args:
        per_device_train_batch_size (`int`, defaults to 16):
            How many rows go through the model at once. It changes the speed and the memory, not the result.
        max_new_tokens (`int`, defaults to 256):
            How long an answer may be that the model gives itself, for rows without a completion.
        disable_tqdm (`bool`, defaults to `False`):
            Show no progress bar. One appears only on work of more than two seconds.

    Raises:
        ValueError: a value is out of range.
    """

    per_device_train_batch_size: int = 16
    max_new_tokens: int = 256
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"QFTrainingArguments: {name}={value!r}; expected a positive integer")

    @classmethod
    def paper(cls, **settings) -> QFTrainingArguments:
        """The exact setting of arXiv 2507.04300: each edited block matches its own state in context, by the
        minimum-norm solve, and nothing is preserved. Edit one block: `QFConfig(layers_to_transform=[23])`."""
        return cls(**settings)
