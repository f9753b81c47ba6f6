"""The member `QF` of PEFT's types.

`peft.PeftType` is a closed enum and `register_peft_method` refuses names that are not in it, so the member is added.
"""

from peft import PeftType

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
