"""What a client may ask of OpenAI's Responses, and the chat that it comes to."""

from collections.abc import Container, Iterator
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    model_validator,
)

from api.chat_request import (
    MAX_MESSAGES,
    MAX_NAME,
    MAX_PARTS,
    MAX_TOOLS,
    THOUGHTS,
    ChatRequest,
    Content,
    ContentPart,
    Effort,
    FunctionDefinition,
    FunctionName,
    Said,
    ToolName,
    left_out,
    notes_in,
    placed,
    read_text,
    tool_names,
    with_notes,
)
from api.fields import Extensible, Switch, kind_of_content, unknown_in
from api.keep_alive import KeepAlive
from api.sampling import (
    ServiceTier,
    StreamOptions,
    Temperature,
    TokenLimit,
    TopLogprobs,
    UnitInterval,
)
from api.transcript import Transcript, thoughts_in
from errors import BadRequest, UnsupportedParameter

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
# of items that there are none of; clients ask for them where they bring such a tool
ABOUT_OTHERS = (
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results", "message.input_image.image_url", "web_search_call.action.sources",
    "web_search_call.results",
)  # fmt: skip
# of an item and of its parts, as they came from the service
BESIDE = ("type", "id", "status", "phase", "caller", "name", "namespace", "async")
BESIDE_TEXT = ("annotations", "logprobs")
MESSAGE_TEXT = ("input_text", "output_text", "text")

# fields that are the same in a chat
SAME = ("model", "stream", "stream_options", "temperature", "top_p", "top_logprobs",
        "parallel_tool_calls", "service_tier", "keep_alive")  # fmt: skip
# what the others are called here, by what they are called in a chat
NAMES = {
    r"^messages": "input",
    r"^reasoning_effort$": "reasoning.effort",
    r"^response_format(\.json_schema)?": "text.format",
}


Parts = Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(Said):
    texts: ClassVar = ("content",)  # fields that may be parts
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class ReasoningItem(Extensible):
    texts: ClassVar = ("summary", "content")
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: str | None = None


class CallItem(Extensible):
    texts: ClassVar = ()
    call_id: str
    namespace: str | None = None
    name: str
    arguments: str


class ResultItem(Extensible):
    texts: ClassVar = ("output",)
    call_id: str
    output: Annotated[Content, AfterValidator(with_notes)]


class Other(Extensible):
    """An item, a tool or a choice of a kind that is not supported."""

    type: str | None = None


class FunctionTool(FunctionDefinition):
    type: Literal["function"]


class ChosenFunction(FunctionName):
    type: Literal["function"]
    namespace: str | None = None


class AllowedFunctions(Extensible):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)
    ]


def _tag(value: Any, kinds: Container[str]) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in kinds else "<other>"


def _item_tag(value: Any) -> str:
    if isinstance(value, dict) and "role" in value and value.get("type") is None:
        return "<message>"
    return _tag(value, ("message", "reasoning", "function_call", "function_call_output"))


def _tool_tag(value: Any) -> str:
    return _tag(value, ("function", "namespace"))


def _inner_tool_tag(value: Any) -> str:
    return _tag(value, ("function",))


def _choice_tag(value: Any) -> str:
    return "<mode>" if isinstance(value, str) else _tag(value, ("function", "allowed_tools"))


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[ResultItem, Tag("<function_call_output>")]
    | Annotated[Other, Tag("<other>")],
    Discriminator(_item_tag),
]
InnerTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[Other, Tag("<other>")],
    Discriminator(_inner_tool_tag),
]


class NamespaceTool(Extensible):
    """Functions that are called by its name and their own, such as those of an MCP server."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[InnerTool], Field(max_length=MAX_TOOLS, fail_fast=True)]

    @model_validator(mode="after")
    def _names_fit(self) -> "NamespaceTool":
        for tool in self.functions:
            n = len(one_name(self.name, tool.name))
            if n > MAX_NAME:
                raise ValueError(
                    f"With its namespace the name of '{tool.name}' has {n} characters; there may "
                    f"be {MAX_NAME}."
                )
        return self

    @property
    def functions(self) -> list[FunctionTool]:
        return [tool for tool in self.tools if isinstance(tool, FunctionTool)]

    def shown(self) -> Iterator[FunctionTool | Other]:
        """Its tools as the model is told of them, the first function with what all are about."""
        about = self.description
        for tool in self.tools:
            if isinstance(tool, FunctionTool):
                name = one_name(self.name, tool.name)
                description = "\n\n".join(filter(None, (about, tool.description)))
                yield tool.model_copy(update={"name": name, "description": description})
                about = None
            else:
                yield tool


def one_name(namespace: str | None, name: str) -> str:
    """What the model calls a function of a namespace; of those of MCP servers, `mcp__x__`, it is
    the name that agents give them where there are no namespaces."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith("_") else f"{namespace}__{name}"


ToolField = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[Other, Tag("<other>")],
    Discriminator(_tool_tag),
]


def _not_too_many(tools: list[ToolField]) -> list[ToolField]:
    n = sum(len(tool.tools) if isinstance(tool, NamespaceTool) else 1 for tool in tools)
    if n > MAX_TOOLS:
        raise ValueError(f"There are {n} tools, in namespaces or not; there may be {MAX_TOOLS}.")
    return tools


ChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[ChosenFunction, Tag("<function>")]
    | Annotated[AllowedFunctions, Tag("<allowed_tools>")]
    | Annotated[Other, Tag("<other>")],
    Discriminator(_choice_tag),
]


Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[
        list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("<list>")
    ],
    Discriminator(kind_of_content),
]


class TextFormat(Extensible):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema_: JsonValue = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Extensible):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Extensible):
    effort: Effort | None = None


class ResponsesRequest(Extensible):
    model: str
    input: Input
    instructions: str | None = None
    tools: (
        Annotated[
            list[ToolField],
            Field(max_length=MAX_TOOLS, fail_fast=True),
            AfterValidator(_not_too_many),
        ]
        | None
    ) = None
    tool_choice: ChoiceField | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: TokenLimit | None = None
    max_tool_calls: int | None = None  # of the service's own tools, which it does not have
    temperature: Temperature | None = None
    top_p: UnitInterval | None = None
    top_logprobs: TopLogprobs | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    stream: Switch = False
    stream_options: StreamOptions | None = None
    service_tier: ServiceTier | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Any = None
    keep_alive: KeepAlive | None = None

    @property
    def format(self) -> TextFormat | None:
        return self.text.format if self.text else None

    @property
    def ignored(self) -> list[str]:
        """What it asks for and does not get."""
        asked = enumerate(self.include or ())
        there = (LOGPROBS, ENCRYPTED_REASONING)
        return [f"include[{n}]" for n, what in asked if what not in there]

    @property
    def packs_thoughts(self) -> bool:
        return ENCRYPTED_REASONING in (self.include or ())

    @property
    def names(self) -> dict[str, str]:
        """What fields are called here, by what they are called in a chat."""
        return NAMES | tool_names(self._placed, FunctionTool)

    @property
    def left_out(self) -> dict[str, str]:
        notes: dict[str, str] = {}
        for n, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(item, ResultItem):
                notes |= notes_in(item.output, f"input[{n}].output")
        return self._tools_left_out | notes

    @property
    def _tools_left_out(self) -> dict[str, str]:
        return left_out(self._placed, FunctionTool)

    @cached_property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """The namespace of each function that has one and its name there, by what the model calls
        it."""
        spaces = [tool for tool in self.tools or () if isinstance(tool, NamespaceTool)]
        return {
            one_name(space.name, tool.name): (space.name, tool.name)
            for space in spaces
            for tool in space.functions
        }

    @cached_property
    def _by_inner_name(self) -> dict[str, list[str]]:
        """What the model calls the functions that have a name in their namespaces."""
        found: dict[str, list[str]] = {}
        for name, (_, inner) in self.namespaces.items():
            found.setdefault(inner, []).append(name)
        return found

    @cached_property
    def _functions(self) -> set[str]:
        """What the model calls them."""
        return {tool.name for _, tool in self._placed if isinstance(tool, FunctionTool)}

    @cached_property
    def _placed(self) -> list[tuple[str, BaseModel]]:
        """Each tool behind its place, as the model is told of it."""
        tools: list[tuple[str, BaseModel]] = []
        for place, tool in placed(self.tools):
            if isinstance(tool, NamespaceTool):
                tools += ((f"{place}.{inner}", one) for inner, one in placed(tool.shown()))
            else:
                tools.append((place, tool))
        return tools

    def unknown_inside(self) -> Iterator[str]:
        yield from unknown_in("stream_options", self.stream_options)
        yield from unknown_in("text", self.text)
        yield from unknown_in("text.format", self.format)
        yield from unknown_in("reasoning", self.reasoning)
        for place, tool in placed(self.tools):
            if isinstance(tool, NamespaceTool):
                yield from unknown_in(place, tool)
        for place, tool in self._placed:
            if isinstance(tool, FunctionTool):
                yield from unknown_in(place, tool)
        choice = self.tool_choice
        if isinstance(choice, ChosenFunction | AllowedFunctions):
            yield from unknown_in("tool_choice", choice)
        for n, one in enumerate(choice.tools if isinstance(choice, AllowedFunctions) else ()):
            yield from unknown_in(f"tool_choice.tools[{n}]", one)
        for n, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(item, Other):  # which is refused
                continue
            yield from unknown_in(f"input[{n}]", item, BESIDE)
            for name in item.texts:
                parts = getattr(item, name)
                for p, part in enumerate(parts if isinstance(parts, list) else ()):
                    yield from unknown_in(f"input[{n}].{name}[{p}]", part, BESIDE_TEXT)

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises BadRequest."""
        self._check()
        return ChatRequest.model_validate(
            {name: getattr(self, name) for name in SAME}
            | {
                "messages": self._messages(),
                "max_completion_tokens": self.max_output_tokens,
                "logprobs": LOGPROBS in (self.include or ()),
                "tools": [{"type": "function", "function": tool} for tool in self._tools()],
                "tool_choice": self._tool_choice(),
                "response_format": self._response_format(),
                "reasoning_effort": self.reasoning and self.reasoning.effort,
                "truncate": "middle" if self.truncation == "auto" else None,
            }
        )

    def _check(self) -> None:
        for n, what in enumerate(self.include or ()):
            if what not in (LOGPROBS, ENCRYPTED_REASONING, *ABOUT_OTHERS):
                raise UnsupportedParameter(
                    f"There is no '{what}' in a response here.", param=f"include[{n}]"
                )
        if self.text and self.text.verbosity not in (None, "medium"):
            raise UnsupportedParameter(
                "How much a model writes cannot be set; ask it in words.", param="text.verbosity"
            )
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise BadRequest(f"It is only for `include: ['{LOGPROBS}']`.", param="top_logprobs")

    def _messages(self) -> list[dict[str, Any]]:
        transcript = Transcript()
        if self.instructions:
            transcript.text("system", self.instructions)
        if isinstance(self.input, str):
            transcript.text("user", self.input)
        else:
            for n, item in enumerate(self.input):
                self._add(transcript, item, f"input[{n}]")
        return transcript.messages

    def _add(self, transcript: Transcript, item: Item, place: str) -> None:
        def text(content: Content, name: str, kinds: Container[str] = MESSAGE_TEXT) -> str:
            return read_text(content, f"{place}.{name}", self.model, kinds)

        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            transcript.text(role, text(item.content, "content"))
        elif isinstance(item, CallItem):
            name = one_name(item.namespace, item.name)
            transcript.call(item.call_id, name, item.arguments)
        elif isinstance(item, ResultItem):
            transcript.result(item.call_id, text(item.output, "output"))
        elif isinstance(item, ReasoningItem):
            packed = None if item.content else thoughts_in(item.encrypted_content or "")
            name = "content" if item.content else "summary"
            transcript.thoughts(packed or text(getattr(item, name), name, THOUGHTS))
        else:
            kind = item.type or "item_reference"
            message = f"Items of type '{kind}' are not supported."
            if kind == "item_reference":
                message = (
                    "Nothing is kept here: send the item itself (Vercel's AI SDK: store: false)."
                )
            raise UnsupportedParameter(message, param=f"{place}.type")

    def _tools(self) -> Iterator[dict[str, Any]]:
        for place, tool in self._placed:
            if isinstance(tool, FunctionTool):
                yield tool.model_dump(include=set(FunctionDefinition.model_fields))
            elif isinstance(tool, Other) and not self._tools_left_out:
                raise UnsupportedParameter(
                    f"Tools of type '{tool.type}' are not supported: only functions.",
                    param=f"{place}.type",
                )

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, Other):
            raise UnsupportedParameter(
                f"Tools of type '{choice.type}' are not supported: only functions.",
                param="tool_choice.type",
            )
        if isinstance(choice, ChosenFunction):
            return self._named(choice)
        if isinstance(choice, AllowedFunctions):
            allowed = {"mode": choice.mode, "tools": [self._named(tool) for tool in choice.tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        return choice

    def _named(self, choice: ChosenFunction) -> dict[str, Any]:
        """A choice by what the model calls it. The namespace may be left out where the function's
        name is that of no other. Raises BadRequest."""
        name = one_name(choice.namespace, choice.name)
        if not choice.namespace and name not in self._functions:
            same = self._by_inner_name.get(name, [])
            if len(same) > 1:
                raise BadRequest(
                    f"Several functions are called '{name}': name its `namespace` too.",
                    param="tool_choice",
                )
            name = same[0] if same else name
        return {"type": "function", "function": {"name": name}}

    def _response_format(self) -> Any:
        wanted = self.format
        if wanted is None or wanted.type != "json_schema":
            return wanted and {"type": wanted.type}
        schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
        return {"type": "json_schema", "json_schema": schema}
