"""How long a model is to stay loaded after a request, as clients of Ollama say it."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """Go's durations, such as `5m` and `1h30m`; a number is in seconds."""
    if not isinstance(value, str):
        return value
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
