"""The tiny chat model that comes with the package: a 4.6-million-parameter Qwen2 that knows a small invented world."""

from pathlib import Path

TINY_MODEL = Path(__file__).parent.parent / "tiny_model"
"""Its folder, for `from_pretrained`; `examples/tiny_world/` in the repository trains it."""
