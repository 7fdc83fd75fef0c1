"""How the families chat: templates of their shapes, the tokens they have for it, conversations."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from chat.events import Event, Message
from chat.format import ChatFormat, Prompt, ToolChoice
from chat.tools.base import Tool
from engine.model_file import ModelFile
from engine.wire import GrammarPart

TEMPLATES = Path(__file__).parent / "templates"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MISTRAL_TOKENS = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]",
)  # fmt: skip
KIMI_MARKS = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
# by the name of the template
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "qwen2_5": (*CHATML_TOKENS, "<tool_call>", "</tool_call>"),
    "qwen3": (*CHATML_TOKENS, "<tool_call>", "</tool_call>", "<think>", "</think>"),
    "qwen3_coder": (*CHATML_TOKENS, "<tool_call>", "</tool_call>", "<think>", "</think>"),
    "glm": (
        "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
        "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
        "<think>", "</think>",
    ),
    "seed_oss": (
        "<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>", "<seed:tool_call>",
        "</seed:tool_call>",
    ),
    "minimax_m2": (
        "]~b]", "[e~[", "<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>",
    ),
    "minicpm5": (
        *CHATML_TOKENS, "<think>", "</think>", "<function", "</function>", "<param", "</param>",
    ),
    "kimi_k2": (
        "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>",
        "<think>", "</think>", *KIMI_MARKS,
    ),
    "deepseek_v3_1": (
        "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>",
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    "llama3_1": (
        "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>",
    ),
    "mistral_v3": MISTRAL_TOKENS,
    "mistral_v11": (
        *MISTRAL_TOKENS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[CALL_ID]",
        "[ARGS]",
    ),
    "gpt_oss": (
        "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>",
        "<|return|>",
    ),
    "gemma4": (
        "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>",
        "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    ),
    "lfm2": (
        *CHATML_TOKENS, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
        "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>",
    ),
    "granite3": (
        "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>",
    ),
    "phi4_mini": (
        "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>",
        "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>",
    ),
    "nemotron2": (
        "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<think>", "</think>", "<TOOLCALL>",
        "</TOOLCALL>", "<AVAILABLE_TOOLS>", "</AVAILABLE_TOOLS>", "<TOOL_RESPONSE>",
        "</TOOL_RESPONSE>",
    ),
    "apriel": (
        "<s>", "</s>", "<|begin_system|>", "<|begin_user|>", "<|begin_assistant|>",
        "<|begin_tool_result|>", "<|end|>", "<tool_calls>", "</tool_calls>",
        "[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]",
    ),
    "command": (
        "<s>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>",
        "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>",
        "<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>",
        "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    ),
    "smollm2": CHATML_TOKENS,
    "deepseek_r1": ("<s>", "</s>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
}  # fmt: skip
NAMES = tuple(CONTROL_TOKENS)


@cache
def chat_format(
    template: str, tool_format: str = "auto", *, tool_template: str | None = None
) -> ChatFormat:
    """By the name of a template, or by its text."""
    source, tokens = template, ("<s>", "</s>")
    if template in CONTROL_TOKENS:
        source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        tokens = CONTROL_TOKENS[template]
    model = ModelFile(
        path=Path("model.gguf"),
        size_bytes=1,
        architecture="llama",
        name="model",
        n_ctx_train=1,
        n_layer=1,
        n_embd=1,
        n_vocab=3,
        max_token_bytes=16,
        kv_bytes_per_token=1,
        chat_template=source,
        bos_token="<s>",
        eos_token="</s>",
        add_bos=False,
        control_tokens=tokens,
        kind="chat",
        tool_template=tool_template,
    )
    return ChatFormat(model, tool_format)


def tool(
    name: str, *required: str, schema: Mapping[str, Any] | None = None, is_strict: bool = False
) -> Tool:
    """A function whose arguments are texts, or as the schema says."""
    schema = schema or {
        "type": "object",
        "properties": {argument: {"type": "string"} for argument in required},
        "required": list(required),
        "additionalProperties": False,
    }
    parameters = {"properties": {}, **schema}  # as over HTTP
    function = {"name": name, "description": f"What {name} does", "parameters": parameters}
    part = GrammarPart("json_schema", json.dumps(schema), "tools", is_lenient=not is_strict)
    return Tool({"type": "function", "function": function}, part)


WEATHER, TIME = tool("get_weather", "city"), tool("get_time", "city")
TOOLS = (WEATHER, TIME)

Messages = list[dict[str, Any]]


def system(text: str) -> Messages:
    return [{"role": "system", "content": text}]


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def assistant(text: str | None = None, *calls: tuple[str, str, str], **fields: Any) -> Messages:
    """Calls as their ids, names and arguments."""
    message: dict[str, Any] = {"role": "assistant", "content": text} | fields
    if calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in calls
        ]
    return [message]


def result(id: str, text: str) -> Messages:
    return [{"role": "tool", "tool_call_id": id, "content": text}]


ONE_CALL = (
    *user("Weather?"),
    *assistant(None, ("call_1", "get_weather", '{"city": "Paris"}')),
    *result("call_1", "rain"),
)
TWO_CALLS = (
    *system("Be brief."),
    *user("Weather?"),
    *assistant(
        None,
        ("call_1", "get_weather", '{"city": "Paris"}'),
        ("call_2", "get_time", '{"city": "Rome"}'),
    ),
    *result("call_1", "rain"),
    *result("call_2", "noon"),
    *assistant("Rain at noon."),
    *user("Thanks"),
)


def choose(tools: Sequence[Tool], **fields: bool) -> ToolChoice:
    return ToolChoice(frozenset(tool.name for tool in tools), **fields)


def prompt(
    template: str | ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool] = (),
    **fields: Any,
) -> Prompt:
    """What a format makes of a conversation; all tools may be called, if there is no `choice`."""
    format = chat_format(template) if isinstance(template, str) else template
    fields = {"choice": choose(tools), "now": datetime(2024, 7, 26)} | fields
    return format.prompt(messages, tools=tools, **fields)


def text(of: Prompt) -> str:
    return "".join(segment.text for segment in of.segments)


def message_of(events: Iterable[Event]) -> Message:
    message = Message()
    for event in events:
        message.add(event)
    return message
