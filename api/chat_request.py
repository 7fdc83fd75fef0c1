"""What a client may ask of a chat, in OpenAI's fields. The other chat endpoints translate theirs
into these."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from api.fields import Extensible, Switch, kind_of_content, unknown_in
from api.sampling import (
    GenerationFields,
    OneChoice,
    TokenLimit,
    TopLogprobs,
    schema_part,
)
from chat.format import NO_TOOLS, ToolChoice
from chat.tools.base import Tool
from engine.grammar_text import BY_NAME, DATA
from errors import BadRequest, UnsupportedParameter

MAX_TOOLS = 512  # OpenAI's limit is 128, but agents bring those of many servers
MAX_NAME = 128  # of a function
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of a message
TEXTS = ("text", "input_text", "output_text")  # types of parts of a tool's result
THOUGHTS = ("reasoning_text", "summary_text")
SAYS_MORE = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
MAY_BE_NULL = {"const", "default"}

# what a template gets from us
RESERVED_KWARGS = {"messages", "now", "continues", "tools", "add_generation_prompt", "self"}


class ContentPart(Extensible):
    type: str
    text: str | None = None
    _stands_for: str | None = PrivateAttr(None)

    @property
    def unknown(self) -> Mapping[str, Any]:
        """None where it is refused by its type, which says more."""
        return super().unknown if self.type in (*TEXTS, *THOUGHTS) else {}

    @property
    def stands_for(self) -> str | None:
        """The type of what could not be read, where this is a note of it."""
        return self._stands_for

    def read(self, place: str, model: str, kinds: Container[str] = ("text",)) -> str:
        """Its text, if it is of these kinds. Raises BadRequest."""
        if self.type not in kinds:
            raise UnsupportedParameter(
                f"Content of type '{self.type}' is not supported: model '{model}' reads text only.",
                param=f"{place}.type",
            )
        if self.text is None:
            raise BadRequest(f"'{place}.text' is required.", param=f"{place}.text")
        return self.text

    def as_text(self) -> "ContentPart":
        """A text in place of what an assistant said to refuse."""
        more = dict(self.model_extra or {})
        said = more.pop("refusal", None)
        if self.type != "refusal" or not isinstance(said, str):
            return self
        return ContentPart.model_validate(more | {"type": "text", "text": said})

    def as_note(self) -> "ContentPart":
        """A text in place of what cannot be read."""
        text = f"[Content of type '{self.type}' is left out: this model reads text only.]"
        note = ContentPart(type="text", text=text)
        note._stands_for = self.type
        return note


# a pattern that counts to the limit is compiled to 13 MB
ToolName = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=MAX_NAME)]
ThinkingBudget = Annotated[int, Field(ge=0, lt=2**31)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def placed(tools: Iterable[BaseModel] | None) -> list[tuple[str, BaseModel]]:
    """Each tool behind its place in a request."""
    return [(f"tools[{n}]", tool) for n, tool in enumerate(tools or ())]


def left_out(tools: Sequence[tuple[str, BaseModel]], kind: type[BaseModel]) -> dict[str, str]:
    """The places and types of tools that are not there, beside functions, which are of this kind:
    clients send what they have, such as `web_search`, and the model goes without."""
    others = {place: tool for place, tool in tools if not isinstance(tool, kind)}
    if len(others) == len(tools):
        return {}
    return {place: str(getattr(tool, "type", None)) for place, tool in others.items()}


def tool_names(tools: Iterable[tuple[str, BaseModel]], kind: type[BaseModel]) -> dict[str, str]:
    """What the functions of a chat's tools are called where others stand among them."""
    places = [place for place, tool in tools if isinstance(tool, kind)]
    return {rf"^tools\[{i}\]\.function": place for i, place in enumerate(places)}


Content = Annotated[
    Annotated[str | None, Tag("<text>")]
    | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(kind_of_content),
]


def with_notes(content: Content) -> Content:
    """The result of a tool, with notes in the place of images and the like: an agent sends on what
    a tool has found, and would be refused from then on, since it stays in the conversation."""
    if not isinstance(content, list):
        return content
    return [part if part.type in TEXTS else part.as_note() for part in content]


def notes_in(content: Content, place: str) -> dict[str, str]:
    """The places of such notes, and the types of what they stand for."""
    parts = enumerate(content if isinstance(content, list) else ())
    return {f"{place}[{n}]": part.stands_for for n, part in parts if part.stands_for is not None}


def read_text(content: Content, place: str, model: str, kinds: Container[str] = ("text",)) -> str:
    """The text of a content, each part on a line of its own. Raises BadRequest where it has parts
    that are not of these kinds."""
    if isinstance(content, list):
        parts = enumerate(content)
        return "\n".join(part.read(f"{place}[{n}]", model, kinds) for n, part in parts)
    return content or ""


class Past(Extensible):
    """Of a past call. What may be left out may be null."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k not in cls.model_fields}


class CalledFunction(Past):
    name: str
    arguments: str | dict[str, Any] = ""


class PastCall(Past):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Said(Extensible):
    """What somebody said. An assistant's refusals are text like the rest, and of what a tool found
    there is a note where it is no text."""

    role: str
    content: Content = None

    @model_validator(mode="after")
    def _is_text(self) -> "Said":
        if self.role == "assistant" and isinstance(self.content, list):
            self.content = [part.as_text() for part in self.content]
        elif self.role == "tool" and isinstance(self.content, list):
            self.content = with_notes(self.content)
        return self


class ChatMessage(Said):
    """Other fields go to the model's template as they are."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionDefinition(Extensible):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Extensible):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Extensible):
    name: str


class NamedTool(Extensible):
    type: Literal["function"]
    function: FunctionName

    def unknown_at(self, place: str) -> Iterator[str]:
        yield from unknown_in(place, self)
        yield from unknown_in(f"{place}.function", self.function)


class AllowedSet(Extensible):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True)]


class AllowedTools(Extensible):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet

    def unknown_at(self, place: str) -> Iterator[str]:
        yield from unknown_in(place, self)
        yield from unknown_in(f"{place}.allowed_tools", self.allowed_tools)
        for n, tool in enumerate(self.allowed_tools.tools):
            yield from tool.unknown_at(f"{place}.allowed_tools.tools[{n}]")


def _choice_kind(value: Any) -> str:
    if isinstance(value, str):
        return "<mode>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<allowed>" if kind == "allowed_tools" else "<named>"


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(_choice_kind),
]


class Conversation(Extensible):
    """The fields that make the prompt."""

    # fail_fast: a million bad items must not become a million errors
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = (
        None
    )
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget_tokens: ThinkingBudget | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # such as enable_thinking
    continue_final_message: Switch = False
    add_generation_prompt: bool | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_the_templates(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in RESERVED_KWARGS & (kwargs or {}).keys():
            raise BadRequest(f"'{name}' is not for clients.", param=f"chat_template_kwargs.{name}")
        return kwargs

    def check_content(self, model: str) -> None:
        """Raise for content that is no text, and for half an instruction to continue."""
        for place, part in self.parts():
            part.read(place, model)
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls):
            raise BadRequest(
                "The last message must be the assistant's text, which is to be continued.",
                param="continue_final_message",
            )
        if self.add_generation_prompt == self.continue_final_message:
            if self.continue_final_message:
                why = "An answer is either begun or continued: not both."
            else:
                why = "Without it an answer needs `continue_final_message: true`."
            raise BadRequest(why, param="add_generation_prompt")

    def parts(self) -> Iterator[tuple[str, ContentPart]]:
        """Each part of a content that is a list, with its place."""
        for m, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for p, part in enumerate(message.content):
                    yield f"messages[{m}].content[{p}]", part

    @property
    def left_out(self) -> dict[str, str]:
        """Types by the places where they are."""
        return {
            place: part.stands_for for place, part in self.parts() if part.stands_for is not None
        }

    def unknown_inside(self) -> Iterator[str]:
        yield from super().unknown_inside()
        for place, part in self.parts():
            yield from unknown_in(place, part)
        for n, tool in enumerate(self.tools or ()):
            yield from unknown_in(f"tools[{n}]", tool)
            yield from unknown_in(f"tools[{n}].function", tool.function)
        if isinstance(self.tool_choice, NamedTool | AllowedTools):
            yield from self.tool_choice.unknown_at("tool_choice")

    def tool_list(self) -> list[Tool]:
        """The tools that the model is told of. Raises BadRequest."""
        if self.tool_choice == "none":
            return []
        tools = []
        names = set()
        for n, tool in enumerate(self.tools or ()):
            function = tool.function
            if function.name in names:
                raise BadRequest(
                    f"There are two functions '{function.name}'.", param=f"tools[{n}].function.name"
                )
            names.add(function.name)
            place = f"tools[{n}].function.parameters"
            schema = function.parameters or {"properties": {}}
            if not function.strict:
                schema = _meant(schema, place)
            schema = _of_objects(schema, place)
            part = schema_part(_closed(schema), place, is_lenient=not function.strict)
            shown = {"name": function.name, "description": function.description or ""}
            # templates ask for the properties, as for the type
            parameters = schema | {"properties": schema.get("properties", {})}
            definition = {"type": "function", "function": {**shown, "parameters": parameters}}
            tools.append(Tool(definition, part))
        return tools

    def tool_choice_of(self, tools: Iterable[Tool]) -> ToolChoice:
        """Which of these may be called now. Raises BadRequest."""
        names = frozenset(tool.name for tool in tools)
        choice = self.tool_choice
        is_parallel = self.parallel_tool_calls is not False
        if choice in (None, "auto", "none"):
            return ToolChoice(names, is_parallel=is_parallel) if names else NO_TOOLS
        if not names:
            raise BadRequest("There are no `tools` to choose from.", param="tool_choice")
        if isinstance(choice, NamedTool):
            wanted, is_required, is_parallel = [choice.function.name], True, False
        elif isinstance(choice, AllowedTools):
            wanted = [tool.function.name for tool in choice.allowed_tools.tools]
            is_required = choice.allowed_tools.mode == "required"
        else:
            wanted, is_required = list(names), True
        for name in wanted:
            if name not in names:
                raise BadRequest(f"There is no function '{name}' in `tools`.", param="tool_choice")
        return ToolChoice(frozenset(wanted), is_required, is_parallel)


class ChatRequest(Conversation, GenerationFields):
    truncate: Literal["middle"] | None = None  # leave old turns out where all are too long
    max_completion_tokens: TokenLimit | None = None
    n: OneChoice = 1
    logprobs: Switch = False
    top_logprobs: TopLogprobs | None = None

    @property
    def n_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadRequest("It is only for `logprobs: true`.", param="top_logprobs")
        return None


def _meant(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema without what is written where nothing is said: null, as by Go, and no properties
    as a list, as by PHP. Raises BadRequest."""
    try:
        meant: dict[str, Any] = _with_what_is_said(schema)
    except RecursionError:
        raise BadRequest("A schema is nested too deeply.", param=place) from None
    return meant


def _with_what_is_said(value: Any, *, is_schema: bool = True) -> Any:
    """Of a schema, or of schemas by name."""
    if isinstance(value, list):
        return [_with_what_is_said(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not is_schema:
        return {name: _with_what_is_said(inner) for name, inner in value.items()}
    said: dict[str, Any] = {}
    for key, inner in value.items():
        if key == "properties" and inner in (None, []):
            said[key] = {}
        elif isinstance(inner, (dict, list)) and key not in DATA:
            said[key] = _with_what_is_said(inner, is_schema=key not in BY_NAME)
        elif inner is not None or key in MAY_BE_NULL:
            said[key] = inner
    return said


def _of_objects(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema of arguments, which are an object whatever else it allows; templates ask for the
    type too. Raises BadRequest where it allows none."""
    type = schema.get("type", "object")
    if "object" not in (type if isinstance(type, list) else [type]):
        raise BadRequest(
            'The arguments of a function are an object: `type` must be "object" and not '
            f"{json.dumps(type):.200}.",
            param=place,
        )
    return {"type": "object"} | schema | {"type": "object"}


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without arguments that it does not name: models invent some, and functions take
    none. A schema that says something about them, or has its properties elsewhere, is as it is."""
    closed = dict(schema)
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and not SAYS_MORE & schema.keys():
        names = required if isinstance(required, list) else ()
        more = {name: True for name in names if isinstance(name, str) and name not in properties}
        closed["properties"] = properties | more  # what is only required may be anything
        closed["additionalProperties"] = False
    return closed
