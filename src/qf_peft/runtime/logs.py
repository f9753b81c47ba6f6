"""The logger `qf_peft`: the standard library's, with the verbosity of transformers."""

from __future__ import annotations

import logging

from transformers.utils import logging as transformers_logging

NAME = "qf_peft"


class _Logger(logging.Logger):
    """A logger that, unless its own level is set, is as verbose as transformers was told to be (by
    `transformers.logging.set_verbosity…` or `TRANSFORMERS_VERBOSITY`); where nothing was said there, as the root is."""

    @property
    def level(self) -> int:
        general = transformers_logging.get_verbosity()
        return self._own or (general if general != logging.WARNING else logging.NOTSET)

    @level.setter
    def level(self, level: int) -> None:
        self._own = level


class _Terminal(logging.StreamHandler):
    """Prints what no handler of the user's does, as transformers' own handler does."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and logging.getLogger(NAME).handlers == [self]:
            super().emit(record)


def configure() -> None:
    """Make the logger `qf_peft`, if the user did not make and configure it before."""
    if NAME in logging.Logger.manager.loggerDict and isinstance(
        logging.Logger.manager.loggerDict[NAME], logging.Logger
    ):
        return
    present = logging.getLoggerClass()
    logging.setLoggerClass(_Logger)
    try:
        logger = logging.getLogger(NAME)
    finally:
        logging.setLoggerClass(present)
    handler = _Terminal()
    handler.setFormatter(logging.Formatter(f"[{NAME}] %(message)s"))
    logger.addHandler(handler)
