"""A model's chat template: from messages to prompt text, in which clients write no control tokens.

A client's text may hold the literal of a control token, whole or in pieces that a template puts
together: `'<' ~ key ~ '>'`, two messages with nothing between them, a `replace` inside a message.
So the path of single characters is followed:

1. In client text, each character that control tokens are made of, such as `<`, `|` and `>`, gets a
   guard before it: a character that occurs nowhere else.
2. The template renders that text. Constants that it may look for, such as `</think>`, are left
   without guards, so that `split`, `replace` and `in` find them.
3. In the result, a literal of a control token with a guard in it is the client's and becomes a
   segment of its own, to be read as plain text. One without a guard is the template's, and where
   it begins inside one of the client's, that ends there.

Letters and digits have no guard: with `'<|' + role + '|>'` a template makes a token of a role.
Lengths that a template measures count the guards.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.model_file import ModelFile
from engine.wire import Segment
from errors import BadRequest, ModelLoadFailed

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Printable, because a template that prints a dict shows others as an escape; and hardly in use.
_GUARDS = range(0x13000, 0x110000)  # hieroglyphs first

# A template may print tools several times, but not without end.
_MAX_GROWTH = 16
_MAX_OWN_CHARS = 1 << 20


class ChatTemplate:
    """A compiled template. Threads may share it.

    `source` None stands for CHATML. With `add_bos` the vocabulary wants a BOS before a prompt, and
    the worker puts it there, so one that the template begins with is left out. With `in_parts` the
    template takes a message's content as a list of parts: those of models that see do.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str,
        eos_token: str,
        control_tokens: Sequence[str],
        add_bos: bool,
        in_parts: bool = False,
    ) -> None:
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._add_bos = add_bos
        self._in_parts = in_parts
        self.source = CHATML if source is None else source
        environment = _environment()
        try:
            tree = environment.parse(self.source)
            constants = [node.value for node in tree.find_all(nodes.Const)]
            self._template = environment.from_string(tree)
        except (TemplateError, SyntaxError, RecursionError) as error:
            raise ModelLoadFailed(f"The model's chat template does not parse: {error}") from error

        self._control = re.compile(_any_of(control_tokens))
        marks = {char for token in control_tokens for char in token if _is_mark(char)}
        words = {token for token in control_tokens if marks.isdisjoint(token)}
        sought = {
            text
            for text in constants
            if isinstance(text, str) and not self._control.search(text)
            # Not the bare `>` that a template writes rather than looks for.
            if not marks.isdisjoint(text) and any(char.isalnum() for char in text)
        }
        # of what is sought, nothing that a control token could be put together from
        sought = {text for text in sought if not any(text in token for token in control_tokens)}
        self._sought_or_guarded = re.compile(
            f"(?P<control>{self._control.pattern})|(?P<sought>{_any_of(sought)})"
            f"|{_any_of(marks | words)}"
        )
        self._guarded_marks = re.compile(_any_of(marks | words))

    @classmethod
    def from_model_file(cls, model: ModelFile, *, in_parts: bool = False) -> "ChatTemplate":
        return cls(
            model.chat_template,
            bos_token=model.bos_token,
            eos_token=model.eos_token,
            control_tokens=model.control_tokens,
            add_bos=model.add_bos,
            in_parts=in_parts,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime,
        continues: bool = False,
        **extra: Any,
    ) -> list[Segment]:
        """The prompt of messages that are `normalised`: one segment, or more where the client wrote
        a control token's literal. It ends where the model's answer begins or, if it `continues`,
        with the last message's text.

        A content may be a tuple of segments, of which some are not the client's.
        `extra` is for the template, such as tools, and as little trusted as the messages. What
        the template refuses or cannot render raises BadRequest.
        """
        guard = ""
        try:
            client = {"messages": [*messages], "extra": extra}
            text = json.dumps(client, ensure_ascii=False, default=lambda segment: segment.text)
            text.encode()
            unused = (c for c in map(chr, _GUARDS) if c not in text and c not in self.source)
            guard, end = next(unused), next(unused)
            client = _changed(client, lambda text: self._guarded(text, guard))
            if continues:
                client["messages"][-1]["content"] += end
            if self._in_parts:
                for message in client["messages"]:
                    message["content"] = _Parts([{"type": "text", "text": message["content"]}])
            variables = {"tools": None, "documents": None} | client["extra"]
            variables |= {
                "messages": client["messages"],
                "add_generation_prompt": not continues,
                "bos_token": self._bos_token,
                "eos_token": self._eos_token,
                "strftime_now": now.strftime,
            }
            rendered = self._rendered(variables, _MAX_OWN_CHARS + _MAX_GROWTH * len(text))
            if continues:
                if end not in rendered:
                    raise _Refused("The model's chat template cannot continue the last message.")
                rendered = rendered[: rendered.rindex(end)]
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            reason = f"A text has half of a surrogate pair (U+{code:04X}); send whole characters."
            raise BadRequest(reason, param="messages") from None
        except _Refused as error:
            raise BadRequest(str(error).replace(guard, ""), param="messages") from None
        except Exception as error:  # whatever the template's expressions raise
            reason = f"The model's chat template cannot render these messages: {error}"
            raise BadRequest(reason.replace(guard, ""), param="messages") from error
        return self._segments(rendered, guard)

    def _guarded(self, text: str, guard: str) -> str:
        def guarded(match: re.Match[str]) -> str:
            if match["sought"]:
                return match[0]
            return self._guarded_marks.sub(lambda mark: guard + mark[0], match[0])

        return self._sought_or_guarded.sub(guarded, text)

    def _rendered(self, variables: dict[str, Any], max_chars: int) -> str:
        parts = []
        for part in self._template.generate(variables):
            parts.append(part)
            max_chars -= len(part)
            if max_chars < 0:
                raise _Refused("The model's chat template makes far too long a prompt of these.")
        return "".join(parts)

    def _segments(self, rendered: str, guard: str) -> list[Segment]:
        first, *others = rendered.split(guard)
        text, offset = first + "".join(others), len(first)
        guarded = set()
        for part in others:
            guarded.add(offset)
            offset += len(part)

        def is_clients(found: re.Match[str]) -> bool:
            return not guarded.isdisjoint(range(*found.span()))

        segments, start, pos = [], 0, 0
        # Step by one character: a literal of the template may overlap with one of the client.
        while guarded and (found := self._control.search(text, pos)):
            pos = found.start() + 1
            if is_clients(found):
                segments.append(Segment(text[start : found.start()], True))
                inner = (self._control.match(text, at) for at in range(pos, found.end()))
                own = (one.start() for one in inner if one and not is_clients(one))
                start, pos = found.start(), next(own, found.end())
                segments.append(Segment(text[start:pos], False))
                start = pos
        segments.append(Segment(text[start:], True))

        if self._add_bos:  # the first segment is never the client's
            segments[0] = Segment(segments[0].text.removeprefix(self._bos_token), True)
        return [segment for segment in segments if segment.text] or [Segment("", True)]


class _Refused(Exception):
    """The template called raise_exception, or its output has no end. The text is for clients."""


class _Parts(list[dict[str, str]]):
    """A content of one part. Where a template prints it, it is its text: some take parts of users
    and texts of others."""

    def __str__(self) -> str:
        return self[0]["text"]

    def __add__(self, other: Any) -> Any:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"


class _GenerationTag(Extension):
    """`{% generation %}` tells trainers which text is the model's. Here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Templates may add to lists and take from them, as those of Kimi K2 do that are written for
    llama.cpp: their own, or copies that are made for each prompt."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, list) and attr in ("append", "pop"):
            return True
        return super().is_safe_attribute(obj, attr, value)


def _environment() -> _Environment:
    # As apply_chat_template of transformers sets it up: templates are written for that.
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=False,  # whatever is asked for: guards must stay single characters
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def normalised(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as templates expect it: nothing null, no list of no calls, content a text,
    arguments an object, and thoughts under the name that most know."""
    given = {key: value for key, value in message.items() if value is not None}
    if not given.get("tool_calls", True):  # templates ask only whether there is such a list
        del given["tool_calls"]
    content = given.get("content", "")
    if not isinstance(content, str | tuple):
        content = "\n".join(part["text"] for part in content)
    changes: dict[str, Any] = {"content": content}
    if given["role"] == "developer":
        changes["role"] = "system"
    if "tool_calls" in given:
        changes["tool_calls"] = [_with_object(call) for call in given["tool_calls"]]
    if "reasoning" in given:
        changes["reasoning_content"] = given.get("reasoning_content", given["reasoning"])
    return given | changes


def with_names(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages; results of tools with the name of the function, which some templates want."""
    names: dict[str, str] = {}
    turns = []
    for message in messages:
        turn = dict(message)
        names |= {c["id"]: c["function"]["name"] for c in turn.get("tool_calls", ()) if "id" in c}
        name = names.get(turn.get("tool_call_id", ""))
        if turn["role"] == "tool" and name and "name" not in turn:
            turn["name"] = name
        turns.append(turn)
    return turns


def in_order(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages; results of tools in the order of their calls, since many templates show with
    them neither ids nor names."""
    turns: list[Mapping[str, Any]] = []
    places: dict[str | None, int] = {}  # of the calls before, by their ids
    for are_results, group in groupby(messages, lambda message: message["role"] == "tool"):
        run = list(group)
        ids = [turn.get("tool_call_id") for turn in run]
        if are_results and places.keys() >= set(ids):
            run.sort(key=lambda turn: places[turn.get("tool_call_id")])
        turns += run
        places = {call.get("id"): n for n, call in enumerate(run[-1].get("tool_calls", ()))}
    return turns


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):  # an object already, or no JSON
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every string in it changed, keys too; texts put together, where not all is the
    client's."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Segment):
        return value.text if value.parse_special else change(value.text)
    if isinstance(value, tuple):
        return "".join(_changed(part, change) for part in value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    return value


def _is_mark(char: str) -> bool:
    return not (char.isalnum() or char.isspace() or char == "_")


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of all texts, the longest first; of none, one that matches nowhere."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
