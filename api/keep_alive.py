"""How long a model is to stay loaded after a request, as clients of Ollama say it."""

import math
import re
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, Field

MAX_CHARS = 40
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """Go's durations, such as `5m` and `1h30m`; a number is in seconds."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_CHARS:
        raise ValueError(f"A duration has at most {MAX_CHARS} characters.")
    sign = -1.0 if value.startswith("-") else 1.0
    rest = value.removeprefix("-")
    parts = _PART.findall(rest)
    if parts and "".join(number + unit for number, unit in parts) == rest:
        return sign * math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)
    try:
        return float(value)
    except ValueError:
        raise ValueError("Give seconds, or a duration such as `5m` or `1h30m`.") from None


# negative: for ever; 0: unload it at once
KeepAlive = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_seconds)]


def drop_unless_admins(body: BaseModel, request: Request) -> list[str]:
    """The field, which is taken out of the body, where only an admin may say such a thing: who may
    not unload a model may not ask that it leaves at once, or never."""
    known = vars(body)  # without unknown fields
    if known.get("keep_alive") is None or request.scope["is_admin"]:
        return []
    known["keep_alive"] = None
    return ["keep_alive"]
