"""PEFT's registry: after `import qf_peft`, `QF` is a PEFT type like `LORA`.

Importing this module twice, or reloading it, registers the newest classes and changes nothing else.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import QFConfig
from .model import QFModel
from .peft_type import NAME, add_peft_type


def register() -> None:
    """Make `QF` known to PEFT."""
    peft_type = add_peft_type(NAME)
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload: the mapping must hold the classes that are now in use
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = QFConfig
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = QFModel
    else:
        register_peft_method(name=NAME.lower(), config_cls=QFConfig, model_cls=QFModel, prefix=QFModel.prefix)
