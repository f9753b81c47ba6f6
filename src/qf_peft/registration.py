"""QF among PEFT's types: after `import qf_peft` it is one like `LORA`.

PEFT need not be there yet, nor torch: it is met when it is imported. Importing this module twice, or reloading it,
registers the newest classes and changes nothing else.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register() -> None:
    """Make `QF` known to PEFT, now."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    from .adapter.config import NAME, QFConfig
    from .adapter.model import QFModel
    from .peft_patches import add_peft_type, patch
    from .runtime import logs

    logs.configure()
    peft_type = add_peft_type(NAME)

    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload: the mapping must hold the classes that are now in use
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = QFConfig
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = QFModel
    else:
        register_peft_method(name=NAME.lower(), config_cls=QFConfig, model_cls=QFModel, prefix=QFModel.prefix)
    patch()


def register_when_imported() -> None:
    """Make `QF` known to PEFT now if PEFT is there, else as soon as somebody imports it."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _WithPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithPeft())


class _WithPeft(MetaPathFinder):
    """Registers QF at the end of PEFT's own import."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "peft" or self._searching:
            return None
        self._searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register()

            spec.loader.exec_module = exec_module
        return spec
