"""QF adapters for PEFT: knowledge from a prompt into the weights, solved in closed form from forward activations."""

import sys
from pathlib import PurePath

# The command `qf-peft` shows its help and refuses wrong usage before torch is loaded, and registers QF itself then.
if PurePath(sys.argv[0] if sys.argv else "").stem != "qf-peft":
    from .api import *  # noqa: F403
    from .api import __all__  # noqa: F401
