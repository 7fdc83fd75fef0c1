"""How a line of the log looks, and that a fault quotes nothing that a client has said."""

import copy
import logging
import traceback


class Formatter(logging.Formatter):
    """Exceptions without their messages, which may hold what they were raised about: a part of a
    prompt, say. Where the logger is told to log DEBUG, with them."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if error and not logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            record = copy.copy(record)  # other handlers have formatters of their own
            record.exc_text = _without_messages(error)
        return super().format(record)


def configure(level: str, line: str) -> None:
    """Log to stderr, each record as `line` with the time in %(asctime)s."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])


def _without_messages(error: BaseException) -> str:
    """The traceback and that of what led to it, first things first."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        frames = "".join(traceback.format_tb(cause.__traceback__))
        # the paths in an OSError are from the settings
        message = str(cause) if isinstance(cause, OSError) else "LOG_LEVEL=DEBUG shows the message"
        kind = type(cause).__qualname__
        parts.insert(0, f"Traceback (most recent call last):\n{frames}{kind}: {message}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n\nwhich led to this:\n\n".join(parts)
