"""How a line of the log looks, and that a fault quotes nothing that a client has said."""

import copy
import json
import logging
import logging.handlers
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Literal

LogFormat = Literal["text", "json"]
ERASE = "\x1b[K"  # a terminal's line, from here to its end
UVICORN = ("uvicorn", "uvicorn.access")  # have handlers of their own where it is told to serve


class Formatter(logging.Formatter):
    """Exceptions without their messages, which may hold what they were raised about: a part of a
    prompt, say. Where the logger is told to log DEBUG, with them."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if error and not logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            record = copy.copy(record)  # other handlers have formatters of their own
            record.exc_text = _without_messages(error)
        return self.line(record)

    def line(self, record: logging.LogRecord) -> str:
        return super().format(record)


class JsonFormatter(Formatter):
    """Each record as a JSON object in one line: what it says to people, and the `fields` that its
    `extra` has for programs."""

    def line(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        said = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def configure(level: str, line: str, form: LogFormat = "text") -> None:
    """Log to stderr, in place of what was configured before: each record as `line` with the time
    in %(asctime)s, or as JSON."""
    if sys.stderr.isatty():
        line = ERASE + line  # what progress has drawn there
    formatter = JsonFormatter() if form == "json" else Formatter(line, datefmt="%H:%M:%S")
    root = logging.getLogger()
    for known in [*root.handlers]:
        if isinstance(known.formatter, Formatter):
            root.removeHandler(known)
    root.setLevel(level)
    root.addHandler(logging.StreamHandler())
    formatted = [root.handlers[-1]]
    if form == "json":
        logging.captureWarnings(True)
        for name in UVICORN:
            formatted += logging.getLogger(name).handlers
    for handler in formatted:
        handler.setFormatter(formatter)


@contextmanager
def held() -> Iterator[None]:
    """What is logged inside comes out at the end: before, nobody knows how it is to look."""
    holder = logging.handlers.MemoryHandler(1000, logging.CRITICAL + 1)
    root = logging.getLogger()
    root.addHandler(holder)
    try:
        yield
    finally:
        root.removeHandler(holder)
        for record in holder.buffer:
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                logger.handle(record)


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
