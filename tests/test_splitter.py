"""From the raw text of an answer to what it consists of, however it comes cut into pieces."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.events import Call, Message, Splitter
from chat.splitter import InlineReasoning, JsonSpan, PlainText, ReasoningSplitter, ReasoningTags
from chat.tools import BY_NAME
from chat.tools.base import Function
from chat.tools.calls import CallReader
from chat.tools.gemma import Channels
from chat.tools.parameters import Parameters
from engine.wire import GrammarPart
from tests.chat_formats import message_of

Make = Callable[[], Splitter]
THINK = ReasoningTags("<think>", "</think>")
SCHEMA = {
    "properties": {
        "a": {"type": "string"},
        "n": {"type": ["integer", "null"]},
        "list": {"type": "array"},
        "any": {},
        "maybe": {"type": ["string", "null"]},
    },
    "additionalProperties": True,
}
PARAMETERS = Parameters(GrammarPart("json_schema", json.dumps(SCHEMA), "tools", True), "</end>")
FUNCTIONS = [Function("get_weather", "@p0"), Function("f", "@p1", parameters=PARAMETERS)]


def of_family(name: str, *, only_first: bool = False) -> Make:
    return lambda: BY_NAME[name].call_splitter(FUNCTIONS, only_first=only_first)


def thinking(make: Make = PlainText, *, is_open: bool = False) -> Make:
    return lambda: ReasoningSplitter(THINK, make(), is_open=is_open)


def inline(make: Make) -> Make:
    return lambda: InlineReasoning(make())


HERMES, LLAMA3, MISTRAL, HARMONY = map(of_family, ["hermes", "llama3", "mistral", "harmony"])
CODER, SEED, GLM, LFM2 = map(of_family, ["qwen3-coder", "seed-oss", "glm", "lfm2"])
MINIMAX, MINICPM, KIMI = map(of_family, ["minimax-m2", "minicpm5", "kimi-k2"])
DEEPSEEK = of_family("deepseek-v3.1")
GRANITE, NEMOTRON = map(of_family, ["granite3", "nemotron2"])


def whole(name: str) -> Make:
    """Of whole answers, without thoughts."""
    return lambda: BY_NAME[name].splitter(FUNCTIONS, only_first=False, tags=None, is_open=False)


APRIEL, COMMAND = map(whole, ["apriel", "command"])


def GEMMA() -> Splitter:
    return Channels(of_family("gemma4")())


def said(text: str = "", *calls: tuple[str, str], reasoning: str = "") -> Message:
    return Message(text, reasoning, [Call(*call) for call in calls])


def fed(make: Make, pieces: Iterable[str]) -> tuple[Message, bool]:
    """What is said in these pieces, and whether it breaks off in a call."""
    splitter = make()
    events = [event for piece in pieces for event in splitter.feed(piece)]
    is_calling = splitter.is_calling
    return message_of([*events, *splitter.finish()]), is_calling


def read(make: Make, raw: str) -> tuple[Message, bool]:
    """The same for a whole answer: in two pieces and in characters it must be the same."""
    whole = fed(make, [raw])
    for cut in range(1, len(raw)):
        assert fed(make, [raw[:cut], raw[cut:]]) == whole, (raw[:cut], raw[cut:])
    assert fed(make, raw) == whole
    return whole


def hermes_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def rows(make: Make, *table: tuple[str, Message]) -> list[Any]:
    return [pytest.param(make, raw, message, id=raw[:60] or "nothing") for raw, message in table]


# arguments, and what they look like: objects, deep ones, with all that a search for their end could
# stumble over, none at all
ARGUMENTS = [
    "{}",
    '{"city": "Paris"}',
    '{"a": {"b": [1, {"c": "}"}, "]"], "d": null}, "e": -1.5e3}',
    r'{"a": "\"}\\", "b": "\\\"{", "c": "\u00e9\n"}',
    '{"a": "</tool_call><|end|>[TOOL_CALLS]", "b": "é 世界 🎉"}',
    '{\n  "a" : 1 ,\n  "b" : [ ]\n}',
    "[1, 2]",
    "null",
]

HERMES_ROWS = [
    ("", said()),
    ("Hello", said("Hello")),
    (" \nHello {} [1] <b>bold</b> \n", said(" \nHello {} [1] <b>bold</b> \n")),
    *((hermes_call("f", arguments), said("", ("f", arguments))) for arguments in ARGUMENTS),
    (f"Let me look.\n{hermes_call('f', '{}')}\n", said("Let me look.", ("f", "{}"))),
    (f"\n\n{hermes_call('f', '{}')}", said("", ("f", "{}"))),
    (
        f"{hermes_call('f', '{}')}\n{hermes_call('get_weather', '[1]')}",
        said("", ("f", "{}"), ("get_weather", "[1]")),
    ),
    (hermes_call("f", "1") + hermes_call("g", "2"), said("", ("f", "1"), ("g", "2"))),
    (
        f"One. {hermes_call('f', '1')} Two. {hermes_call('g', '2')} Three. ",
        said("One.Two.Three. ", ("f", "1"), ("g", "2")),
    ),
    # as models write it who were not told exactly how
    ('<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', said("", ("f", '{"a":1}'))),
    ('<tool_call>{"name": "f", "parameters": {"a":1} }</tool_call>', said("", ("f", '{"a":1}'))),
    ('<tool_call>{"type": "function", "name": "f", "arguments": {}}', said("", ("f", "{}"))),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', said("", ("f", '{"a": 1}'))),
    ('<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": {}}', said("", ("f", "{}"))),
    (r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}', said("", ("f", '{"a": 1}'))),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', said("", ("f", "{}"))),
    ('<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', said("", ("f", '"Paris"'))),
    ('<tool_call>{"name": "f"}</tool_call>', said("", ("f", "{}"))),
    (r'<tool_call>{"name": "\u00e9t\u00e9", "arguments": 1}</tool_call>', said("", ("été", "1"))),
    ('<tool_call>\n{"name": "f", "arguments": {}} Hello', said("Hello", ("f", "{}"))),
    # what is no call stays as it is
    *(
        (text, said(text))
        for text in [
            "a <tool_cal",
            "a <tool_call",
            "a <tool_call>",
            "a <tool_call> \n",
            "<tool_cal> </tool_call> <tool_call >",
            "The tag <tool_call> opens a call and </tool_call> ends it. ",
            '<tool_call>\n{"x": 1}\n</tool_call>',
            'a \n<tool_call> {"x": 1} </tool_call>\n b',
            '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
            '<tool_call>{"name": "f", oh: no}</tool_call>',
            r'<tool_call>{"name": "\x", "arguments": {}}</tool_call>',
            r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
            r'<tool_call>{"arguments": "\ud800", "name": "f"}</tool_call>',
            '<tool_call>["f"]</tool_call>',
            "<tool_call>}</tool_call>",
            "<tool_call><function=f></function></tool_call>",
        ]
    ),
    (
        f"Between <tool_call> and {hermes_call('f', '{}')}",
        said("Between <tool_call> and", ("f", "{}")),
    ),
    (f"<tool_call>\n{hermes_call('f', '{}')}", said("<tool_call>", ("f", "{}"))),
    (
        f'<tool_call>{{"x": 1}}</tool_call>\n{hermes_call("f", "{}")}',
        said('<tool_call>{"x": 1}</tool_call>', ("f", "{}")),
    ),
]  # fmt: skip


def coder_call(name: str, *arguments: tuple[str, str]) -> str:
    texts = (f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{''.join(texts)}</function>\n</tool_call>"


def seed_call(name: str, *arguments: tuple[str, str]) -> str:
    texts = (f"<parameter={key}>{value}</parameter>\n" for key, value in arguments)
    return f"<seed:tool_call>\n<function={name}>\n{''.join(texts)}</function>\n</seed:tool_call>"


def invoke(name: str, *arguments: tuple[str, str]) -> str:
    texts = (f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments)
    return f'<invoke name="{name}">\n{"".join(texts)}</invoke>'


def minimax_call(name: str, *arguments: tuple[str, str]) -> str:
    return minimax_calls(invoke(name, *arguments))


def minimax_calls(*invokes: str, between: str = "\n") -> str:
    return f"<minimax:tool_call>\n{between.join(invokes)}\n</minimax:tool_call>"


def minicpm_call(name: str, *arguments: tuple[str, str]) -> str:
    texts = (f'<param name="{key}">{value}</param>' for key, value in arguments)
    return f'<function name="{name}">{"".join(texts)}</function>'


def glm_call(name: str, *arguments: tuple[str, str], space: str = "\n") -> str:
    texts = (
        f"<arg_key>{key}</arg_key>{space}<arg_value>{value}</arg_value>{space}"
        for key, value in arguments
    )
    return f"<tool_call>{name}{space}{''.join(texts)}</tool_call>"


# what is written of an argument, and its JSON
WRITTEN = [
    ("a", "Paris", '"Paris"'),
    ("a", "", '""'),
    ("a", "\n  two\n\nlines \n", r'"\n  two\n\nlines \n"'),
    ("a", '"quoted" \\ {} é 🎉', r'"\"quoted\" \\ {} é 🎉"'),
    ("a", "a < b, </, </tool_call>, <tool_call>", '"a < b, </, </tool_call>, <tool_call>"'),
    ("a", "5", '"5"'),
    ("a", "null", '"null"'),
    ("n", "5", "5"),
    ("n", "null", "null"),
    ("list", '[1, {"a": "</arg_value>"}]', '[1, {"a": "</arg_value>"}]'),
    ("maybe", "null", "null"),
    ("maybe", "nul", '"nul"'),
    ("maybe", "nullable", '"nullable"'),
    ("maybe", "a < b", '"a < b"'),
    ("maybe", "", '""'),
    ("any", "true", "true"),
    ("any", "-1.5e3", "-1.5e3"),
    ("any", ' {"a": [1]}', '{"a": [1]}'),
    ("any", '"a"', r'"\"a\""'),
    ("any", "NaN", '"NaN"'),
    ("any", "nothing much", '"nothing much"'),
    ("other", "7", "7"),
    ("other", "text", '"text"'),
]
TWO = '{"a": "x", "n": 5}'


def tagged_rows(call: Callable[..., str], opener: str = "<tool_call>") -> list[tuple[str, Message]]:
    return [
        *(
            (call("f", (key, value)), said("", ("f", f'{{"{key}": {argument}}}')))
            for key, value, argument in WRITTEN
        ),
        (call("f"), said("", ("f", "{}"))),
        (call("f", ("a", "x"), ("n", "5")), said("", ("f", TWO))),
        (f"Let me look.\n\n{call('f')}\n", said("Let me look.", ("f", "{}"))),
        (f"{call('f')}\n{call('g', ('a', '1'))}", said("", ("f", "{}"), ("g", '{"a": 1}'))),
        (f"{call('f')} Hello", said("Hello", ("f", "{}"))),
        (f"A {opener} is {call('f')}", said(f"A {opener} is", ("f", "{}"))),
        (f"a {opener}", said(f"a {opener}")),
        (f'{opener}\n{{"name": "f"}}', said(f'{opener}\n{{"name": "f"}}')),
    ]


CODER_ROWS = [
    *tagged_rows(coder_call),
    ("<tool_call>\n<function=f>\n</function>", said("", ("f", "{}"))),
    ("<tool_call>\n<function=f>\n</function> Hi", said("Hi", ("f", "{}"))),
    ("<tool_call>\n<function=f>\nHi", said("Hi", ("f", "{}"))),
    ("<tool_call>\n<funct", said("<tool_call>\n<funct")),
    ("<tool_call>\n<function=>", said("<tool_call>\n<function=>")),
]
SEED_ROWS = [
    *tagged_rows(seed_call, "<seed:tool_call>"),
    (seed_call("f", ("a", "\nx")), said("", ("f", r'{"a": "\nx"}'))),
    ("<seed:tool_call>\n<function=f>\nHi", said("Hi", ("f", "{}"))),
    ("<function=f>\n</function>", said("<function=f>\n</function>")),
]
MINIMAX_ROWS = [
    *tagged_rows(minimax_call, "<minimax:tool_call>"),
    *(
        (
            f"Look.\n{minimax_calls(invoke('f'), invoke('g', ('a', '1')), between=between)}{after}",
            said(f"Look.{after.strip()}", ("f", "{}"), ("g", '{"a": 1}')),
        )
        for between in ("\n", "", " \n\n")
        for after in ("", "\n", "\nSo.")
    ),
    (f"<minimax:tool_call>{invoke('f')} Hi", said("Hi", ("f", "{}"))),
    (f"<minimax:tool_call>{invoke('f')}\n<invoke> Hi", said("<invoke> Hi", ("f", "{}"))),
    (f"<minimax:tool_call>{invoke('f')}\n<invoke na", said("", ("f", "{}"))),
    (f"{minimax_call('f')}\n{invoke('f')}", said(invoke("f"), ("f", "{}"))),
    (invoke("f"), said(invoke("f"))),
]
MINICPM_ROWS = [
    *tagged_rows(minicpm_call, "<function"),
    *(
        (minicpm_call("f", (key, written)), said("", ("f", f'{{"{key}": {argument}}}')))
        for key, written, argument in [
            ("a", "<![CDATA[<b>]] </param>\n]]>", r'"<b>]] </param>\n"'),
            ("a", "<![CDATA[]]>", '""'),
            ("a", "<![CDAT", '"<![CDAT"'),
            ("a", "\n", r'"\n"'),
            ("maybe", "<![CDATA[a]]>", '"a"'),
            ("any", "<![CDATA[<]]>", '"<"'),
        ]
    ),
    ("<functional> and <function>", said("<functional> and <function>")),
    ('<function name="f"> Hi', said("Hi", ("f", "{}"))),
]
GLM_ROWS = [
    *tagged_rows(glm_call),
    (glm_call("f", ("a", "x"), ("n", "5"), space=""), said("", ("f", TWO))),
    ("<tool_call>f\nHi", said("<tool_call>f\nHi")),
    ("<tool_call>f<b>", said("<tool_call>f<b>")),
]


def gemma_call(name: str, arguments: str) -> str:
    return f"<|tool_call>call:{name}{arguments}<tool_call|>"


GEMMA_ROWS = [
    *(
        (gemma_call("f", notation), said("", ("f", arguments)))
        for notation, arguments in [
            ("{}", "{}"),
            ('{a:<|"|>x<|"|>,n:5}', TWO),
            ('{a:<|"|><|"|>}', '{"a": ""}'),
            ('{a:<|"|>{"}, [\n: \\ <||> é<|"|>}', r'{"a": "{\"}, [\n: \\ <||> é"}'),
            ("{a:true,b:null,d:-1.5e3}", '{"a": true, "b": null, "d": -1.5e3}'),
            ('{a:[1,[],{}],b:{c:<|"|>x<|"|>}}', '{"a": [1, [], {}], "b": {"c": "x"}}'),
            ('{<|"|>a b<|"|>:1}', '{"a b": 1}'),
        ]
    ),
    (f"Look. {gemma_call('f', '{}')}\n", said("Look.", ("f", "{}"))),
    (gemma_call("f", "{}") + gemma_call("g", "{n:1}"), said("", ("f", "{}"), ("g", '{"n": 1}'))),
    (f"{gemma_call('f', '{}')} Hello", said("Hello", ("f", "{}"))),
    ("<|tool_call>call:f{}", said("", ("f", "{}"))),
    ("<|tool_call>call:f{} Hello", said("Hello", ("f", "{}"))),
    ("<|channel>thought\n<channel|>Hi", said("Hi")),
    ("<|channel>thought\n\nHm.\n<channel|>\nHi", said("Hi", reasoning="Hm.")),
    ("<|channel>Hm.<channel|>", said("", reasoning="Hm.")),
    ("<|channel>thoughtful<channel|>", said("", reasoning="thoughtful")),
    ("<|channel>thought\nHm, <|channel> is<channel|>Hi", said("Hi", reasoning="Hm, <|channel> is")),
    ("Hi<|channel>thought\n<channel|>", said("Hi")),
    ("Hi <channel|>", said("Hi ")),
    (
        f"<|channel>thought\nHm.<channel|>{gemma_call('f', '{}')}<|channel>thought\n<channel|>",
        said("", ("f", "{}"), reasoning="Hm."),
    ),
    (
        gemma_call("f", '{a:<|"|><|channel>x<channel|><|"|>}'),
        said("", ("f", '{"a": "<|channel>x<channel|>"}')),
    ),
    ("<|channel>tho", said()),
    *((text, said(text)) for text in ["<|tool_call>", "a <|tool_call>cal", "<|tool_call>call: x",
                                      "<|tool_call>calls:f{}", "<|tool_call>call:{}"]),
]  # fmt: skip

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGS = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"


def kimi_call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}{name}{CALL_ARGS}{arguments}{CALL_END}"


def kimi_calls(*calls: tuple[str, str], between: str = "") -> str:
    return SECTION + between.join(kimi_call(*call) for call in calls) + SECTION_END


KIMI_ROWS = [
    *(
        (kimi_calls(("functions.f:0", arguments)), said("", ("f", arguments)))
        for arguments in ARGUMENTS
    ),
    *(
        (
            f"Look. {kimi_calls(('functions.f:0', '1'), ('g-2.x:11', '{}'), between=gap)}\n",
            said("Look.", ("f", "1"), ("g-2.x", "{}")),
        )
        for gap in ("", "\n", " \n ")
    ),
    (f"{kimi_calls(('f', '{}'))} So.", said("So.", ("f", "{}"))),
    (kimi_calls(("f:0", "{}")) * 2, said("", ("f", "{}"), ("f", "{}"))),
    (f"{SECTION} {CALL_BEGIN} functions.f:0 {CALL_ARGS}{{}} {CALL_END} {SECTION_END} ",
     said("", ("f", "{}"))),
    (f"{SECTION}{kimi_call('f:0', '{}')} So.", said("So.", ("f", "{}"))),
    (f"{SECTION}{CALL_BEGIN}f:0{CALL_ARGS}{{}} So.", said("So.", ("f", "{}"))),
    (f"{SECTION}{kimi_call('f:0', '{}')}{CALL_BEGIN}g", said("", ("f", "{}"))),
    *(
        (text, said(text))
        for text in [
            f"a {SECTION}",
            f"a {SECTION}{CALL_BEGIN}functions.f:0",
            f"a {SECTION}{CALL_BEGIN}f g{CALL_ARGS}{{}} b",
            f"a {SECTION}{SECTION_END} b",
            f"a {CALL_BEGIN}f{CALL_ARGS}{{}} b",
        ]
    ),
]  # fmt: skip

DEEPSEEK_BEGIN, DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def deepseek_call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def deepseek_calls(*calls: tuple[str, str]) -> str:
    return DEEPSEEK_BEGIN + "".join(deepseek_call(*call) for call in calls) + DEEPSEEK_END


DEEPSEEK_ROWS = [
    *((deepseek_calls(("f", one)), said("", ("f", one))) for one in ARGUMENTS),
    (
        f"Look. {deepseek_calls(('f', '1'), ('g', '{}'))} So.",
        said("Look.So.", ("f", "1"), ("g", "{}")),
    ),
    (f"a {DEEPSEEK_BEGIN}", said(f"a {DEEPSEEK_BEGIN}")),
    (deepseek_call("f", "{}"), said(deepseek_call("f", "{}"))),
]

NESTED = '{"a": {"b": "}\\""}}'
MISTRAL_ROWS = [
    ("Hello [1] ", said("Hello [1] ")),
    *(
        (f'[TOOL_CALLS] [{{"name": "f", "arguments": {arguments}}}]', said("", ("f", arguments)))
        for arguments in ARGUMENTS
    ),
    ('[TOOL_CALLS][{"name":"f","arguments":{}}]', said("", ("f", "{}"))),
    ('[TOOL_CALLS] [{"arguments": {"a": 1}, "name": "f"}]', said("", ("f", '{"a": 1}'))),
    (r'[TOOL_CALLS] [{"name": "f", "arguments": "{\"a\": 1}"}]', said("", ("f", '{"a": 1}'))),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]', said("", ("f", "{}"))),
    (
        f'Look: [TOOL_CALLS] [{{"name": "f", "arguments": {NESTED}}}, '
        '{"name": "g", "arguments": [2]}] ',
        said("Look:", ("f", NESTED), ("g", "[2]")),
    ),
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": 1}] [TOOL_CALLS] [{"name": "g"}] So.',
        said("So.", ("f", "1"), ("g", "{}")),
    ),
    *(
        (text, said(text))
        for text in [
            "a [TOOL_CALLS",
            "a [TOOL_CALLS]",
            "a [TOOL_CALLS] [",
            "a [TOOL_CALL] [] b",
            "a [TOOL_CALLS] [] b",
            'a [TOOL_CALLS] [{"x": 1}] b',
            'a [TOOL_CALLS] ["f", {}] b',
            "The token [TOOL_CALLS] begins a list. ",
        ]
    ),
]  # fmt: skip

MISTRAL_V11_ROWS = [
    *(
        (f"[TOOL_CALLS]f[ARGS]{arguments}", said("", ("f", arguments)))
        for arguments in ARGUMENTS
        if arguments != "null"
    ),
    ("Hm. [TOOL_CALLS]f[ARGS]{} ", said("Hm.", ("f", "{}"))),
    (
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g-2.x[ARGS]{}',
        said("", ("f", '{"a": 1}'), ("g-2.x", "{}")),
    ),
    ("[TOOL_CALLS]f[ARGS]5[TOOL_CALLS]g[ARGS]true so", said("so", ("f", "5"), ("g", "true"))),
    ("[TOOL_CALLS]f[CALL_ID]ab3DE6789[ARGS]{}", said("", ("f", "{}"))),
    ('[TOOL_CALLS]f{"a": "{"}', said("", ("f", '{"a": "{"}'))),
    ("[TOOL_CALLS] f[ARGS] {}\n", said("", ("f", "{}"))),
    ("[TOOL_CALLS]été[ARGS]{}", said("", ("été", "{}"))),
    *(
        (text, said(text))
        for text in [
            "a [TOOL_CALLS]f",
            "a [TOOL_CALLS]f[AR",
            "a [TOOL_CALLS]f[ARGS]",
            "a [TOOL_CALLS]f[OTHER]{} b",
            "a [TOOL_CALLS][ARGS]{} b",
            "a [TOOL_CALLS] f g {} b",
        ]
    ),
]  # fmt: skip


def nemotron_call(name: str, arguments: str) -> str:
    return f'<TOOLCALL>[{{"name": "{name}", "arguments": {arguments}}}]</TOOLCALL>'


NEMOTRON_ROWS = [
    ("Hello [1] ", said("Hello [1] ")),
    *((nemotron_call("f", arguments), said("", ("f", arguments))) for arguments in ARGUMENTS),
    (f"Look.\n{nemotron_call('f', NESTED)}\n", said("Look.", ("f", NESTED))),
    (nemotron_call("f", "{}") + nemotron_call("g", "1"), said("", ("f", "{}"), ("g", "1"))),
    (f"{nemotron_call('f', '{}')} So.", said("So.", ("f", "{}"))),
    (
        '<TOOLCALL>[{"name": "f", "arguments": 1}, {"name": "g", "arguments": [2]}]</TOOLCALL>',
        said("", ("f", "1"), ("g", "[2]")),
    ),
    ('<TOOLCALL> [ {"name":"f","arguments":{}} ] </TOOLCALL>', said("", ("f", "{}"))),
    ('<TOOLCALL>[{"name": "f", "arguments": {}, "id": "7"}]</TOOLCALL>', said("", ("f", "{}"))),
    ('<TOOLCALL>[{"arguments": {"a": 1}, "name": "f"}]</TOOLCALL>', said("", ("f", '{"a": 1}'))),
    # lists that are not closed
    ('<TOOLCALL>[{"name": "f", "arguments": {}}]', said("", ("f", "{}"))),
    ('<TOOLCALL>[{"name": "f", "arguments": {}}] So.', said("So.", ("f", "{}"))),
    ('<TOOLCALL>[{"name": "f", "arguments": {}}', said("", ("f", "{}"))),
    *(
        (text, said(text))
        for text in [
            "a <TOOLCALL>",
            "a <TOOLCALL> is a tag",
            "a <TOOLCALL>[",
            "a <TOOLCALL>[1]</TOOLCALL>",
            'a <TOOLCALL>[{"x": 1}]</TOOLCALL>',
            'a <TOOLCALL>{"name": "f", "arguments": {}}</TOOLCALL>',
            "a </TOOLCALL> b",
        ]
    ),
]  # fmt: skip

GRANITE_ROWS = [
    ('<|tool_call|>[{"name": "f", "arguments": {}}]\n', said("", ("f", "{}"))),
    ('<|tool_call|> [{"arguments": 1, "name": "f"}] So.', said("So.", ("f", "1"))),
    (f'So. <|tool_call|>[{{"name": "f", "arguments": {NESTED}}}]', said("So.", ("f", NESTED))),
    (f'So. <tool_call>[{{"name": "f", "arguments": {NESTED}}}]', said("So.", ("f", NESTED))),
    (
        '<tool_call>[{"name": "f"}]<|tool_call|>[{"name": "g"}]',
        said("", ("f", "{}"), ("g", "{}")),
    ),
    ("a <tool_call> and <|tool_call|> b", said("a <tool_call> and <|tool_call|> b")),
]

APRIEL_ROWS = [
    ("Hello \n", said("Hello \n")),
    ("Hello\n[END FINAL RESPONSE]\n", said("Hello")),
    ("Hello[END FINAL RESPONSE]", said("Hello")),
    ("a [END FINAL RESPONSE] b", said("ab")),
    ("Hello [END FINAL RES", said("Hello [END FINAL RES")),
    (
        'Look.\n<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>',
        said("Look.", ("f", "{}")),
    ),
    (
        '<tool_calls>[{"name": "f", "arguments": "[END FINAL RESPONSE]"}]</tool_calls>\n'
        "[END FINAL RESPONSE]",
        said("", ("f", '"[END FINAL RESPONSE]"')),
    ),
]


def command_call(name: str, arguments: str, number: int = 0) -> str:
    call = f'{{"tool_call_id": "{number}", "tool_name": "{name}", "parameters": {arguments}}}'
    return f"<|START_ACTION|>[\n    {call}\n]<|END_ACTION|>"


COMMAND_ROWS = [
    ("<|START_RESPONSE|>Hello <b> | <|END_RESPONSE|>", said("Hello <b> |")),
    ("<|START_RESPONSE|>Hello", said("Hello")),
    ("Hello<|END_RESPONSE|>", said("Hello")),
    (" \n<|START_RESPONSE|> Hello <|END_RESPONSE|> \n", said("Hello")),
    ("Hello ", said("Hello ")),
    ("a <|START_RES", said("a <|START_RES")),
    ("<|START_<|START_RESPONSE|>RESPONSE|>", said("<|START_RESPONSE|>")),
    *((command_call("f", arguments, 12), said("", ("f", arguments))) for arguments in ARGUMENTS),
    (
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {}},\n'
        '    {"tool_call_id": "1", "tool_name": "g", "parameters": [2]}\n]<|END_ACTION|>',
        said("", ("f", "{}"), ("g", "[2]")),
    ),
    ('<|START_ACTION|>[{"tool_name": "f", "parameters": 1}]', said("", ("f", "1"))),
    ('<|START_ACTION|>[{"parameters": 1, "tool_name": "f"}]', said("", ("f", "1"))),
    (
        f"<|START_RESPONSE|>So.<|END_RESPONSE|>{command_call('f', NESTED)}",
        said("So.", ("f", NESTED)),
    ),
    (
        command_call("f", '{"a": "<|END_RESPONSE|>"}'),
        said("", ("f", '{"a": "<|END_RESPONSE|>"}')),
    ),
]  # fmt: skip

LLAMA3_ROWS = [
    ("Hello", said("Hello")),
    (" \nHello ", said(" \nHello ")),
    *(
        (f'{{"name": "f", "parameters": {arguments}}}', said("", ("f", arguments)))
        for arguments in ARGUMENTS
    ),
    ('<|python_tag|>{"name": "f", "parameters": {}}', said("", ("f", "{}"))),
    ('\n\n<|python_tag|> {"name": "f", "parameters": {}}\n', said("", ("f", "{}"))),
    ('{"type": "function", "name": "f", "parameters": {}}', said("", ("f", "{}"))),
    ('{"name": "get_weather", "parameters": {}}', said("", ("get_weather", "{}"))),
    (r'{"name": "f", "parameters": "{\"a\": 1}"}', said("", ("f", '{"a": 1}'))),
    ('{"name": "f", "parameters": {}}; {"name": "f"}', said('; {"name": "f"}', ("f", "{}"))),
    *(
        (text, said(text))
        for text in [
            '{"name"',
            '{"name": "f", "param',
            '{"name": "Bob", "age": 3}',
            '{"name": "function", "parameters": {}}',
            '{"name": "f", "arguments": {}}',
            '{"type": "object", "properties": {}}',
            'Call: {"name": "f", "parameters": {}}',
            "<|python_tag|>print(1)",
            "<|python_ta",
            "{}",
            "[]",
        ]
    ),
]  # fmt: skip

ANALYSIS = "<|channel|>analysis<|message|>"
COMMENTARY = "<|channel|>commentary"
FINAL = "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"

HARMONY_ROWS = [
    (f"{FINAL}Hello <b> | \n", said("Hello <b> | \n")),
    (f"{FINAL}Hello<|return|>", said("Hello")),
    (f"{ANALYSIS}Hm. {NEXT}{FINAL}Hi", said("Hi", reasoning="Hm. ")),
    (f"{ANALYSIS}One.{NEXT}{ANALYSIS}Two.{NEXT}{FINAL}Hi", said("Hi", reasoning="One.\n\nTwo.")),
    (f"{COMMENTARY}<|message|>I look.{NEXT}{FINAL}Equal.", said("I look.\n\nEqual.")),
    (
        f"{ANALYSIS}One.{NEXT}{FINAL}I look."
        f"{NEXT}{ANALYSIS}{NEXT}{ANALYSIS}Two.{NEXT}{FINAL}Equal.",
        said("I look.\n\nEqual.", reasoning="One.\n\nTwo."),
    ),
    (f"{FINAL}{NEXT}{FINAL}Equal.", said("Equal.")),
    (f"{FINAL}One.<|end|>Two.", said("One.\n\nTwo.")),
    *(
        (
            f"{COMMENTARY} to=functions.f <|constrain|>json<|message|>{arguments}<|call|>",
            said("", ("f", arguments)),
        )
        for arguments in ARGUMENTS
    ),
    (
        f"{ANALYSIS}Hm.{NEXT}{COMMENTARY} to=functions.get_weather<|message|>{NESTED}",
        said("", ("get_weather", NESTED), reasoning="Hm."),
    ),
    (
        f"{COMMENTARY}<|message|>I look.{NEXT}{COMMENTARY} to=functions.f json<|message|>{{}}",
        said("I look.", ("f", "{}")),
    ),
    (f" to=functions.f{COMMENTARY} json<|message|>{{}}", said("", ("f", "{}"))),
    (
        f"{ANALYSIS}Hm.{NEXT} to=functions.f{COMMENTARY} <|constrain|>json<|message|>{{}}",
        said("", ("f", "{}"), reasoning="Hm."),
    ),
    (
        f"{COMMENTARY} to=functions.f<|message|>{{}}<|call|><|start|>assistant"
        f"{COMMENTARY} to=functions.get_weather<|message|>[1]",
        said("", ("f", "{}"), ("get_weather", "[1]")),
    ),
    # nobody asked for these
    (f"{COMMENTARY} to=functions.g<|message|>{{}}<|call|>", said(reasoning="{}")),
    (f"{COMMENTARY} to=python code<|message|>1 + 1{NEXT}{FINAL}2", said("2", reasoning="1 + 1")),
    # an answer that leaves the format
    ("Hello", said("Hello")),
    (" to be or not to=be", said(" to be or not to=be")),
    ("<b>Hello</b> <|", said("<b>Hello</b> <|")),
    ("<|end|>Hello", said("Hello")),
    (f"{ANALYSIS}Hm.<|end|>Hello", said("Hello", reasoning="Hm.")),
    (f"{FINAL}In <|start|>assistant{FINAL}!", said(f"In <|start|>assistant{FINAL}!")),
    (f"{COMMENTARY}{ANALYSIS}Hm.{NEXT}{FINAL}Hi", said("Hi", reasoning="Hm.")),
    (f"{COMMENTARY} to=assistant{FINAL}Hi", said("Hi")),
    (f"{FINAL}a <|message|> b <|constrain|> c", said("a <|message|> b <|constrain|> c")),
    # half a header is no text
    ("<|channel|>fin", said()),
    (f"{ANALYSIS}Hm.<|end|><|start|>assis", said(reasoning="Hm.")),
]  # fmt: skip

THINK_ROWS = [
    ("Hello", said("Hello")),
    (" \n Hello ", said(" \n Hello ")),
    ("<think>Hm.</think>Hello", said("Hello", reasoning="Hm.")),
    ("\n<think>\n Hm. \n\n Oh. \n</think>\n\n Hi \n", said("Hi \n", reasoning="Hm. \n\n Oh.")),
    ("<think>\n\n</think>\n\nHello", said("Hello")),
    ("<think></think>", said()),
    ("<think>a < b </ c </thin </think>Hello", said("Hello", reasoning="a < b </ c </thin")),
    ("<think>a <think> b</think>Hello", said("Hello", reasoning="a <think> b")),
    ("<think>Hm.</think><think>Hello</think>", said("<think>Hello</think>", reasoning="Hm.")),
    ("<think>Hm.", said(reasoning="Hm.")),
    ("<think>Hm.</thin", said(reasoning="Hm.</thin")),
    *(
        (text, said(text))
        for text in [
            " ",
            " <thin",
            "<thinking>Hm.</thinking>",
            "</think>Hello",
            "Hello <think>Hm.</think>",
            "a <think> and a </think> ",
        ]
    ),
]  # fmt: skip

OPEN_THINK_ROWS = [
    ("Hm.\n</think>\n\nHello", said("Hello", reasoning="Hm.")),
    ("</think>Hello", said("Hello")),
    ("<think>Hm.</think>Hello", said("Hello", reasoning="<think>Hm.")),
    (" Hm. ", said(reasoning="Hm. ")),
    ("\n", said()),
]

THINK_AND_CALL_ROWS = [
    (
        f"<think>\nI could <tool_call>.\n</think>\n\n{hermes_call('f', '{}')}",
        said("", ("f", "{}"), reasoning="I could <tool_call>."),
    ),
    (
        f"<think>{hermes_call('f', '{}')}</think>So.\n{hermes_call('g', '1')}",
        said("So.", ("g", "1"), reasoning=hermes_call("f", "{}")),
    ),
    (f"<think>Hm.{hermes_call('f', '{}')}", said(reasoning="Hm." + hermes_call("f", "{}"))),
    (hermes_call("f", '{"a": "<think>"}'), said("", ("f", '{"a": "<think>"}'))),
]

INLINE_ROWS = [
    ("Hello", said("Hello")),
    ("<think>Hm.</think>\n\nHello", said("<think>\nHm.\n</think>\n\nHello")),
    ("<think></think>Hello", said("Hello")),
    ("<think>Hm. ", said("<think>\nHm. ")),
    (
        f"<think>Hm.</think>{hermes_call('f', '{}')}",
        said("<think>\nHm.\n</think>\n\n", ("f", "{}")),
    ),
]

ONLY_FIRST_ROWS = [
    ('{"a": "<tool_call>"}', said('{"a": "<tool_call>"}')),
    (f"  {hermes_call('f', '{}')}", said("", ("f", "{}"))),
    (f"{hermes_call('f', '1')}\n{hermes_call('g', '2')}", said("", ("f", "1"), ("g", "2"))),
    (f"a {hermes_call('f', '{}')}", said(f"a {hermes_call('f', '{}')}")),
    (
        f"{hermes_call('f', '{}')}a{hermes_call('g', '{}')}",
        said(f"a{hermes_call('g', '{}')}", ("f", "{}")),
    ),
]


@pytest.mark.parametrize(
    ("make", "raw", "message"),
    [
        *rows(PlainText, ("", said()), (" <think> <tool_call> ", said(" <think> <tool_call> "))),
        *rows(HERMES, *HERMES_ROWS),
        *rows(of_family("hermes", only_first=True), *ONLY_FIRST_ROWS),
        *rows(MISTRAL, *MISTRAL_ROWS, *MISTRAL_V11_ROWS),  # one splitter takes both forms
        *rows(NEMOTRON, *NEMOTRON_ROWS),
        *rows(GRANITE, *GRANITE_ROWS),
        *rows(APRIEL, *APRIEL_ROWS),
        *rows(COMMAND, *COMMAND_ROWS),
        *rows(LLAMA3, *LLAMA3_ROWS),
        *rows(CODER, *CODER_ROWS),
        *rows(SEED, *SEED_ROWS),
        *rows(MINIMAX, *MINIMAX_ROWS),
        *rows(MINICPM, *MINICPM_ROWS),
        *rows(GLM, *GLM_ROWS),
        *rows(KIMI, *KIMI_ROWS),
        *rows(DEEPSEEK, *DEEPSEEK_ROWS),
        *rows(GEMMA, *GEMMA_ROWS),
        *rows(HARMONY, *HARMONY_ROWS),
        *rows(thinking(), *THINK_ROWS),
        *rows(thinking(is_open=True), *OPEN_THINK_ROWS),
        *rows(thinking(HERMES), *THINK_ROWS, *THINK_AND_CALL_ROWS),
        *rows(inline(thinking(HERMES)), *INLINE_ROWS),
        *rows(
            inline(HARMONY),
            (f"{ANALYSIS}Hm.{NEXT}{FINAL}Hi", said("<think>\nHm.\n</think>\n\nHi")),
        ),
    ],
)  # fmt: skip
def test_an_answer_is_read_the_same_however_it_is_cut(
    make: Make, raw: str, message: Message
) -> None:
    assert read(make, raw)[0] == message


def test_a_call_as_long_as_a_book_is_read_the_same_however_it_is_cut() -> None:
    arguments = '{"text":"' + "é{" * 3000 + '", "n":1.0}'
    raw = hermes_call("f", arguments)
    expected = said("", ("f", arguments))
    assert fed(HERMES, [raw])[0] == expected
    for size in (1, 7, 990, 1010, 5000):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert fed(HERMES, pieces)[0] == expected


# what is there already goes out


def test_text_comes_at_once_but_for_what_may_begin_a_mark() -> None:
    splitter = HERMES()
    outs = [
        message_of(splitter.feed(piece)).text for piece in ["Let me ", "look <", "b> ", "x <tool"]
    ]
    assert outs == ["Let me", " look", " <b>", " x"]


def test_arguments_come_piece_by_piece_behind_the_name() -> None:
    splitter = HERMES()
    assert splitter.feed('<tool_call>\n{"name": "f", "argum') == []
    begun = message_of(splitter.feed('ents": {"a": "x'))
    assert begun == said("", ("f", '{"a": "x'))
    assert message_of([*splitter.feed('y"'), *splitter.feed("}}\n</tool_call>")][:0]) == said()


def test_a_tag_in_prose_does_not_hold_back_what_follows() -> None:
    for make, opener in (
        (HERMES, "<tool_call>"), (MISTRAL, "[TOOL_CALLS]"), (CODER, "<tool_call>"),
        (SEED, "<seed:tool_call>"), (MINIMAX, "<minimax:tool_call>"), (GLM, "<tool_call>"),
        (MINICPM, "<function"), (GEMMA, "<|tool_call>"), (KIMI, SECTION),
        (NEMOTRON, "<TOOLCALL>"),
    ):  # fmt: skip
        splitter = make()
        text = f"The tag {opener} is a word,"
        assert message_of(splitter.feed(text)).text == text


def reasons_at(splitter: Splitter, *pieces: str) -> list[bool]:
    states = []
    for piece in pieces:
        splitter.feed(piece)
        states.append(splitter.is_reasoning)
    return states


def test_thoughts_are_told_as_such_while_they_come() -> None:
    states = reasons_at(thinking()(), "<thi", "nk>", "Hm.", "</think>", "\n\n", "Hello")
    assert states == [False, True, True, False, False, False]


@pytest.mark.parametrize("family", sorted(BY_NAME.keys() - {"harmony"}))
def test_every_family_tells_when_it_thinks(family: str) -> None:
    tags = BY_NAME[family].reasoning("<think></think> <|channel> <channel|>")
    assert tags
    splitter = BY_NAME[family].splitter(FUNCTIONS, only_first=False, tags=tags, is_open=False)
    states = reasons_at(splitter, tags.open, "Hm.", tags.close, "Hello")
    assert states == [True, True, False, False]


def test_a_harmony_answer_thinks_until_its_next_message_has_begun() -> None:
    pieces = [ANALYSIS, "Hm.", "<|end|>", "<|start|>assistant", FINAL, "Hi"]
    states = reasons_at(HARMONY(), *pieces)
    assert states == [True, True, True, True, False, False]


# answers that break off

BEFORE_CALLS = {  # with the call that follows
    "hermes": (HERMES, f"Look. {hermes_call('f', NESTED)}"),
    "thoughts": (thinking(HERMES, is_open=True), f"Hm.</think>{hermes_call('f', NESTED)}"),
    "mistral": (MISTRAL, f'Look. [TOOL_CALLS] [{{"name": "f", "arguments": {NESTED}}}]'),
    "mistral-v11": (MISTRAL, f"Look. [TOOL_CALLS]f[ARGS]{NESTED}"),
    "gemma4": (GEMMA, 'Look. <|tool_call>call:f{a:{b:<|"|>}"<|"|>}}<tool_call|>'),
    "deepseek-v3.1": (DEEPSEEK, f"Look. {deepseek_calls(('f', NESTED))}"),
    "kimi-k2": (KIMI, f"Look. {kimi_calls(('functions.f:0', NESTED))}"),
    "lfm2": (
        LFM2,
        f'Look. <|tool_call_start|>[{{"name": "f", "arguments": {NESTED}}}]<|tool_call_end|>',
    ),
    "granite3": (GRANITE, f'Look. <|tool_call|>[{{"name": "f", "arguments": {NESTED}}}]'),
    "nemotron2": (NEMOTRON, f"Look. {nemotron_call('f', NESTED)}"),
    "llama3": (LLAMA3, f'\n<|python_tag|>{{"name": "f", "parameters": {NESTED}}}'),
    "harmony": (
        HARMONY,
        f"{ANALYSIS}Hm.{NEXT}{COMMENTARY} to=functions.f <|constrain|>json<|message|>{NESTED}",
    ),
}
NO_TEXT = re.compile(r"</think>|<\|(start|channel)\|>.*?(<\|message\|>|$)|<\|end\|>")


@pytest.mark.parametrize(("make", "raw"), BEFORE_CALLS.values(), ids=BEFORE_CALLS)
def test_an_answer_that_breaks_off_keeps_what_came(make: Make, raw: str) -> None:
    whole, is_calling = fed(make, [raw])
    assert (whole.calls, is_calling) == ([Call("f", NESTED)], False)
    for n in range(len(raw)):
        part, is_calling = read(make, raw[:n])
        if part.calls:
            (call,) = part.calls
            assert NESTED.startswith(call.arguments)
            assert is_calling or call.arguments == NESTED
            assert (part.text, part.reasoning) == (whole.text, whole.reasoning)
        else:
            assert part.reasoning + part.text == NO_TEXT.sub("", raw[:n])


def test_half_a_list_of_calls_is_calling_only_in_a_call() -> None:
    begun = '[TOOL_CALLS] [{"name": "f", "arguments": {}'
    assert fed(MISTRAL, [begun]) == (said("", ("f", "{}")), True)
    assert fed(MISTRAL, [f"{begun}}}, "]) == (said("", ("f", "{}")), False)
    assert fed(MISTRAL, [f'{begun}}}, {{"na']) == (said('{"na', ("f", "{}")), True)


def test_what_follows_the_arguments_of_a_whole_call_does_not_begin_it_again() -> None:
    for make, raw in (
        (HARMONY, f"{COMMENTARY} to=functions.f<|message|>{{}}"),
        (LLAMA3, '{"name": "f", "parameters": {}}'),
        (HERMES, hermes_call("f", "{}")),
    ):
        splitter = make()
        message_of(splitter.feed(raw))
        for piece in ("\n", "\n"):
            splitter.feed(piece)
            assert not splitter.is_calling


# one call as an object


def objects(raw: str) -> tuple[Message, str | None]:
    reader = CallReader()
    events: list[Any] = []
    for n, char in enumerate(raw):
        more, rest = reader.feed(char)
        events += more
        if rest is not None:
            return message_of(events), rest + raw[n + 1 :]
    return message_of(events), None


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("form", [
    '{{"name": "f", "arguments": {}}}',
    '{{"name":"f","arguments":{}}}',
    ' {{ "name" : "f" , "parameters" : {} , "more" : [{{}}] }}',
    '{{"type": "function", "name": "f", "arguments": {}}}',
])  # fmt: skip
def test_a_call_gives_back_what_comes_after_it(form: str, arguments: str) -> None:
    raw = form.format(arguments)
    assert objects(raw + " after") == (said("", ("f", arguments)), " after")
    reader = CallReader()
    events, rest = reader.feed(raw + " after")
    assert (message_of(events), rest) == (said("", ("f", arguments)), " after")
    assert reader.is_call


@pytest.mark.parametrize("raw", ["]", "x", '"text"', "5 ", '{"x": 1}', "{}", "{]"])
def test_what_is_no_call_is_there_to_be_taken_back(raw: str) -> None:
    reader = CallReader()
    events, rest = reader.feed(f" {raw}")
    assert (events, reader.is_call) == ([], False)
    assert rest is not None
    assert reader.raw + rest == f" {raw}"


# the end of a JSON value


@pytest.mark.parametrize("value", [*ARGUMENTS, '"a \\" b"', "0", "-1.5e3", "true", '""', "[[]]"])
def test_a_json_value_ends_where_it_ends(value: str) -> None:
    for before in ("", " \n"):
        for after in (" ", ",", "}", "]", "<", "[x"):
            raw = before + value + after
            assert JsonSpan().feed(raw) == len(before + value)
            span = JsonSpan()
            ends = [n for n, char in enumerate(raw) if span.feed(char) is not None and n]
            n_last = len(before + value) - (value[-1] in '}]"')
            assert ends[0] == n_last
            assert span.has_ended
            assert span.feed("{") == 0  # nothing more belongs to it


# any text

PIECES = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool_", "{", "}", '"', "\\", '{"name": "f"',
               ', "arguments": ', hermes_call("f", '{"a": "}"}'), "<think>", "</think>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL", "[", "]", "{", "}", "f", ", ", '"',
                '{"name": "f", "arguments": {}}'],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>", "<|tool_", "[", "]", "{", "}", "f", ", ",
             '"', '{"name": "f", "arguments": {}}'],
    "granite3": ["<|tool_call|>", "<tool_call>", "<|tool_", "[", "]", "{", "}", "f", ", ", '"',
                 '{"name": "f", "arguments": {}}'],
    "nemotron2": ["<TOOLCALL>", "</TOOLCALL>", "<TOOL", "[", "]", "{", "}", "f", ", ", '"',
                  '{"name": "f", "arguments": {}}'],
    "apriel": ["<tool_calls>", "</tool_calls>", "<tool_", "[END FINAL RESPONSE]", "[END ", "[",
               "]", '"', '{"name": "f", "arguments": {}}'],
    "command": ["<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
                "<|START_", "RESPONSE|>", "[", "]", '{"tool_call_id": "0", ', '"tool_name": "f", ',
                '"parameters": {}}', "}"],
    "llama3": ["<|python_tag|>", '{"name": "f"', ', "parameters": ', "{", "}", '"', "<|", "; "],
    "harmony": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>",
                "assistant", "analysis", "final", "commentary", " to=functions.f", "{", "}", '"',
                "<|", " to"],
    "qwen3-coder": ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>\n",
                    "<parameter=n>\n", "\n</parameter>\n", "</", "<fun", "5", '"', "f", "[", "]"],
    "seed-oss": ["<seed:tool_call>", "</seed:tool_call>", "<function=f>", "</function>",
                 "<parameter=a>", "<parameter=n>", "</parameter>\n", "</", "<fun", "5", '"', "f"],
    "minimax-m2": ["<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', "f", '">',
                   '<parameter name="a">', '<parameter name="n">', "</parameter>", "</invoke>",
                   "</", "<inv", "5", '"'],
    "minicpm5": ["<function", ' name="', "f", '">', '<param name="a">', '<param name="n">', "5",
                 "</param>", "</function>", "<![CDATA[", "]]>", "<![CD", '"'],
    "kimi-k2": [SECTION, SECTION_END, CALL_BEGIN, CALL_ARGS, CALL_END, "<|tool_call", "functions.",
                "f", ":0", "{", "}", '"', "[", "]"],
    "glm": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
            "a", "n", "f", "<", "5", '"', "[", "]"],
    "gemma4": ["<|tool_call>", "<tool_call|>", "call:f{", "call:", '<|"|>', "{", "}", "[", "]", ":",
               ",", "f", "5", '"', "<|", "<|channel>", "<channel|>", "thought\n"],
}  # fmt: skip
MAKES = {"hermes": HERMES, "mistral": MISTRAL, "llama3": LLAMA3, "harmony": HARMONY,
         "qwen3-coder": CODER, "seed-oss": SEED, "glm": GLM, "gemma4": GEMMA,
         "lfm2": LFM2, "minimax-m2": MINIMAX, "minicpm5": MINICPM, "kimi-k2": KIMI,
         "granite3": GRANITE, "nemotron2": NEMOTRON, "apriel": APRIEL,
         "command": COMMAND}  # fmt: skip
MAKES |= {f"{name} in thoughts": thinking(make, is_open=True) for name, make in MAKES.items()}
MAKES |= {f"{name} inline": inline(thinking(make)) for name, make in MAKES.items()}


@pytest.mark.parametrize("name", MAKES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_text_is_read_the_same_however_it_is_cut(name: str, data: st.DataObject) -> None:
    pieces = [*PIECES[name.split()[0]], "<think>", "</think>", "ж", " ", "\n"]
    said_so = data.draw(st.lists(st.sampled_from(pieces), max_size=14))
    raw = "".join(said_so)
    whole = fed(MAKES[name], [raw])
    assert fed(MAKES[name], raw) == whole
    assert fed(MAKES[name], said_so) == whole
    cut = data.draw(st.integers(0, len(raw)))
    assert fed(MAKES[name], [raw[:cut], raw[cut:]]) == whole


# pieces that are whole, so that what stands between them is in no call
WHOLES = {
    "hermes": ["<tool_call>", "</tool_call>", "<tool_", '{"x": 1}', hermes_call("f", "{}")],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[TOOL", '[{"x": 1}]', "[TOOL_CALLS]f[ARGS]{}",
                '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>", "<|tool_", '[{"x": 1}]',
             '<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>'],
    "granite3": ["<|tool_call|>", "<tool_call>", "<|tool_", '[{"x": 1}]',
                 '<|tool_call|>[{"name": "f", "arguments": {}}]'],
    "nemotron2": ["<TOOLCALL>", "</TOOLCALL>", "<TOOL", '[{"x": 1}]', nemotron_call("f", "{}")],
    "apriel": ["<tool_calls>", "</tool_calls>", "[END FINAL RESPONSE]", "[END ", '[{"x": 1}]',
               '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>'],
    "command": ["<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
                "<|START_", '[{"x": 1}]', command_call("f", "{}")],
    "llama3": ["<|python_tag|>", "<|", '{"name": "f", "parameters": {}}', '{"name": "g"}'],
    "harmony": ["<|end|>", "<|message|>", ANALYSIS, FINAL, NEXT, "<|call|>",
                f"{COMMENTARY} to=functions.f<|message|>{{}}"],
    "qwen3-coder": ["<tool_call>", "</tool_call>", "<tool_", "<function=", coder_call("f"),
                    coder_call("f", ("a", "x"))],
    "seed-oss": ["<seed:tool_call>", "</seed:tool_call>", "<seed:tool_", "<function=",
                 seed_call("f"), seed_call("f", ("a", "x"))],
    "minimax-m2": ["<minimax:tool_call>", "</minimax:tool_call>", "<minimax", "<invoke",
                   minimax_call("f"), minimax_calls(invoke("f"), invoke("f", ("a", "x")))],
    "minicpm5": ["<function", "<param", "<fun", minicpm_call("f"),
                 minicpm_call("f", ("a", "<![CDATA[<]]>"))],
    "kimi-k2": [SECTION, SECTION_END, CALL_BEGIN, "<|tool", kimi_calls(("f:0", "{}")),
                kimi_calls(("f:0", "{}"), ("f:1", '{"a": 1}'))],
    "glm": ["<tool_call>", "</tool_call>", "<tool_", "<arg_value>", glm_call("f"),
            glm_call("f", ("a", "x"))],
    "gemma4": ["<|tool_call>", "<tool_call|>", "<|tool_", "call:", gemma_call("f", "{}"),
               gemma_call("f", "{n:1}")],
}  # fmt: skip


@pytest.mark.parametrize("name", MAKES)
@settings(max_examples=60)
@given(data=st.data())
def test_no_text_outside_of_calls_is_lost(name: str, data: st.DataObject) -> None:
    pieces = [*WHOLES[name.split()[0]], "<think>", "</think>", "ж", "ж", " "]
    raw = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=14)))
    message, _ = fed(MAKES[name], raw)
    kept = message.text + message.reasoning + "".join(c.name + c.arguments for c in message.calls)
    in_headers = "".join(re.findall(r"<\|start\|>(?:(?!<\|message\|>).)*", raw))
    assert raw.count("ж") - in_headers.count("ж") <= kept.count("ж") <= raw.count("ж")
