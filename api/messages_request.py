"""What a client may ask of Anthropic's Messages, and the chat that it comes to."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, JsonValue, Tag

from api.chat_request import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    ChatRequest,
    Content,
    ContentPart,
    ThinkingBudget,
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
from api.sampling import StopList, TopK, UnitInterval
from api.transcript import Transcript, thoughts_in
from errors import BadRequest, UnsupportedParameter

BLOCKS = ("thinking", "redacted_thinking", "tool_use", "tool_result")  # others are text
# of a block, as it came from the service, or about what is remembered anyway
BESIDE = ("type", "cache_control", "caller")
DEFAULT_EFFORT = "medium"  # where thinking is asked for and an effort is not
# What Claude Code bills by: other words in each request, so no prompt would begin like another.
BILLING = "x-anthropic-billing-header:"


class ThinkingBlock(Extensible):
    thinking: str
    signature: str | None = None  # where they are hidden


class RedactedBlock(Extensible):
    """Thoughts that only Anthropic can read."""

    type: Literal["redacted_thinking"]


class CallBlock(Extensible):
    id: str
    name: str
    input: dict[str, JsonValue]


class ResultBlock(Extensible):
    tool_use_id: str
    content: Annotated[Content, AfterValidator(with_notes)] = None
    is_error: Switch = False


def _block_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in BLOCKS else "<part>"


Block = Annotated[
    Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedBlock, Tag("<redacted_thinking>")]
    | Annotated[CallBlock, Tag("<tool_use>")]
    | Annotated[ResultBlock, Tag("<tool_result>")]
    | Annotated[ContentPart, Tag("<part>")],
    Discriminator(_block_tag),
]


def _unknown_in_texts(place: str, content: Content) -> Iterator[str]:
    for n, part in enumerate(content if isinstance(content, list) else ()):
        yield from unknown_in(f"{place}[{n}]", part, BESIDE)


class Message(Extensible):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[
            list[Block],
            Field(min_length=1, max_length=MAX_PARTS, fail_fast=True),
            Tag("<list>"),
        ],
        Discriminator(kind_of_content),
    ]

    @property
    def is_unreadable(self) -> bool:
        blocks = self.content
        return isinstance(blocks, list) and all(isinstance(b, RedactedBlock) for b in blocks)


class ClientTool(Extensible):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Any = None


class ServerTool(Extensible):
    """Of a kind that Anthropic defines."""

    type: str
    name: str | None = None


def _tool_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return "<client>" if kind in (None, "custom") else "<server>"


ToolField = Annotated[
    Annotated[ClientTool, Tag("<client>")] | Annotated[ServerTool, Tag("<server>")],
    Discriminator(_tool_tag),
]


class ToolChoice(Extensible):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Switch = False

    def read(self) -> Any:
        """The same in a chat's fields. Raises BadRequest."""
        if self.type != "tool":
            return "required" if self.type == "any" else self.type
        if self.name is None:
            raise BadRequest("'tool_choice.name' is required.", param="tool_choice.name")
        return {"type": "function", "function": {"name": self.name}}


class Thinking(Extensible):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: ThinkingBudget | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Extensible):
    type: Literal["json_schema"]
    schema_: JsonValue = Field(alias="schema")


class OutputConfig(Extensible):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptRequest(Extensible):
    """What the model reads, with what decides how it is written."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Content = None
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the same as its `format`, as betas have it
    cache_control: Any = None  # what prompts have in common is remembered anyway

    @property
    def names(self) -> dict[str, str]:
        """What fields are called here, by what they are called in a chat."""
        has_effort = self.output_config is not None and self.output_config.effort is not None
        return {
            r"^continue_final_message$": "messages",
            r"^response_format.*": "output_format"
            if self.output_format
            else "output_config.format",
            r"^reasoning_effort$": "output_config.effort" if has_effort else "thinking",
            r"^thinking_budget_tokens$": "thinking.budget_tokens",
            r"\.function\.parameters": ".function.input_schema",
            **tool_names(placed(self.tools), ClientTool),
        }

    @property
    def hides_thoughts(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def left_out(self) -> dict[str, str]:
        """Types by the places where they are."""
        unread: dict[str, str] = {}
        for place, block in self._blocks():
            if isinstance(block, RedactedBlock):
                unread[place] = block.type
            elif isinstance(block, ResultBlock):
                unread |= notes_in(block.content, f"{place}.content")
        return self._tools_left_out | unread

    @property
    def _tools_left_out(self) -> dict[str, str]:
        return left_out(placed(self.tools), ClientTool)

    def _blocks(self) -> Iterator[tuple[str, Block]]:
        """Each block of a message, with its place."""
        for n, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for b, block in enumerate(message.content):
                    yield f"messages[{n}].content[{b}]", block

    def unknown_inside(self) -> Iterator[str]:
        wanted = self.output_config
        yield from unknown_in("tool_choice", self.tool_choice)
        yield from unknown_in("thinking", self.thinking)
        yield from unknown_in("output_config", wanted)
        yield from unknown_in("output_config.format", wanted and wanted.format)
        yield from unknown_in("output_format", self.output_format)
        for place, tool in placed(self.tools):
            if isinstance(tool, ClientTool):
                yield from unknown_in(place, tool)
        yield from _unknown_in_texts("system", self.system)
        for n, message in enumerate(self.messages):
            yield from unknown_in(f"messages[{n}]", message)
        for place, block in self._blocks():
            if not isinstance(block, RedactedBlock):  # of which nothing is read
                yield from unknown_in(place, block, BESIDE)
            if isinstance(block, ResultBlock):
                yield from _unknown_in_texts(f"{place}.content", block.content)

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises BadRequest."""
        return ChatRequest.model_validate(self._fields())

    def _fields(self) -> dict[str, Any]:
        if all(message.is_unreadable for message in self.messages):
            raise BadRequest("There is nothing in it that can be read.", param="messages")
        messages = self._messages()
        choice = self.tool_choice
        wanted = self.output_config and self.output_config.format
        if wanted and self.output_format:
            raise BadRequest(
                "It is `output_config.format`: send one of them.", param="output_format"
            )
        wanted = wanted or self.output_format
        schema = wanted and {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": messages[-1]["role"] == "assistant",
            "tools": [{"type": "function", "function": tool} for tool in self._tools()],
            "tool_choice": choice and choice.read(),
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            "response_format": schema,
            **self._thinking(),
        }

    def _messages(self) -> list[dict[str, Any]]:
        transcript = Transcript()
        for n, part in enumerate(self.system if isinstance(self.system, list) else ()):
            text = part.read(f"system[{n}]", self.model)
            if not text.startswith(BILLING):
                transcript.text("system", text, between="")
        if self.system and isinstance(self.system, str):
            transcript.text("system", self.system)
        for n, message in enumerate(self.messages):
            if isinstance(message.content, str):
                transcript.text(message.role, message.content)
                continue
            between = "\n\n"
            for b, block in enumerate(message.content):
                place = f"messages[{n}].content[{b}]"
                if isinstance(block, ContentPart):
                    text = block.read(place, self.model)
                    transcript.text(message.role, text, between=between)
                    between = ""  # blocks of one message are one text
                elif isinstance(block, ThinkingBlock):
                    hidden = "" if block.thinking else thoughts_in(block.signature or "")
                    transcript.thoughts(block.thinking or hidden or "")
                elif isinstance(block, CallBlock):
                    transcript.call(block.id, block.name, block.input)
                elif isinstance(block, ResultBlock):
                    text = read_text(block.content, f"{place}.content", self.model)
                    if block.is_error:  # templates know no other way
                        text = f"Error: {text}"
                    transcript.result(block.tool_use_id, text)
        return transcript.messages

    def _tools(self) -> Iterator[dict[str, Any]]:
        for n, tool in enumerate(self.tools or ()):
            if isinstance(tool, ClientTool):
                definition = tool.model_dump(include={"name", "description", "strict"})
                yield definition | {"parameters": tool.input_schema}
            elif not self._tools_left_out:
                raise UnsupportedParameter(
                    f"The tool '{tool.name or tool.type}' is not there: only tools with an "
                    "'input_schema' are supported.",
                    param=f"tools[{n}].type",
                )

    def _thinking(self) -> dict[str, Any]:
        asked, effort = self.thinking, self.output_config and self.output_config.effort
        if asked is None or asked.type == "adaptive":
            return {"reasoning_effort": effort}
        if asked.type == "disabled":
            return {"reasoning_effort": "none"}
        if asked.budget_tokens is None:
            raise BadRequest(
                "'thinking.budget_tokens' is required.", param="thinking.budget_tokens"
            )
        return {
            "reasoning_effort": effort or DEFAULT_EFFORT,
            "thinking_budget_tokens": asked.budget_tokens,
        }


class MessagesRequest(PromptRequest):
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    stop_sequences: StopList | None = None
    temperature: UnitInterval | None = None
    top_p: UnitInterval | None = None
    top_k: TopK | None = None
    stream: Switch = False
    service_tier: Literal["auto", "standard_only"] | None = None
    keep_alive: KeepAlive | None = None

    def _fields(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream", "keep_alive")
        own = {name: getattr(self, name) for name in names}
        return super()._fields() | own | {"stop": self.stop_sequences}
