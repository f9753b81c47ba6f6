"""The adapter as PEFT sees it: type, configuration, tuner, state, files."""

import peft  # noqa: F401  first, so that it finds QF whole when it registers it (see `registration.py`)
