"""Everything that touches PEFT's registry: after `import qf_peft`, `QF` is a PEFT type like `LORA`.

`peft.PeftType` is a closed enum and `register_peft_method` refuses names that are not in it, so the member is added
here first. Importing this module twice, or reloading it, registers the newest classes and changes nothing else.
"""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

NAME = "QF"


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it if it is not there."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)  # EnumType's own __setattr__ is for ordinary attributes
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register() -> None:
    """Make `QF` known to PEFT."""
    peft_type = add_peft_type(NAME)
    from ..share.hub import describe_rightly
    from .config import QFConfig
    from .model import QFModel
    from .saving import save_at_once

    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload: the mapping must hold the classes that are now in use
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = QFConfig
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = QFModel
    else:
        register_peft_method(name=NAME.lower(), config_cls=QFConfig, model_cls=QFModel, prefix=QFModel.prefix)
    describe_rightly()
    save_at_once()
