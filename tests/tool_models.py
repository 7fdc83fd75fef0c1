"""Models that have tools and write as their families do: for tests of what they may say."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from chat.events import Message
from chat.format import Prompt
from chat.tools.base import Tool
from engine.grammar import Compiler, GrammarState
from engine.wire import GrammarPart
from tests.byte_tokenizer import END, ByteTokenizer
from tests.chat_formats import CONTROL_TOKENS, NAMES, TOOLS, choose, message_of, prompt, user

CITY = '{"city": "Oslo"}'
CALL = ("get_time", CITY)
ANSWER_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                 "additionalProperties": False}  # fmt: skip
ANSWER = GrammarPart("json_schema", json.dumps(ANSWER_SCHEMA), "response_format")
REQUIRED = choose(TOOLS, is_required=True)
TAGGED = {  # a call by its name and arguments, and one of these by its key and value
    "qwen3_coder": (
        "<tool_call>\n<function={}>\n{}</function>\n</tool_call>",
        "<parameter={}>\n{}\n</parameter>\n",
    ),
    "seed_oss": (
        "<seed:tool_call>\n<function={}>\n{}</function>\n</seed:tool_call>",
        "<parameter={}>{}</parameter>\n",
    ),
    "minimax_m2": (
        '<invoke name="{}">\n{}</invoke>',
        '<parameter name="{}">{}</parameter>\n',
    ),
    "minicpm5": ('<function name="{}">{}</function>', '<param name="{}">{}</param>'),
    "glm": (
        "<tool_call>{}\n{}</tool_call>",
        "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
    ),
}
SECTIONS = {  # of several calls
    "minimax_m2": "<minimax:tool_call>\n{}\n</minimax:tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>",
    "deepseek_v3_1": "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
}
IN_SECTIONS = {  # a call by its name, arguments and number
    "kimi_k2": (
        "<|tool_call_begin|>functions.{0}:{2}<|tool_call_argument_begin|>{1}<|tool_call_end|>"
    ),
    "deepseek_v3_1": "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
}
LISTS = {
    "mistral_v3": "[TOOL_CALLS] [LIST]",
    "lfm2": "<|tool_call_start|>[LIST]<|tool_call_end|>",
    "granite3": "<|tool_call|>[LIST]",
    "phi4_mini": "<|tool_call|>[LIST]<|/tool_call|>",
    "nemotron2": "<TOOLCALL>[LIST]</TOOLCALL>",
    "apriel": "<tool_calls>[LIST]</tool_calls>",
}
OPEN_THOUGHTS = ("deepseek_r1", "qwen3_coder", "minimax_m2", "glm", "nemotron2", "apriel")
THINKING = (*OPEN_THOUGHTS, "qwen3", "seed_oss", "minicpm5", "kimi_k2", "gpt_oss", "gemma4",
            "granite3", "command")  # fmt: skip
HERMES = ("qwen2_5", "qwen3", "smollm2", "deepseek_r1")


class Model:
    """Writes as its family does, in a vocabulary in which the family's marks are control tokens or
    text as any other."""

    def __init__(self, template: str, *, has_tokens: bool) -> None:
        self.template = template
        self.has_tokens = has_tokens
        self.tokenizer = ByteTokenizer(*(CONTROL_TOKENS[template] if has_tokens else ()))
        self.compiler = Compiler(self.tokenizer)
        self.thinks = template in THINKING
        self.is_parallel = template not in ("llama3_1", "gpt_oss")  # several calls in a turn

    def __repr__(self) -> str:
        return self.template + ("" if self.has_tokens else " in text")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.tokenize(text, parse_special=True, continues=True)

    def calls(self, *calls: tuple[str, str]) -> str:
        if self.template in HERMES:
            return "\n".join(
                f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
                for name, arguments in calls
            )
        if self.template in TAGGED:
            call, argument = TAGGED[self.template]
            said = "\n".join(
                call.format(name, tagged(argument, arguments)) for name, arguments in calls
            )
            return SECTIONS.get(self.template, "{}").format(said)
        if self.template in IN_SECTIONS:
            call = IN_SECTIONS[self.template]
            said = (call.format(name, arguments, n) for n, (name, arguments) in enumerate(calls))
            return SECTIONS[self.template].format("".join(said))
        if self.template == "gemma4":
            return "".join(
                f"<|tool_call>call:{name}{noted(json.loads(arguments))}<tool_call|>"
                for name, arguments in calls
            )
        if self.template in LISTS:
            each = (f'{{"name": "{call[0]}", "arguments": {call[1]}}}' for call in calls)
            return LISTS[self.template].replace("LIST", ", ".join(each))
        if self.template == "command":
            each = (
                f'\n    {{"tool_call_id": "{n}", "tool_name": "{name}", "parameters": {arguments}}}'
                for n, (name, arguments) in enumerate(calls)
            )
            return f"<|START_ACTION|>[{','.join(each)}\n]<|END_ACTION|>"
        if self.template == "mistral_v11":
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
        ((name, arguments),) = calls
        if self.template == "llama3_1":
            return f'{{"name": "{name}", "parameters": {arguments}}}'
        to = f"<|channel|>commentary to=functions.{name}"
        return f"{to} <|constrain|>json<|message|>{arguments}"

    def answer(self, text: str) -> str:
        if self.template == "command":
            return f"<|START_RESPONSE|>{text}<|END_RESPONSE|>"
        return f"<|channel|>final<|message|>{text}" if self.template == "gpt_oss" else text

    def before_a_call(self, text: str) -> str:
        if self.template == "gpt_oss":
            return f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant"
        return f"{text}\n"

    def thoughts(self, text: str) -> str:
        """And what leads on from them. Some have begun in the prompt."""
        if self.template == "gpt_oss":
            return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"
        if self.template == "gemma4":
            return f"<|channel>thought\n{text}<channel|>"
        if self.template == "seed_oss":
            return f"<seed:think>{text}\n</seed:think>\n\n"
        if self.template == "command":
            return f"<|START_THINKING|>{text}<|END_THINKING|>"
        if self.template == "apriel":
            return f"{text}\n[BEGIN FINAL RESPONSE]\n"
        opening = "" if self.template in OPEN_THOUGHTS else "<think>\n"
        return f"{opening}{text}\n</think>\n\n"

    def asked(self, tools: Sequence[Tool] = TOOLS, **fields: Any) -> "Turn":
        messages = fields.pop("messages", user("Hi"))
        if self.template == "gemma4":  # which thinks if it is asked to
            fields.setdefault("extra", {"enable_thinking": True})
        return Turn(self, prompt(self.template, messages, tools, **fields))


def tagged(form: str, arguments: str) -> str:
    """Arguments one by one; what is no object, as one of a name that no function knows."""
    values = json.loads(arguments)
    values = values if isinstance(values, dict) else {"?": values}
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
    return "".join(form.format(name, text) for name, text in texts.items())


def noted(value: Any) -> str:
    """A value in Gemma's notation."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        keys = {key: noted(key) if " " in key else key for key in sorted(value)}
        return f"{{{','.join(f'{keys[key]}:{noted(value[key])}' for key in keys)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(noted, value))}]"
    return json.dumps(value)


class Turn:
    """What one answer may be. It thinks of nothing unless told."""

    def __init__(self, model: Model, made: Prompt) -> None:
        self.model = model
        self.made = made

    def state(self) -> GrammarState:
        assert self.made.grammar
        return self.model.compiler.compile(self.made.grammar)

    def split(self, raw: str) -> Message:
        splitter = self.made.splitter()
        return message_of([*splitter.feed(raw), *splitter.finish()])

    def says(self, said: str, thoughts: str | None = None) -> Message:
        """How it is read that the model says this, which it may."""
        raw = self.raw(said, thoughts)
        assert self.stop([*self.model.ids(raw), END]) is None
        return self.split(raw)

    def may_begin(self, said: str, thoughts: str | None = None) -> bool:
        return self.stop(self.model.ids(self.raw(said, thoughts))) is None

    def may_say(self, said: str, thoughts: str | None = None) -> bool:
        return self.stop([*self.model.ids(self.raw(said, thoughts)), END]) is None

    def raw(self, said: str, thoughts: str | None = None) -> str:
        if thoughts is not None:
            return self.model.thoughts(thoughts) + said
        thinking = self.made.thinking
        return f"{thinking.close}{said}" if thinking and thinking.is_open else said

    def stop(self, tokens: Iterable[int]) -> int | None:
        """The first token that is not allowed."""
        state = self.state()
        for token in tokens:
            if token not in allowed(state, self.model):
                return token
            state.accept(token)
        return None


def allowed(constraint: Any, model: Model) -> list[int]:
    logits = np.zeros(model.tokenizer.n_vocab, np.float32)
    constraint.apply(logits)
    return [int(token) for token in np.flatnonzero(logits > -np.inf)]


MODELS = {
    (name, has_tokens): Model(name, has_tokens=has_tokens)
    for name in NAMES
    for has_tokens in (True, False)
}
QWEN3, QWEN3_IN_TEXT = MODELS["qwen3", True], MODELS["qwen3", False]
GPT_OSS = MODELS["gpt_oss", True]


def every(**has: bool) -> pytest.MarkDecorator:
    """Of all models, those of this kind."""
    fitting = [
        model
        for model in MODELS.values()
        if all(getattr(model, name) == value for name, value in has.items())
    ]
    return pytest.mark.parametrize("model", fitting, ids=repr)
