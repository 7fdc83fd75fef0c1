"""How the families of models are told of tools, calls and thoughts."""

import json
import re
from collections import Counter
from typing import Any

import pytest

from chat.events import Call, Message
from chat.format import NO_TOOLS, ToolChoice
from chat.tools import BY_NAME, FAMILIES
from engine.wire import GrammarPart
from errors import BadRequest, ModelLoadFailed, UnsupportedParameter
from tests.chat_formats import (
    CONTROL_TOKENS,
    NAMES,
    ONE_CALL,
    TEMPLATES,
    TIME,
    TOOLS,
    TWO_CALLS,
    WEATHER,
    assistant,
    chat_format,
    choose,
    message_of,
    prompt,
    result,
    system,
    text,
    tool,
    user,
)

ANSWER = GrammarPart("json_schema", '{"type": "object"}', "response_format")
LISTED = '[{"name": "get_time", "arguments": {}}]'
NUMBERED = '[\n    {"tool_call_id": "0", "tool_name": "get_time", "parameters": {}}\n]'
THINKING = ("qwen3", "gpt_oss", "deepseek_r1")
NOT_JSON = ("qwen3_coder", "seed_oss", "minimax_m2", "minicpm5", "glm", "gemma4")  # their arguments
ALSO_THINKING = ("qwen3_coder", "seed_oss", "minimax_m2", "minicpm5", "glm", "gemma4", "kimi_k2",
                 "deepseek_v3_1", "granite3", "nemotron2", "apriel", "command")  # fmt: skip


# which family a template is of


def family_of(source: str) -> str:
    return next(family for family in FAMILIES if family.fits(source)).name


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_coder", "qwen3-coder"),
        ("seed_oss", "seed-oss"),
        ("minimax_m2", "minimax-m2"),
        ("minicpm5", "minicpm5"),
        ("glm", "glm"),
        ("gemma4", "gemma4"),
        ("kimi_k2", "kimi-k2"),
        ("deepseek_v3_1", "deepseek-v3.1"),
        ("lfm2", "lfm2"),
        ("granite3", "granite3"),
        ("phi4_mini", "phi4-mini"),
        ("nemotron2", "nemotron2"),
        ("apriel", "apriel"),
        ("command", "command"),
        ("llama3_1", "llama3"),
        ("mistral_v3", "mistral"),
        ("mistral_v11", "mistral-v11"),
        ("gpt_oss", "harmony"),
        ("smollm2", "generic"),
        ("deepseek_r1", "generic"),
    ],
)
def test_a_family_is_known_by_its_template(template: str, family: str) -> None:
    assert family_of((TEMPLATES / f"{template}.jinja").read_text()) == family


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{{ ns_token ~ '<tool_call>' }}{{ '<invoke name=\"' + name + '\">' }}",
        "{{ 'use <tool_call></tool_call>: <tool_calls>\n{\"name\": ' }}",
        "{% set tools = [] %}{{ '<|START_ACTION|>[]<|END_ACTION|>' }}{{ '<|START_RESPONSE|>' }}",
        "{{ '<function=' + name + '>' }}{{ '<|python_tag|>' }}",
        "{{ '<|channel>thought\n<channel|>' }}",
    ],
)
def test_who_calls_in_another_way_is_told_how_in_the_system_text(source: str) -> None:
    assert family_of(source) == "generic"


def test_the_marks_around_answers_tell_one_family_of_cohere_from_the_other() -> None:
    source = "{{ '<|START_ACTION|>[' }}{{ '<|START_TEXT|>' + messages[0].content }}"
    assert family_of(source) == "north"
    splitter = prompt(source, ONE_CALL).splitter()
    said = [*splitter.feed("<|START_TEXT|>Rain.<|END_TEXT|>"), *splitter.finish()]
    assert message_of(said) == Message("Rain.")


def test_a_template_for_tools_is_taken_where_there_are_tools() -> None:
    default = "{{ messages[0].content }} alone"
    with_tools = "{% for tool in tools %}<tool_call>{{ tool.function.name }}{% endfor %}"
    with_tools += "{{ messages[0].content }}"
    format = chat_format(default, tool_template=with_tools)
    assert text(prompt(format, user("Hi"))) == "Hi alone"
    made = prompt(format, user("Hi"), TOOLS)
    assert text(made) == "<tool_call>get_weather<tool_call>get_timeHi"
    assert made.visible == ["<tool_call>", "</tool_call>"]
    for other in (
        chat_format(default, "generic", tool_template=with_tools),
        chat_format(default, tool_template="{{ messages[0].content }}, in a form of its own"),
    ):
        assert text(prompt(other, user("Hi"), TOOLS)) == f"{INSTRUCTIONS}\n\nHi alone"


def test_a_family_is_chosen_for_the_template_that_shows_tools() -> None:
    raises = "<tool_call>{% if tools %}{{ raise_exception('No.') }}{% endif %}"
    format = chat_format("{{ messages[0].content }} alone", "hermes", tool_template=raises)
    assert text(prompt(format, user("Hi"), TOOLS)) == f"{INSTRUCTIONS}\n\nHi alone"


def test_where_the_template_for_tools_fails_the_default_one_has_to_do() -> None:
    raises = "{{ raise_exception('No.') }}"
    default = chat_format("{{ messages[0].content }} alone")
    for broken in (
        f"<tool_call>{{% if tools %}}{raises}{{% endif %}}",
        "<tool_call>{% if",
        "<tool_call>",
    ):
        format = chat_format("{{ messages[0].content }} alone", tool_template=broken)
        for tools in ((), TOOLS):
            assert text(prompt(format, user("Hi"), tools)) == text(
                prompt(default, user("Hi"), tools)
            )


def test_a_family_may_be_chosen_by_name() -> None:
    for name in BY_NAME:
        raw = {"llama3": '{"name": "get_time", "parameters": {}}',
               "harmony": "<|channel|>commentary to=functions.get_time<|message|>{}",
               "mistral": '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}]',
               "mistral-v11": "[TOOL_CALLS]get_time[ARGS]{}",
               "qwen3-coder": "<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
               "seed-oss": "<seed:tool_call>\n<function=get_time>\n</function>\n</seed:tool_call>",
               "minimax-m2": '<minimax:tool_call>\n<invoke name="get_time">\n</invoke>\n'
                             "</minimax:tool_call>",
               "minicpm5": '<function name="get_time"></function>',
               "glm": "<tool_call>get_time</tool_call>",
               "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0"
                          "<|tool_call_argument_begin|>{}<|tool_call_end|>"
                          "<|tool_calls_section_end|>",
               "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_time"
                                "<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
               "gemma4": "<|tool_call>call:get_time{}<tool_call|>",
               "lfm2": f"<|tool_call_start|>{LISTED}<|tool_call_end|>",
               "granite3": f"<|tool_call|>{LISTED}",
               "phi4-mini": f"<|tool_call|>{LISTED}<|/tool_call|>",
               "nemotron2": f"<TOOLCALL>{LISTED}</TOOLCALL>",
               "apriel": f"<tool_calls>{LISTED}</tool_calls>",
               "command": f"<|START_ACTION|>{NUMBERED}<|END_ACTION|>",
               "north": f"<|START_ACTION|>{NUMBERED}<|END_ACTION|>"}  # fmt: skip
        hermes = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
        splitter = prompt(chat_format("smollm2", name), ONE_CALL, TOOLS).splitter()
        message = message_of([*splitter.feed(raw.get(name, hermes)), *splitter.finish()])
        assert message.calls == [Call("get_time", "{}")]


@pytest.mark.parametrize(
    ("source", "tags"),
    [
        ("", None),
        ("{# <think> #}", None),
        ("{# </think> #}", ("<think>", "</think>")),
        ("{# [/THINK] #}", ("[THINK]", "[/THINK]")),
        ("{# </thinking> #}", ("<thinking>", "</thinking>")),
        ("{# <|END_THINKING|> #}", ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("{# </seed:think> #}", ("<seed:think>", "</seed:think>")),
        ("{# <|tool_call>call: <channel|> #}", ("<|channel>", "<channel|>")),
        ("{# <|tool_call>call: #}", None),
        (
            "{# <tool_calls>[ </thinking> [BEGIN FINAL RESPONSE] #}",
            ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
        ),
        (
            "{# Here is my response: #}",
            ("Here is my thought process:", "Here is my response:"),
        ),
        ("{# <|channel|> <|message|> #}", ("<|channel|>analysis<|message|>", "<|end|>")),
    ],
)
def test_thoughts_are_known_by_the_tag_that_ends_them(
    source: str, tags: tuple[str, str] | None
) -> None:
    thinking = prompt(f"{source}{{{{ messages[0].content }}}}", user("Hi")).thinking
    assert (thinking and (thinking.open, thinking.close)) == tags


# conversations with tools

WEATHER_LINE, TIME_LINE = (json.dumps(tool.definition["function"]) for tool in TOOLS)
INSTRUCTIONS = f"""\
You can call functions. Here are their descriptions, one JSON object a line:
{WEATHER_LINE}
{TIME_LINE}

To call one, write its name and its arguments as JSON between these tags:
<tool_call>
{{"name": "the_name", "arguments": {{"an_argument": "its value"}}}}
</tool_call>
The results come back between <tool_response> tags. Without need of a function just answer."""


def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    assert (
        text(prompt("smollm2", TWO_CALLS, TOOLS))
        == f"""\
<|im_start|>system
Be brief.

{INSTRUCTIONS}<|im_end|>
<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
<tool_call>
{{"name": "get_weather", "arguments": {{"city": "Paris"}}}}
</tool_call>
<tool_call>
{{"name": "get_time", "arguments": {{"city": "Rome"}}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response>
<tool_response>
noon
</tool_response><|im_end|>
<|im_start|>assistant
Rain at noon.<|im_end|>
<|im_start|>user
Thanks<|im_end|>
<|im_start|>assistant
"""
    )


def test_instructions_are_a_system_turn_where_there_is_none() -> None:
    begun = f"<|im_start|>system\n{INSTRUCTIONS}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert text(prompt("smollm2", user("Hi"), TOOLS)).startswith(begun)
    assert INSTRUCTIONS not in text(prompt("smollm2", ONE_CALL))


def tagged(name: str, city: str) -> str:
    return f"<function={name}>\n<parameter=city>\n{city}\n</parameter>\n</function>"


# what comes behind the first question
TURNS = {
    "qwen2_5": """<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "get_time", "arguments": {"city": "Rome"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response>
<tool_response>
noon
</tool_response><|im_end|>
<|im_start|>assistant
Rain at noon.<|im_end|>
<|im_start|>user
Thanks<|im_end|>
<|im_start|>assistant
""",
    "llama3_1": """<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>\
<|start_header_id|>ipython<|end_header_id|>

"rain"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "get_time", "parameters": {"city": "Rome"}}<|eot_id|>\
<|start_header_id|>ipython<|end_header_id|>

"noon"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Rain at noon.<|eot_id|><|start_header_id|>user<|end_header_id|>

Thanks<|eot_id|><|start_header_id|>assistant<|end_header_id|>

""",
    "mistral_v11": '[/INST][TOOL_CALLS]get_weather[CALL_ID]74196fe72[ARGS]{"city": "Paris"}'
    '[TOOL_CALLS]get_time[CALL_ID]1b68f83fa[ARGS]{"city": "Rome"}</s>'
    "[TOOL_RESULTS]74196fe72[TOOL_CONTENT]rain[/TOOL_RESULTS]"
    "[TOOL_RESULTS]1b68f83fa[TOOL_CONTENT]noon[/TOOL_RESULTS]"
    "Rain at noon.</s>[INST]Thanks[/INST]",
    "glm": "<|assistant|></think><tool_call>get_weather<arg_key>city</arg_key>"
    "<arg_value>Paris</arg_value></tool_call><tool_call>get_time<arg_key>city</arg_key>"
    "<arg_value>Rome</arg_value></tool_call><|observation|><tool_response>rain</tool_response>"
    "<tool_response>noon</tool_response><|assistant|></think>Rain at noon.<|user|>Thanks"
    "<|assistant|><think>",
    "seed_oss": """<seed:eos><seed:bos>assistant
<seed:tool_call>
<function=get_weather>
<parameter=city>Paris</parameter>
</function>
</seed:tool_call>
<seed:tool_call>
<function=get_time>
<parameter=city>Rome</parameter>
</function>
</seed:tool_call><seed:eos><seed:bos>tool
rain<seed:eos><seed:bos>tool
noon<seed:eos><seed:bos>assistant
Rain at noon.<seed:eos><seed:bos>user
Thanks<seed:eos><seed:bos>assistant
""",
    "minimax_m2": """[e~[
]~b]ai

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Paris</parameter>
</invoke>
<invoke name="get_time">
<parameter name="city">Rome</parameter>
</invoke>
</minimax:tool_call>[e~[
]~b]tool
<response>rain</response>
<response>noon</response>[e~[
]~b]ai
Rain at noon.[e~[
]~b]user
Thanks[e~[
]~b]ai
<think>
""",
    "minicpm5": """<|im_end|>
<|im_start|>assistant
<function name="get_weather"><param name="city">Paris</param></function>
<function name="get_time"><param name="city">Rome</param></function><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response>
<tool_response>
noon
</tool_response><|im_end|>
<|im_start|>assistant
Rain at noon.<|im_end|>
<|im_start|>user
Thanks<|im_end|>
<|im_start|>assistant
""",
    "gemma4": "<turn|>\n<|turn>model\n"
    '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
    '<|tool_call>call:get_time{city:<|"|>Rome<|"|>}<tool_call|>'
    '<|tool_response>response:get_weather{value:<|"|>rain<|"|>}<tool_response|>'
    '<|tool_response>response:get_time{value:<|"|>noon<|"|>}<tool_response|>'
    "Rain at noon.<turn|>\n<|turn>user\nThanks<turn|>\n<|turn>model\n"
    "<|channel>thought\n<channel|>",
    "kimi_k2": "<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"
    "<|tool_calls_section_begin|>"
    "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|>'
    "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\nrain<|im_end|>"
    "<|im_system|>get_time<|im_middle|>## Return of functions.get_time:1\nnoon<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|><think></think>Rain at noon.<|im_end|>"
    "<|im_user|>user<|im_middle|>Thanks<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "deepseek_v3_1": "<｜Assistant｜></think><｜tool▁calls▁begin｜>"
    '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    '<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>"
    "Rain at noon.<｜end▁of▁sentence｜><｜User｜>Thanks<｜Assistant｜></think>",
    "lfm2": "<|im_end|>\n<|im_start|>assistant\n<|tool_call_start|>"
    '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_time", "arguments": {"city": "Rome"}}]<|tool_call_end|><|im_end|>\n'
    "<|im_start|>tool\n<|tool_response_start|>rain<|tool_response_end|><|im_end|>\n"
    "<|im_start|>tool\n<|tool_response_start|>noon<|tool_response_end|><|im_end|>\n"
    "<|im_start|>assistant\nRain at noon.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
    "<|im_start|>assistant\n",
    "granite3": "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|><|tool_call|>"
    '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_time", "arguments": {"city": "Rome"}}]<|end_of_text|>\n'
    "<|start_of_role|>tool_response<|end_of_role|>rain<|end_of_text|>\n"
    "<|start_of_role|>tool_response<|end_of_role|>noon<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Rain at noon.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Thanks<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "phi4_mini": "<|end|><|assistant|><|tool_call|>"
    '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_time", "arguments": {"city": "Rome"}}]<|/tool_call|><|end|>'
    "<|tool_response|>rain<|end|><|tool_response|>noon<|end|><|assistant|>Rain at noon.<|end|>"
    "<|user|>Thanks<|end|><|assistant|>",
    "nemotron2": "\n<SPECIAL_11>Assistant\n<TOOLCALL>"
    '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_time", "arguments": {"city": "Rome"}}]</TOOLCALL>\n<SPECIAL_12>\n'
    "<SPECIAL_11>User\n<TOOL_RESPONSE>[rain, noon]</TOOL_RESPONSE>"
    "<SPECIAL_11>Assistant\nRain at noon.\n<SPECIAL_12>\n<SPECIAL_11>User\nThanks\n"
    "<SPECIAL_11>Assistant\n<think>\n",
    "apriel": "\n<|begin_assistant|>\n<tool_calls>"
    '[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_time", "arguments": {"city": "Rome"}}]</tool_calls>\n<|end|>\n'
    "<|begin_tool_result|>\nrain\n<|begin_tool_result|>\nnoon\n"
    "<|begin_assistant|>\nRain at noon.\n<|end|>\n<|begin_user|>\nThanks\n"
    "<|begin_assistant|>\nHere are my reasoning steps:\n",
    "command": """<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>\
<|START_THINKING|><|END_THINKING|><|START_ACTION|>[
    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},
    {"tool_call_id": "1", "tool_name": "get_time", "parameters": {"city": "Rome"}}
]<|END_ACTION|><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
    {"tool_call_id": "0", "results": {"0": "rain"}},
    {"tool_call_id": "1", "results": {"0": "noon"}}
]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>\
<|START_RESPONSE|>Rain at noon.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>\
<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Thanks<|END_OF_TURN_TOKEN|>\
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>""",
    "gpt_oss": "<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
    '<|message|>{"city": "Paris"}<|call|>'
    '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"rain"<|end|>'
    "<|start|>assistant to=functions.get_time<|channel|>commentary json"
    '<|message|>{"city": "Rome"}<|call|>'
    '<|start|>functions.get_time to=assistant<|channel|>commentary<|message|>"noon"<|end|>'
    "<|start|>assistant<|channel|>final<|message|>Rain at noon.<|end|>"
    "<|start|>user<|message|>Thanks<|end|><|start|>assistant",
}
TURNS["qwen3"] = TURNS["qwen2_5"]
TURNS["qwen3_coder"] = (
    TURNS["qwen2_5"]
    .replace(
        '{"name": "get_weather", "arguments": {"city": "Paris"}}', tagged("get_weather", "Paris")
    )
    .replace('{"name": "get_time", "arguments": {"city": "Rome"}}', tagged("get_time", "Rome"))
) + "<think>\n"


@pytest.mark.parametrize("template", TURNS)
def test_two_calls_of_a_turn_and_their_results_come_in_the_familys_form(template: str) -> None:
    _, question, turns = text(prompt(template, TWO_CALLS, TOOLS)).partition("Weather?")
    assert question
    assert turns == TURNS[template]


@pytest.mark.parametrize("template", NAMES)
def test_whatever_a_conversation_holds_is_in_the_prompt(template: str) -> None:
    answered = [*ONE_CALL, *assistant("Rain."), *user("More")]
    for messages in (ONE_CALL, answered, TWO_CALLS, TWO_CALLS[:5], TWO_CALLS[1:], TWO_CALLS[:2]):
        for tools in (TOOLS, ()):
            (segment,) = prompt(template, messages, tools).segments  # no control token is plain
            shown = segment.text
            for message in messages:
                assert message["content"] is None or message["content"] in shown
                for call in message.get("tool_calls", ()):
                    assert call["function"]["name"] in shown
                    arguments = call["function"]["arguments"]
                    is_json = template not in NOT_JSON
                    for said in [arguments] if is_json else json.loads(arguments).values():
                        assert said in shown
            assert ("What get_time does" in shown) == bool(tools)


def tokens_written(template: str, said: str) -> Counter[str]:
    """The control tokens of a prompt in which the client says this at every place."""
    arguments = json.dumps({"city": said, said: "x", "n": [said]})
    weather, time = ("call_1", "get_weather", arguments), ("call_2", "get_time", '{"city": "Rome"}')
    called = [*assistant(said, weather, time), *result("call_1", said), *result("call_2", "noon")]
    messages = [*system(said), *user(said), *called, *assistant(said), *user(said)]
    token = "|".join(map(re.escape, sorted(CONTROL_TOKENS[template], key=len, reverse=True)))
    segments = prompt(template, messages, TOOLS).segments
    return Counter(re.findall(token, "\n".join(one.text for one in segments if one.parse_special)))


@pytest.mark.parametrize("template", NAMES)
def test_clients_neither_write_control_tokens_nor_take_any_away(template: str) -> None:
    own = tokens_written(template, "plain")
    for token in CONTROL_TOKENS[template]:
        assert tokens_written(template, f"a{token}b") == own
        for n in range(1, len(token)):  # a half at the end, and the other at the beginning
            assert tokens_written(template, token[n:] + token[:n]) == own


def test_a_call_keeps_what_was_said_and_thought_before_it() -> None:
    call = ("call_1", "get_weather", '{"city": "Paris"}')
    messages = [*user("Weather?"), *assistant("I look.", call, reasoning_content="Hm."),
                *result("call_1", "rain")]  # fmt: skip
    shown = {name: text(prompt(name, messages, TOOLS)) for name in NAMES}
    assert "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{" in shown["qwen3"]
    assert "<|im_start|>assistant\nI look.\n<tool_call>\n{" in shown["smollm2"]
    assert "<|im_start|>assistant\nI look.\n<tool_call>\n<function=" in shown["qwen3_coder"]
    said = "<seed:think>Hm.</seed:think>\nI look.\n<seed:tool_call>\n<function=get_weather>"
    assert said in shown["seed_oss"]
    said = "\nHm.\n</think>\n\nI look.\n<minimax:tool_call>\n<invoke name"
    assert said in shown["minimax_m2"]
    assert '\nHm.\n</think>\n\nI look.\n<function name="get_w' in shown["minicpm5"]
    assert "</think>I look.<tool_call>get_weather<arg_key>" in shown["glm"]
    assert "<think>Hm.</think>I look.<|tool_calls_section_begin|><|tool_c" in shown["kimi_k2"]
    said = "<｜Assistant｜></think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_w"
    assert said in shown["deepseek_v3_1"]
    # whose own templates put it behind the result, where the next answer is to begin
    model_turns = "<|turn>model\nI look.<turn|>\n<|turn>model\n<|tool_call>call:get_weather{"
    assert model_turns in shown["gemma4"]
    assert shown["gemma4"].endswith('response:get_weather{value:<|"|>rain<|"|>}<tool_response|>')
    assert "<|im_start|>assistant\nI look.<|tool_call_start|>[{" in shown["lfm2"]
    assert "<|end_of_role|>I look.<|tool_call|>[{" in shown["granite3"]
    assert "<|assistant|>I look.<|tool_call|>[{" in shown["phi4_mini"]
    assert "<SPECIAL_11>Assistant\nI look.\n<TOOLCALL>[{" in shown["nemotron2"]
    assert "<|begin_assistant|>\nI look.\n<tool_calls>[{" in shown["apriel"]
    # whose own templates show the plan of a call, and no text
    plan = "<|START_THINKING|>Hm.\n\nI look.<|END_THINKING|><|START_ACTION|>[\n"
    assert plan in shown["command"]
    assert "<|channel|>analysis<|message|>Hm.\n\nI look.<|end|><|start|>" in shown["gpt_oss"]
    # whose own templates show the call alone
    turns = shown["llama3_1"].replace("<|end_header_id|>\n\n", ">").split("<|start_header_id|>")
    assert turns[-4] == "assistant>I look.<|eot_id|>"
    assert turns[-3].startswith('assistant>{"name": "get_weather"')


def test_lfm2_is_asked_for_json_and_past_calls_are_in_its_own_tokens() -> None:
    for before, told in (((), ""), (system("Be brief."), "Be brief.\n\n")):
        shown = text(prompt("lfm2", [*before, *user("Hi")], TOOLS))
        assert f"system\n{told}Output function calls as JSON.\nList of tools: <" in shown
    assert "JSON" not in text(prompt("lfm2", [*system("Be brief."), *user("Hi")]))
    mark, end = "<|tool_call_start|>", "<|tool_call_end|>"
    call = ("call_1", "get_weather", json.dumps({"city": mark}))
    messages = [*user(mark), *assistant(end, call), *result("call_1", "rain")]
    segments = prompt("lfm2", messages, TOOLS).segments
    clients = [segment.text for segment in segments if not segment.parse_special]
    assert clients == [mark, end, mark]
    ours = "".join(segment.text for segment in segments if segment.parse_special)
    assert (ours.count(mark), ours.count(end)) == (1, 1)


def test_lfm2_is_told_of_thoughts_by_its_own_name_for_them() -> None:
    source = "List of tools: {% for m in messages %}{{ m.thinking }} {{ m.content }}{% endfor %}"
    thought = assistant("Rain.", reasoning_content="Hm.")
    assert text(prompt(source, thought)) == "List of tools: Hm. Rain."


def test_deepseek_is_told_of_tools_in_the_words_of_its_authors() -> None:
    mark = "<｜tool▁calls▁begin｜>"
    tools = [tool("f", schema={"type": "object", "description": mark})]
    tools[0].definition["function"]["description"] = mark
    for before, told in (((), ""), (system(f"Be {mark}."), f"Be {mark}.\n\n")):
        made = prompt("deepseek_v3_1", [*before, *user("Hi")], tools)
        begun = (
            f"<s>{told}## Tools\nYou have access to the following tools:\n\n### f\nDescription: "
        )
        assert text(made).startswith(f'{begun}{mark}\n\nParameters: {{"properties": {{}}, "type"')
        ours = [segment for segment in made.segments if segment.parse_special]
        assert "".join(segment.text for segment in ours).count(mark) == 1
        assert len(made.segments) - len(ours) == text(made).count(mark) - 1
    shown = text(prompt(chat_format(NO_SYSTEM, "deepseek-v3.1"), user("Hi"), tools))
    assert shown.startswith("user: ## Tools\n")
    assert shown.endswith("spaces\n\nHi\n")


def test_what_ends_thoughts_is_kept_in_the_arguments_of_deepseek() -> None:
    call = ("1", "f", json.dumps({"a": "x</think>y"}))
    shown = text(prompt("deepseek_v3_1", [*user("Go"), *assistant("I look.", call)]))
    assert (
        r'I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "x\u003c' in shown
    )


def test_phi_is_told_of_tools_in_the_system_turn() -> None:
    tools = f"<|tool|>[{WEATHER_LINE}, {TIME_LINE}]<|/tool|><|end|><|user|>Hi"
    shown = text(prompt("phi4_mini", [*system("Be brief."), *user("Hi")], TOOLS))
    assert shown.startswith(f"<|system|>Be brief.{tools}")
    shown = text(prompt("phi4_mini", user("Hi"), TOOLS))
    assert shown.startswith(f"<|system|>You are a helpful assistant with some tools.{tools}")
    assert text(prompt("phi4_mini", user("Hi"))) == "<|user|>Hi<|end|><|assistant|>"
    mark = "<|/tool|>"
    segments = prompt("phi4_mini", user("Hi"), [tool(mark)]).segments
    assert [one.text for one in segments if not one.parse_special] == [mark, mark]


@pytest.mark.parametrize("has_ids", [True, False])
def test_commands_results_are_numbered_as_their_calls_are(has_ids: bool) -> None:
    messages = user("Weather?")
    for answers in (["rain", "noon"], ["snow", "night"]):
        calls = [("call_0", "get_weather", "{}"), ("call_1", "get_time", "{}")]
        turn, *results = [*assistant(None, *calls), *result("call_0", answers[0]),
                          *result("call_1", answers[1])]  # fmt: skip
        if has_ids:
            results.reverse()  # they may come in any order
        else:
            for call, message in zip(turn["tool_calls"], results, strict=True):
                del call["id"], message["tool_call_id"]
        messages += [turn, *results]
    shown = text(prompt("command", [*messages, *result("call_7", "lost")], TOOLS))
    for n, (name, answer) in enumerate(
        [("get_weather", "rain"), ("get_time", "noon"), ("get_weather", "snow"),
         ("get_time", "night")]
    ):  # fmt: skip
        assert f'{{"tool_call_id": "{n}", "tool_name": "{name}"' in shown
        assert shown.count(f'{{"tool_call_id": "{n}", "results": {{"0": "{answer}"}}}}') == 1
    assert shown.count('{"tool_call_id": "", "results": {"0": "lost"}}') == 1


@pytest.mark.parametrize(
    ("template", "sent", "shown"),
    [
        ("qwen3_coder", '{"a": true, "b": null}', "=a>\ntrue\n</parameter>\n<parameter=b>\nnull\n"),
        ("qwen3_coder", '{"a": [1, {"b": "é"}]}', '<parameter=a>\n[1, {"b": "é"}]\n</parameter>'),
        ("qwen3_coder", '{"a": 1.5', '<parameter=arguments>\n{"a": 1.5\n</parameter>'),  # cut
        ("qwen3_coder", "", "<function=f>\n</function>"),
        ("seed_oss", '{"a": [1, null]}', "<parameter=a>[1, null]</parameter>\n"),
        ("minimax_m2", '{"a": [1, null]}', '<parameter name="a">[1, null]</parameter>\n'),
        ("minicpm5", '{"a": [1, null]}', '<param name="a">[1, null]</param>'),
        ("minicpm5", r'{"a": "x\ny"}', '<param name="a"><![CDATA[x\ny]]></param>'),
        ("minicpm5", '{"a": "</think>"}', '<param name="a"><![CDATA[</think>]]></param>'),
        ("glm", '{"a": false}', "<arg_key>a</arg_key><arg_value>false</arg_value>"),
        ("gemma4", '{"a": [true, {"b": "x"}], "c": 5}', 'f{a:[true,{b:<|"|>x<|"|>}],c:5}<'),
    ],
)
def test_past_calls_look_as_the_model_wrote_them(template: str, sent: str, shown: str) -> None:
    messages = [*user("Go"), *assistant(None, ("1", "f", sent)), *result("1", "done"),
                *assistant(None, ("2", "f", sent)), *result("2", "done")]  # fmt: skip
    assert text(prompt(template, messages, TOOLS)).count(shown) == 2


def test_results_are_not_lost_where_templates_show_them_with_their_calls() -> None:
    alone = [*user("Go"), *result("1", "rain"), *user("Well?")]
    assert "<|turn>user\nrain<turn|>" in text(prompt("gemma4", alone))
    told = [ONE_CALL[0], ONE_CALL[1] | {"tool_responses": "snow"}, ONE_CALL[2]]
    assert text(prompt("gemma4", told)) == text(prompt("gemma4", ONE_CALL))


def test_what_was_said_before_two_calls_comes_once_where_each_has_a_turn() -> None:
    messages = list(TWO_CALLS[1:5])
    messages[1] = messages[1] | {"content": "I look.", "reasoning": "Hm."}
    shown = text(prompt("gpt_oss", messages, TOOLS))
    assert shown.count("Hm.\n\nI look.") == shown.count("Hm.") == shown.count("I look.") == 1
    assert text(prompt("llama3_1", messages, TOOLS)).count("I look.") == 1


def test_results_stay_with_their_calls_where_ids_are_used_again() -> None:
    calls = [("call_0", "get_weather", "{}"), ("call_1", "get_time", "{}")]
    messages = user("Weather?")
    for answers in (["rain", "noon"], ["snow", "night"]):
        # the results may come in any order
        messages += [*assistant(None, *calls), *result("call_1", answers[1]),
                     *result("call_0", answers[0])]  # fmt: skip
    shown = text(prompt("llama3_1", messages, TOOLS)).replace("<|end_header_id|>\n\n", ">")
    turns = [part.rpartition(">")[2] for part in shown.split("<|eot_id|>")][-9:-1]
    assert turns == [
        '{"name": "get_weather", "parameters": {}}', '"rain"',
        '{"name": "get_time", "parameters": {}}', '"noon"',
        '{"name": "get_weather", "parameters": {}}', '"snow"',
        '{"name": "get_time", "parameters": {}}', '"night"',
    ]  # fmt: skip


@pytest.mark.parametrize("template", NAMES)
def test_results_come_in_the_order_of_their_calls(template: str) -> None:
    """Many templates show neither ids nor names with them."""
    *before, rain, noon, answer, thanks = TWO_CALLS
    shown = text(prompt(template, TWO_CALLS, TOOLS))
    assert text(prompt(template, [*before, noon, rain, answer, thanks], TOOLS)) == shown


@pytest.mark.parametrize("has_other_ids", [True, False])
def test_results_that_name_no_call_are_kept(has_other_ids: bool) -> None:
    calls = [("", "get_weather", "{}"), ("", "get_time", "{}")]
    messages = [*user("Weather?"), *assistant(None, *calls), *result("x", "ok"), *result("y", "ok")]
    if not has_other_ids:  # nor any at all
        for call, message in zip(messages[1]["tool_calls"], messages[2:], strict=True):
            del call["id"], message["tool_call_id"]
    for template in ("llama3_1", "gpt_oss", "smollm2"):
        shown = text(prompt(template, messages, TOOLS))
        assert shown.count("ok") == 2
        if template == "llama3_1":  # each follows its call, or all of them
            assert ("get_time" in shown.split("ok")[1]) == (not has_other_ids)


def test_a_result_has_the_name_of_its_function() -> None:
    source = "{% for m in messages if m.role != 'assistant' %}{{ m.name }}: {{ m.content }}\n"
    source += "{% endfor %}{{ tools and '<tool_call>' }}"
    assert "\nget_weather: rain\nget_time: noon\n" in text(prompt(source, TWO_CALLS))


@pytest.mark.parametrize("id", ["abcDEF123", "call_00000000000000000000001", "x", "", "é" * 9])
def test_ids_have_the_nine_characters_that_mistral_wants(id: str) -> None:
    messages = [*user("Weather?"), *assistant(None, (id, "get_time", "{}")), *result(id, "noon")]
    shown = text(prompt("mistral_v3", messages, TOOLS))
    called, answered = shown.split('"id": "')[1][:10], shown.split('"call_id": "')[1][:10]
    assert called == answered
    assert called.strip('"').isascii()
    assert (called == f'{id}"') == (id == "abcDEF123")


def ids_shown(*messages: dict[str, Any]) -> list[list[str]]:
    """Kimi's, of calls and of results."""
    shown = text(prompt("kimi_k2", [*user("Go"), *messages], TOOLS))
    return [re.findall(rf"{mark}([\w.]+:\d+)", shown) for mark in (r"_begin\|>", "Return of ")]


def test_ids_of_kimi_count_all_calls() -> None:
    call = ("call_0", "f", "{}")
    messages = [*assistant(None, call, ("call_1", "g", "{}")), *result("call_1", "one"),
                *result("call_0", "two"), *assistant(None, call), *result("call_0", "three"),
                *result("call_0", "nobody asked")]  # fmt: skip
    ids = ["functions.f:0", "functions.g:1", "functions.f:2"]
    assert ids_shown(*messages) == [ids, ids]
    bare = [{key: messages[n][key] for key in messages[n] if key != "tool_call_id"} for n in (1, 2)]
    for given in ({}, {"id": ""}):
        calls = [given | {"function": call["function"]} for call in messages[0]["tool_calls"]]
        assert ids_shown(messages[0] | {"tool_calls": calls}, *bare) == [ids[:2], ids[:2]]


@pytest.mark.parametrize("template", NAMES)
def test_texts_of_a_result_are_not_glued(template: str) -> None:
    parts = [{"type": "text", "text": text} for text in ("1.txt", "2.txt")]
    messages = [*ONE_CALL[:-1], {"role": "tool", "tool_call_id": "call_1", "content": parts}]
    shown = text(prompt(template, messages, TOOLS))
    assert "1.txt\n2.txt" in shown or r"1.txt\n2.txt" in shown


def test_what_a_template_refuses_is_the_clients_fault() -> None:
    with pytest.raises(BadRequest, match="alternate"):
        prompt("mistral_v3", [*assistant("Hello."), *user("Hi")])


NO_SYSTEM = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('No system turns!') }}{% endif %}
    {{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}"""


def test_a_template_that_refuses_a_system_text_gets_it_in_the_users() -> None:
    assert text(prompt(NO_SYSTEM, [*system("Be brief."), *user("Hi")])) == "user: Be brief.\n\nHi\n"
    assert text(prompt(NO_SYSTEM, system("Be brief."))) == "user: Be brief.\n"
    assert text(prompt(NO_SYSTEM, user("Hi"), TOOLS)) == f"user: {INSTRUCTIONS}\n\nHi\n"
    shown = text(prompt(NO_SYSTEM, [*user("Hi"), *system("Be brief."), *user("Well?")]))
    assert shown == "user: Hi\n\nBe brief.\n\nWell?\n"


# as SmolVLM and LLaVA-OneVision have it
LINES = """\
{%- for message in messages %}
    {{- message.role | capitalize + ': ' }}
    {%- for line in message.content %}
        {%- if line.type == 'text' %}{{ line.text }}{% endif %}
    {%- endfor %}
    {{- '\n' }}
{%- endfor %}"""
SELECTED = """\
{%- for message in messages %}
    {{- message.role | capitalize + ': ' }}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') %}
        {{- part.text }}
    {%- endfor %}
    {{- '\n' }}
{%- endfor %}"""
FIRST_PART = """\
{%- for message in messages %}
    {%- if message.content is string %}{{ raise_exception('Content is a list.') }}{% endif %}
    {{- message.role | capitalize + ': ' + message.content[0].text + '\n' }}
{%- endfor %}"""


PARTS_OF_USERS = """\
{%- if messages[0].role == 'system' %}
    {{- 'System: ' + messages[0].content + '\n' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {{- message.role | capitalize }}: {% if message.role == 'assistant' %}
        {{- message.content | trim ~ '' }}
    {%- else %}
        {%- for part in message.content %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}"""


@pytest.mark.parametrize("template", [LINES, SELECTED, FIRST_PART, PARTS_OF_USERS])
def test_a_template_that_takes_content_in_parts_gets_parts(template: str) -> None:
    messages = [*system("Be brief."), *user("<s>Weather?"), *assistant("It is")]
    shown = "System: Be brief.\nUser: <s>Weather?\nAssistant: It is"
    assert text(prompt(template, messages)) == f"{shown}\n"
    assert text(prompt(template, messages, continues=True)) == shown
    assert "What get_time does" in text(prompt(template, ONE_CALL, TOOLS))


def test_a_template_that_leaves_out_what_users_say_is_refused() -> None:
    with pytest.raises(ModelLoadFailed, match=r"leaves out what users say; take a file"):
        chat_format("{{ messages | length }}")


def test_a_template_that_wants_tools_takes_text() -> None:
    source = "{% for tool in tools %}<tool_call>{{ tool | tojson }}\n{% endfor %}" + NO_SYSTEM
    assert text(prompt(source, user("Hi"), TOOLS)).endswith("user: Hi\n")
    with pytest.raises(BadRequest, match="NoneType"):
        prompt(source, user("Hi"))


LATER = (*user("Hi"), *assistant("Hello."), *system("Be brief."), *user("Well?"))
SYSTEM_FIRST = """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}"""

SYSTEM_HIDDEN = """\
{%- for message in messages %}
    {%- if message.role != 'system' or loop.first %}
        {{- message.role + ': ' + message.content + '\n' }}
    {%- endif %}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (SYSTEM_FIRST, "user: Be brief.\n\nWell?\n"),  # which refuses it later
        (NO_SYSTEM, "user: Be brief.\n\nWell?\n"),
        (SYSTEM_HIDDEN, "user: Be brief.\n\nWell?\n"),
        ("mistral_v3", "[INST]{}Be brief.\n\nWell?[/INST]"),  # whose turns alternate
        ("qwen3", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWell?"),
    ],
)
def test_a_later_system_text_is_the_users_where_the_template_has_no_place_for_it(
    template: str, turn: str
) -> None:
    for first in ("", "Talk."):
        messages = (*system(first), *LATER) if first else LATER
        shown = text(prompt(template, messages))
        assert turn.replace("{}", first and f"{first}\n\n") in shown
        assert shown.count("Be brief.") == 1
        assert first in shown


GATHERS = """\
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- for message in messages if message.role != 'system' %}
    {{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}"""


def test_a_later_system_text_keeps_its_place() -> None:
    shown = text(prompt(GATHERS, [*system("Talk."), *LATER]))
    assert shown == "Talk.user: Hi\nassistant: Hello.\nuser: Be brief.\n\nWell?\n"


@pytest.mark.parametrize("template", NAMES)
def test_a_system_text_behind_a_result_is_read(template: str) -> None:
    for more in (system("Be brief."), user("Be brief.")):
        messages = [*ONE_CALL, *more]
        shown = text(prompt(template, messages, TOOLS))
        assert shown.index("rain") < shown.index("Be brief.")


@pytest.mark.parametrize("template", [*NAMES, SYSTEM_FIRST, NO_SYSTEM])
def test_each_result_keeps_its_place_beside_a_system_text(template: str) -> None:
    messages = [*TWO_CALLS[1:4], *system("Be brief."), TWO_CALLS[4]]
    shown = text(prompt(template, messages, TOOLS))
    assert shown.count("rain") == shown.count("noon") == shown.count("Be brief.") == 1


LAST_TURN_HAS_IT = """\
{%- for message in messages if message.role != 'system' %}
    {%- if loop.last and message.role == 'user' and messages[0].role == 'system' %}
        {{- messages[0].content + ' ' }}
    {%- endif %}
    {{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}"""


def test_a_system_text_is_not_lost_where_the_last_turn_is_no_users() -> None:
    shown = text(prompt(LAST_TURN_HAS_IT, [*system("Talk."), *ONE_CALL]))
    assert shown.startswith("user: Talk.\n\nWeather?")


def test_system_texts_at_the_beginning_are_one_where_the_template_takes_one() -> None:
    messages = [*system("Talk."), *system("Be brief."), *user("Hi"), *user("Well?")]
    shown = text(prompt(SYSTEM_FIRST, messages))
    assert shown == "system: Talk.\n\nBe brief.\nuser: Hi\nuser: Well?\n"


ALTERNATING = """\
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Turns must alternate.') }}
    {%- endif %}
    {{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}"""


@pytest.mark.parametrize("template", ["mistral_v3", ALTERNATING])
def test_neighbours_of_one_role_are_one_turn_where_turns_must_alternate(template: str) -> None:
    def shown(*messages: Any, **fields: Any) -> str:
        return text(prompt(template, [*messages], TOOLS, **fields))

    twice = (*user("Hi"), *user(""), *user("Weather?"))
    once = user("Hi\n\nWeather?")
    assert shown(*system("Talk."), *twice) == shown(*system("Talk."), *once)
    call = ("call_1", "get_weather", '{"city": "Paris"}')
    said = (*assistant("Let me"), *assistant("look."), *assistant(None, call))
    rest = (*result("call_1", "rain"), *twice)
    shown_at_once = shown(*once, *said, *rest)
    assert shown_at_once.index("Let me\n\nlook.") < shown_at_once.index('"Paris"')
    continued = shown(*once, *assistant("Let"), *assistant("me"), continues=True)
    assert continued.endswith("Let\n\nme")


CALLS_STAND_ALONE = """\
{%- set others = messages | rejectattr('tool_calls', 'defined') | list %}
{%- for message in others %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Turns must alternate.') }}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set call = '[TOOL_CALLS][' + message.tool_calls[0].function.name if message.tool_calls %}
    {{- message.role + ': ' + (call or message.content) + '\n' }}
{%- endfor %}"""


def test_a_text_before_a_call_is_a_turn_of_its_own_where_it_was_sent_as_one() -> None:
    call = ("call_1", "get_weather", "{}")
    messages = [*user("Hi"), *user("Well?"), *assistant("Let me look."), *assistant(None, call)]
    shown = text(prompt(CALLS_STAND_ALONE, messages))
    assert (
        shown == "user: Hi\n\nWell?\nassistant: Let me look.\nassistant: [TOOL_CALLS][get_weather\n"
    )


def test_neighbours_of_one_role_are_turns_of_their_own_where_they_may_be() -> None:
    twice = [*user("Hi"), *user("Well?"), *assistant("Let me"), *assistant("look.")]
    lines = "user: Hi\nuser: Well?\nassistant: Let me\nassistant: look.\n"
    assert text(prompt(SYSTEM_FIRST, twice)) == lines


def test_what_a_user_says_after_a_result_is_in_its_turn() -> None:
    messages = [*ONE_CALL, *user("And tomorrow?")]
    shown = text(prompt(ALTERNATING, messages))
    response = "<tool_response>\nrain\n</tool_response>"
    assert shown.endswith(f"user: {response}\n\nAnd tomorrow?\n")


@pytest.mark.parametrize("template", NAMES)
def test_a_list_of_no_calls_is_none(template: str) -> None:
    def shown(**fields: Any) -> str:
        return text(prompt(template, [*user("Hi"), *assistant("Hello.", **fields), *user("Well?")]))

    assert shown(tool_calls=[]) == shown()


CHOOSY = """\
{%- if reasoning_effort is defined and reasoning_effort not in LEVELS %}
    {{- raise_exception('Unknown effort.') }}
{%- endif %}
{%- for m in messages %}{{ m.content }}{% endfor %}
{{- reasoning_effort }}</think>"""


def test_a_template_that_refuses_no_effort_is_told_of_those_that_it_names() -> None:
    for named, asked, told in (("", "max", "high"), ("'max'", "max", "max"), ("", "none", "low")):
        template = "{{ messages[0].content + reasoning_effort }}</think>{# " + named + " #}"
        assert text(prompt(template, user("Hi"), effort=asked)).startswith(f"Hi{told}<")


@pytest.mark.parametrize(
    ("levels", "asked", "told"),
    [
        (["low", "medium", "xhigh"], "high", "xhigh"),
        (["low", "medium", "xhigh"], "max", "xhigh"),
        (["low", "medium", "xhigh"], "minimal", "low"),
        (["low", "medium", "xhigh"], "medium", "medium"),
        (["none", "high"], "low", "high"),
        (["none", "high"], "none", "none"),
        (["none", "low", "medium", "high", "xhigh", "minimal", "max"], "max", "max"),
        ([], "high", None),
    ],
)
def test_a_template_is_told_of_the_nearest_effort_that_it_knows(
    levels: list[str], asked: str, told: str | None
) -> None:
    template = CHOOSY.replace("LEVELS", repr(levels))
    if told is None:
        with pytest.raises(BadRequest, match="Unknown effort"):
            prompt(template, user("Hi"), effort=asked)
    else:
        assert text(prompt(template, user("Hi"), effort=asked)).startswith(f"Hi{told}<")


# which tools may be called


def test_all_tools_are_shown_and_those_that_are_chosen_may_be_called() -> None:
    choice = ToolChoice(frozenset({"get_time"}))
    for name in NAMES:
        made = prompt(name, ONE_CALL, TOOLS, choice=choice)
        assert "What get_weather does" in text(made)
        assert made.grammar
        is_json = name not in NOT_JSON
        assert made.grammar.parts == ((TIME.arguments,) if is_json else ())
        assert "get_weather" not in made.grammar.frame


def test_without_tools_to_call_only_the_thoughts_are_looked_for() -> None:
    raw = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    for name in ("qwen2_5", "qwen3", "smollm2", "llama3_1", "mistral_v3"):
        made = prompt(name, ONE_CALL, TOOLS, choice=NO_TOOLS)
        assert made.grammar is None
        splitter = made.splitter()
        assert message_of([*splitter.feed(raw), *splitter.finish()]) == Message(raw)
    assert prompt("qwen2_5", ONE_CALL).visible == []


def test_a_call_that_nobody_asked_for_is_none() -> None:
    """gpt-oss may write one where there is no grammar."""
    splitter = prompt("gpt_oss", ONE_CALL, TOOLS, choice=NO_TOOLS).splitter()
    raw = "<|channel|>commentary to=functions.get_time json<|message|>{}"
    assert message_of([*splitter.feed(raw), *splitter.finish()]) == Message("", "{}")


def test_parts_of_the_grammar_are_the_answer_and_then_the_tools() -> None:
    unlike = tool("get_unlike", "unit")
    made = prompt("qwen2_5", ONE_CALL, [*TOOLS, unlike], answer=ANSWER)
    assert made.grammar
    # each once: two functions have the same arguments
    assert made.grammar.parts == (ANSWER, WEATHER.arguments, unlike.arguments)
    for part in ("@p0", '"\\"get_weather\\", \\"arguments\\": " @p1', "@p2"):
        assert part in made.grammar.frame


@pytest.mark.parametrize("template", NAMES)
def test_an_answer_in_json_may_be_mistaken_for_a_call_of_llama(template: str) -> None:
    asked = {"answer": ANSWER}
    if template == "llama3_1":
        with pytest.raises(UnsupportedParameter) as caught:
            prompt(template, ONE_CALL, TOOLS, **asked)
        assert caught.value.param == "response_format"
    else:
        assert prompt(template, ONE_CALL, TOOLS, **asked).grammar
    assert prompt(template, ONE_CALL, TOOLS, choice=choose(TOOLS, is_required=True), **asked)
    assert prompt(template, ONE_CALL, **asked).grammar


# thoughts


@pytest.mark.parametrize(
    ("template", "fields", "end", "is_open", "budget"),
    [
        ("qwen3", {}, "assistant\n", False, None),
        ("qwen3", {"budget": 7}, "assistant\n", False, 7),
        ("qwen3", {"effort": "minimal"}, "assistant\n", False, 256),
        ("qwen3", {"effort": "low"}, "assistant\n", False, 1024),
        ("qwen3", {"effort": "medium"}, "assistant\n", False, 8192),
        ("qwen3", {"effort": "high"}, "assistant\n", False, None),
        ("qwen3", {"effort": "xhigh"}, "assistant\n", False, None),
        ("qwen3", {"effort": "low", "budget": 7}, "assistant\n", False, 7),
        ("deepseek_r1", {}, "<think>\n", True, None),
        ("deepseek_r1", {"effort": "none"}, "<think>\n", True, 0),
        ("deepseek_r1", {"budget": 0}, "<think>\n", True, 0),
        ("deepseek_r1", {"effort": "low"}, "<think>\n", True, 1024),
        ("qwen3_coder", {}, "<think>\n", True, None),
        ("qwen3_coder", {"effort": "low"}, "<think>\n", True, 1024),
        ("seed_oss", {"effort": "low"}, "assistant\n", False, 1024),
        ("minimax_m2", {}, "<think>\n", True, None),
        ("minicpm5", {}, "assistant\n", False, None),
        ("minicpm5", {"effort": "low"}, "<think>\n", True, 1024),
        ("glm", {}, "<think>", True, None),
        ("kimi_k2", {}, "<|im_middle|>", False, None),
        ("deepseek_v3_1", {"effort": "low"}, "<think>", True, 1024),
        ("granite3", {}, "<|end_of_role|>", False, None),
        ("nemotron2", {}, "<think>\n", True, None),
        ("apriel", {}, "Here are my reasoning steps:\n", True, None),
        ("apriel", {"effort": "low"}, "Here are my reasoning steps:\n", True, 1024),
        ("command", {"budget": 7}, "<|CHATBOT_TOKEN|>", False, 7),
        ("gemma4", {"effort": "low"}, "<|turn>model\n", False, 1024),
        ("gemma4", {"extra": {"enable_thinking": True}}, "<|turn>model\n", False, None),
        ("gpt_oss", {}, "assistant", False, None),
        ("gpt_oss", {"effort": "high"}, "assistant", False, None),
        ("gpt_oss", {"effort": "none"}, "assistant", False, 0),
        ("gpt_oss", {"effort": "low", "budget": 7}, "assistant", False, 7),
    ],
)
def test_thoughts_begin_where_the_prompt_ends_and_take_what_they_may(
    template: str, fields: dict[str, Any], end: str, is_open: bool, budget: int | None
) -> None:
    made = prompt(template, user("Hi"), **fields)
    assert text(made).endswith(end)
    assert made.thinking
    assert (made.thinking.is_open, made.thinking.budget) == (is_open, budget)


def test_a_switch_of_thinking_is_the_templates() -> None:
    shown = text(prompt("granite3", user("Hi"), effort="high"))
    assert "Write your thoughts between <think></think>." in shown
    made = prompt("nemotron2", user("Hi"), effort="none")
    assert text(made).endswith("<think></think>")
    assert made.thinking is None


@pytest.mark.parametrize("fields", [{"effort": "none"}, {"extra": {"enable_thinking": False}}])
def test_a_model_that_can_be_told_not_to_think_does_not(fields: dict[str, Any]) -> None:
    made = prompt("qwen3", user("Hi"), **fields)
    assert text(made).endswith("<think>\n\n</think>\n\n")
    assert made.thinking is None
    assert made.visible == []
    splitter = made.splitter()
    assert message_of(splitter.feed("<think>Hi")) == Message("<think>Hi")


def test_what_a_client_says_to_the_template_comes_before_the_effort() -> None:
    made = prompt("qwen3", user("Hi"), effort="none", extra={"enable_thinking": True})
    assert text(made).endswith("assistant\n")


@pytest.mark.parametrize(
    ("effort", "told"),
    [(None, "medium"), ("none", "low"), ("minimal", "low"), ("low", "low"), ("xhigh", "high")],
)
def test_an_effort_is_told_to_a_template_that_knows_efforts(effort: str | None, told: str) -> None:
    assert f"Reasoning: {told}\n" in text(prompt("gpt_oss", user("Hi"), effort=effort))


@pytest.mark.parametrize("template", sorted({*NAMES} - {*THINKING, *ALSO_THINKING}))
def test_a_model_that_does_not_think_has_no_effort(template: str) -> None:
    for fields, idle in (
        ({"effort": "none", "budget": 0}, ()),
        ({"effort": "low"}, ("reasoning_effort",)),
        ({"budget": 5}, ("thinking_budget_tokens",)),
    ):
        made = prompt(template, user("Hi"), **fields)
        assert (made.thinking, made.idle) == (None, idle)


def test_thoughts_that_take_too_long_end_as_the_family_ends_them() -> None:
    assert [prompt(name, user("Hi")).thinking.ending for name in THINKING] == [  # type: ignore[union-attr]
        "\n</think>\n\n",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "\n</think>\n\n",
    ]
    may_call = prompt("gpt_oss", user("Hi"), TOOLS).thinking
    assert may_call
    assert may_call.ending == "<|end|><|start|>assistant"


def test_the_control_tokens_that_are_looked_for_are_shown() -> None:
    assert prompt("qwen3", user("Hi")).visible == [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
    ]
    assert prompt("mistral_v3", user("Hi"), TOOLS).visible == ["[TOOL_CALLS]"]
    assert prompt("phi4_mini", user("Hi"), TOOLS).visible == ["<|tool_call|>", "<|/tool_call|>"]


# answers that are continued


def go_on(template: str, begun: str, **fields: Any) -> Any:
    return prompt(template, [*user("Hi"), *assistant(begun)], continues=True, **fields)


@pytest.mark.parametrize("template", NAMES)
def test_an_answer_goes_on_where_it_ends(template: str) -> None:
    made = go_on(template, "It is ")
    assert text(made).endswith("It is ")
    assert made.thinking is None
    splitter = made.splitter()
    said = [*splitter.feed("<think> and <|x|> ok"), *splitter.finish()]
    assert message_of(said) == Message("<think> and <|x|> ok")


def test_an_answer_may_go_on_in_its_thoughts() -> None:
    for template in ("qwen3", "deepseek_r1"):
        made = go_on(template, "<think>\nHm, ")
        assert made.thinking
        assert made.thinking.is_open
        splitter = made.splitter()
        said = message_of([*splitter.feed("oh.</think>Hi"), *splitter.finish()])
        assert said == Message("Hi", "oh.")
        assert go_on(template, "<think>Hm.</think>It is").thinking is None


def test_gemmas_thoughts_go_on_too() -> None:
    made = go_on("gemma4", "<|channel>thought\nHm, ")
    assert made.thinking
    assert made.thinking.is_open
    splitter = made.splitter()
    said = message_of([*splitter.feed("oh.<channel|>Hi"), *splitter.finish()])
    assert said == Message("Hi", "oh.")


def test_a_tag_in_another_message_opens_no_thoughts() -> None:
    messages = [*system("Think between <think> tags."), *user("Hi"), *assistant("It is")]
    for template in ("qwen3", "deepseek_r1"):
        assert prompt(template, messages, continues=True).thinking is None


def test_the_end_of_an_answer_can_be_a_call_only_where_text_comes_before_calls() -> None:
    for template in ("qwen2_5", "mistral_v3", "mistral_v11", "smollm2"):
        made = go_on(template, "Let me see.", tools=TOOLS)
        assert made.grammar
    for template in ("llama3_1", "gpt_oss"):
        with pytest.raises(UnsupportedParameter, match="continued"):
            go_on(template, "Let me see.", tools=TOOLS)
    with pytest.raises(UnsupportedParameter, match="continued") as caught:
        go_on("qwen2_5", "x", tools=TOOLS, choice=choose(TOOLS, is_required=True))
    assert caught.value.param == "tools"


def test_the_end_of_an_answer_has_no_form() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        go_on("qwen2_5", "{", answer=ANSWER)
    assert caught.value.param == "response_format"


def test_tools_without_arguments_are_tools_too() -> None:
    for name in NAMES:
        made = prompt(name, user("Hi"), [tool("now")])
        assert "now" in text(made)
        assert made.grammar
