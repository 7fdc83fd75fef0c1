"""The fields that chat and raw completions share, and what the tier is asked for by them."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
)

from api.fields import Extensible, SomeText, Switch, WholeText, as_list, unknown_in, whole
from api.keep_alive import KeepAlive
from engine import wire
from engine.types import SamplingParams
from errors import BadRequest
from settings import TierSettings

T = TypeVar("T")

MAX_STOPS = 64
MAX_BIASES = 1024
MAX_BREAKERS = 16
MAX_BREAKER_BYTES = 40  # llama.cpp cuts longer ones
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128  # OpenAI's limit of n
MAX_PRIORITY = 100
# how other servers spell what an answer must look like, with the values that ask for nothing: who
# sends them reads what comes as if it were so
CONSTRAINTS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
     "regex", "ebnf", "json_schema"),
    ("", [], {}),
)  # fmt: skip
# and where an endpoint has a spelling of its own, those of the others
ALL_CONSTRAINTS = {**CONSTRAINTS, "grammar": ("",), "response_format": ({"type": "text"},)}
INSTEAD = dict.fromkeys(CONSTRAINTS, "send `response_format` or `grammar` (Lark or GBNF)")
REPLACED_BY_MIROSTAT = ("top_k", "typical_p", "top_p", "min_p", "xtc_probability")
PRIORITY_OF_SERVICE_TIER = {"flex": 10, "priority": -10, "fast": -10}


def _with_whole_keys(fields: dict[str, T]) -> dict[str, T]:
    whole("".join(fields))
    return fields


def _fits_breaker(text: str) -> str:
    if len(text.encode()) > MAX_BREAKER_BYTES or "\0" in text:
        raise ValueError(f"A sequence breaker has at most {MAX_BREAKER_BYTES} bytes, and no NUL.")
    return text


def _read_breakers(value: Any) -> Any:
    """SillyTavern sends the list as a text of JSON."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
        if not isinstance(value, list):
            raise ValueError("It is a list of texts.")
    return value


Breaker = Annotated[SomeText, AfterValidator(_fits_breaker)]
StopList = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(as_list),
]
UnitInterval = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Biases = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), AfterValidator(_with_whole_keys)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenLimit = Annotated[int, Field(ge=-1, lt=2**31)]  # -1, as some clients say it: no limit
Seed = Annotated[  # -1, as some clients say it: any
    Annotated[int, Field(ge=-(2**63), lt=2**64)] | None,
    BeforeValidator(lambda value: None if value == -1 else value),
]
ChoiceCount = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
OneChoice = Annotated[ChoiceCount, BeforeValidator(lambda value: 1 if value is None else value)]


class StreamOptions(Extensible):
    include_usage: Switch = False
    # padding against eavesdroppers: there are none on a loopback
    include_obfuscation: Switch = False


class JsonSchema(Extensible):
    """OpenAI's envelope. A schema is always enforced, so `strict` changes nothing."""

    name: str = ""
    description: str | None = None
    schema_: JsonValue = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Extensible):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: JsonValue = Field(None, alias="schema")  # llama-server's, of a json_object


class GenerationFields(Extensible):
    """Fields of a request for text. None: the tier's own value."""

    model: str
    stream: Switch = False
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    temperature: Temperature | None = None
    top_p: UnitInterval | None = None
    top_k: TopK | None = None
    min_p: UnitInterval | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**20)] | None = None
    typical_p: UnitInterval | None = None
    xtc_probability: UnitInterval | None = None
    xtc_threshold: UnitInterval | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    mirostat_eta: UnitInterval | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, le=2**20)] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1, le=2**20)] | None = None
    dry_sequence_breakers: Annotated[
        Annotated[tuple[Breaker, ...], Field(max_length=MAX_BREAKERS, fail_fast=True)] | None,
        BeforeValidator(_read_breakers),
    ] = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: Switch = False
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed = None
    stop: StopList | None = None
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    grammar: WholeText | None = None  # Lark or GBNF
    # reuse what was computed of the same beginning; None: unless there is a `seed`, since reused
    # numbers differ in their last digits and the answer is to be the same
    cache_prompt: bool | None = None
    timings: Switch = False  # how long it took, in the body or the last chunk
    user: Any = None  # whose request it is: nobody here wants to know
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    service_tier: ServiceTier | None = None
    keep_alive: KeepAlive | None = None  # Ollama's: how long the model stays loaded after it

    @property
    def effective_priority(self) -> int:
        """As in vLLM, lower is served earlier; where it is not said, the service tier says it."""
        if self.priority is not None:
            return self.priority
        return PRIORITY_OF_SERVICE_TIER.get(self.service_tier or "", 0)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def ignored(self) -> list[str]:
        """What has no effect beside Mirostat."""
        return [n for n in REPLACED_BY_MIROSTAT if self.mirostat and getattr(self, n) is not None]

    def unknown_inside(self) -> Iterator[str]:
        wanted = self.response_format
        yield from unknown_in("stream_options", self.stream_options)
        yield from unknown_in("response_format", wanted)
        yield from unknown_in("response_format.json_schema", wanted and wanted.json_schema)

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("It is only for `stream: true`.", param="stream_options")


def generate_request(
    fields: GenerationFields,
    tier: TierSettings,
    *,
    prompt: Sequence[wire.Segment | int] = (),
    limits: Sequence[int | None],
    n: int,
    n_logprobs: int | None,
    grammar: wire.Grammar | None,
    thinking: wire.Thinking | None = None,
    visible: Sequence[str] = (),
    calls: wire.Calls | None = None,
) -> wire.Generate:
    """What the tier is asked for. `limits` are the fields that bound the answer, under all the
    names that they have in this request. Raises BadRequest."""
    for name in ("min_tokens", "ignore_eos"):
        if grammar and getattr(fields, name):
            raise BadRequest("A grammar, or that of tools, decides where it ends.", param=name)
    return wire.Generate(
        prompt=[*prompt],
        add_bos=True,
        sampling=_sampling_params(fields, tier, n_logprobs),
        stop=fields.stop or [],
        grammar=grammar,
        thinking=thinking,
        visible=[*visible],
        calls=calls,
        logit_bias=fields.logit_bias or {},
        max_tokens=_max_tokens(tier, limits),
        reuse=fields.seed is None if fields.cache_prompt is None else fields.cache_prompt,
        n=n,
    )


def answer_part(fields: GenerationFields) -> wire.GrammarPart | None:
    """What the answer must look like, by `response_format` or `grammar`. Raises BadRequest."""
    wanted = fields.response_format
    if wanted is None or wanted.type == "text":
        return wire.GrammarPart("grammar", fields.grammar, "grammar") if fields.grammar else None
    if fields.grammar:
        raise BadRequest("Send `grammar` or `response_format`, not both.", param="grammar")
    if wanted.type == "json_object":
        schema = wanted.schema_ if wanted.schema_ is not None else {"type": "object"}
    elif wanted.json_schema is None or wanted.json_schema.schema_ is None:
        param = "response_format.json_schema.schema"
        raise BadRequest(f"'{param}' is required.", param=param)
    else:
        schema = wanted.json_schema.schema_
    return schema_part(schema, "response_format")


def schema_part(schema: Any, param: str, *, is_lenient: bool = False) -> wire.GrammarPart:
    """A JSON schema of the client's, in its field `param`. Raises BadRequest."""
    if not isinstance(schema, dict | bool):
        raise BadRequest("A schema is an object.", param=param)
    try:
        text = json.dumps(schema, ensure_ascii=False).encode().decode()
    except UnicodeEncodeError:
        raise BadRequest("A schema has half of a surrogate pair.", param=param) from None
    return wire.GrammarPart("json_schema", text, param, is_lenient)


def validity(is_valid: bool | None) -> dict[str, bool]:
    """Whether a finished choice is a whole one by its grammar, where it has one."""
    return {} if is_valid is None else {"schema_valid": is_valid}


def _sampling_params(
    fields: GenerationFields, tier: TierSettings, n_logprobs: int | None
) -> SamplingParams:
    """How to sample: the request's values over the tier's, of which not all are settings."""
    values = {}
    for name in SamplingParams.__struct_fields__:
        if name not in ("seed", "logit_bias", "n_logprobs", "prompt_logprobs"):
            asked = getattr(fields, name)
            values[name] = getattr(tier, name, None) if asked is None else asked
    said = {name: value for name, value in values.items() if value is not None}
    # the sampler takes 32 bits
    seed = random.getrandbits(32) if fields.seed is None else fields.seed % 2**32
    return SamplingParams(**said, seed=seed, n_logprobs=n_logprobs)


def _max_tokens(tier: TierSettings, limits: Sequence[int | None]) -> int | None:
    """The limit that holds; None: to the end of the context."""
    given = {limit for limit in limits if limit is not None}
    if len(given) > 1:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ; send one of them.", param="max_tokens"
        )
    limit = given.pop() if given else tier.max_tokens
    return None if limit == -1 else limit
