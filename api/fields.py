"""Types that fields of several endpoints have, and what becomes of fields that are unknown or ask
for what is not there."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from api.deps import Services
from api.keep_alive import drop_unless_admins
from engine.types import Truncate
from errors import BadRequest, UnsupportedParameter

# of OpenAI's API: what is kept for whom, of which there is nothing here
IGNORED = (
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "store",
)  # fmt: skip

NOTHING: Mapping[str, Any] = {}
MAX_NAMED_CHARS = 1000  # of what a header names


class Extensible(BaseModel):
    """A request, or a part of one, that may hold fields which nobody knows."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> Sequence[str]:
        """Known fields that have no effect in it."""
        return ()

    @property
    def left_out(self) -> Mapping[str, str]:
        """The types of what it goes without, by the places where they are."""
        return {}

    @property
    def unknown(self) -> Mapping[str, Any]:
        """Such fields that it has."""
        return self.model_extra or {}

    def unknown_inside(self) -> Iterable[str]:
        """The places of such fields in its parts."""
        return ()


def unknown_in(place: str, part: Extensible | None, beside: Container[str] = ()) -> Iterator[str]:
    """The fields of a part that nobody knows, but those that may stand `beside` the others and say
    nothing to a model. Clients that write all their fields say null where they mean nothing."""
    for name, value in (part.unknown if part else {}).items():
        if value is not None and name not in beside:
            yield f"{place}.{name}"


def whole(text: str) -> str:
    """The text, if it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("The text has half of a surrogate pair.") from None
    return text


def _not_empty(value: object) -> object:
    """Pydantic says of a text that it has no items."""
    if value == "":
        raise ValueError("The text is empty.")
    return value


def _no_truth(value: object) -> object:
    """To pydantic `true` is a number too."""
    if isinstance(value, bool):
        raise ValueError("a token id is a number")
    return value


def as_list(value: Any) -> Any:
    """A text that may stand for a list of one."""
    return [value] if isinstance(value, str) else value


Switch = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
WholeText = Annotated[str, AfterValidator(whole)]
SomeText = Annotated[WholeText, Field(min_length=1), BeforeValidator(_not_empty)]
Token = Annotated[int, BeforeValidator(_no_truth), Field(ge=0, lt=2**31)]
Direction = Literal["Left", "Right", "left", "right"]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


def kind_of_content(value: Any) -> str:
    """The tag of what may be a text or a list."""
    return "<list>" if isinstance(value, list) else "<text>"


def kind_of_texts(value: Any) -> str:
    """The tag of what may be a text, token ids, or a list of either."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "<lists of tokens>"
    if isinstance(first, int):
        return "<tokens>"
    return "<texts>" if isinstance(value, list) else "<text>"


def each_text(value: Any) -> list[str | list[int]]:
    """Each of such texts, also where there is one only."""
    is_one = isinstance(value, str) or isinstance(value[0], int)
    return [value] if is_one else value


def read_truncate(
    truncate: Truncate | bool | None, direction: Direction | None, unsaid: Truncate
) -> Truncate:
    """Where a text that is too long is cut: `truncate` may say it, or whether, and the side be that
    of TEI's `truncation_direction`; where nothing is said, `unsaid`. Raises BadRequest."""
    asked = unsaid if truncate is None else truncate
    if isinstance(asked, bool):
        asked = "end" if asked else "none"
    if asked == "none" or direction is None:
        return asked
    side: Truncate = "start" if direction.lower() == "left" else "end"
    if isinstance(truncate, str) and side != asked:
        raise BadRequest(
            f"`truncate` is '{truncate}' and `truncation_direction` '{direction}': send one of "
            "them.",
            param="truncation_direction",
        )
    return side


def accepted(
    body: Extensible,
    request: Request,
    services: Services,
    unsupported: Mapping[str, tuple[Any, ...]] = NOTHING,
    instead: Mapping[str, str] = NOTHING,
) -> dict[str, str]:
    """The header that names what has no effect: unknown fields of a body and of its parts, what is
    left out of it, and what is ignored. Raises BadRequest for a field that asks for what is not
    there; with STRICT_PARAMS also for unknown ones and what is left out. A `keep_alive` that is no
    admin's is taken out of the body.

    `unsupported` has the values of each field that ask for nothing, and `instead` what to do about
    some of them, in place of leaving them out.
    """
    extra = body.unknown
    for name, neutral in unsupported.items():
        value = extra.get(name)
        if value is not None and not any(_is_same(value, n) for n in neutral):
            advice = instead.get(name, "leave it out")
            raise UnsupportedParameter(
                f"'{name}' is not supported by this version; {advice}.", param=name
            )
    unknown = chain(
        (name for name in extra if name not in unsupported and name not in IGNORED),
        body.unknown_inside(),
    )
    if services.settings.server.strict_params:
        for name in unknown:
            raise BadRequest(f"The field '{name}' is not known (STRICT_PARAMS is on).", param=name)
        for place, kind in body.left_out.items():
            raise UnsupportedParameter(
                f"'{place}' is of type '{kind}', which is not supported; it would be left out, but "
                "STRICT_PARAMS is on.",
                param=place,
            )
    ignored = [*body.ignored, *drop_unless_admins(body, request)]
    ignored += (name for name in IGNORED if extra.get(name) not in (None, False))
    return with_ignored({}, chain(body.left_out, ignored, unknown))


def _is_same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)  # 1 == True in Python


def with_ignored(headers: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The headers, in which these are named before what else has no effect; of very many the
    first."""
    said = headers.get("X-Ignored-Params")
    told: list[str] = []
    n_left = MAX_NAMED_CHARS
    for name in chain(names, said.split(",") if said else ()):
        ascii_ = name[:n_left].encode("ascii", "backslashreplace").decode()
        printable = "".join(c if c.isprintable() else "?" for c in ascii_)
        if told and len(printable) >= n_left:
            break
        told.append(printable[:n_left])
        n_left -= len(printable) + 1
    return {**headers, "X-Ignored-Params": ",".join(told)} if told else {**headers}
