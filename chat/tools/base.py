"""What a family of models has to say about tool calls, and what families share."""

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from chat.events import Splitter
from chat.splitter import PlainText, ReasoningSplitter, ReasoningTags
from chat.tools.parameters import Parameters
from engine.grammar_text import pattern
from engine.wire import MAX_GRAMMAR_BYTES, GrammarPart, Segment
from errors import BadRequest

Messages = Sequence[Mapping[str, Any]]

# by the closing one: some templates write no opening one
REASONING_TAGS = (
    ReasoningTags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ReasoningTags("Here is my thought process:", "Here is my response:"),
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<thinking>", "</thinking>"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("<mm:think>", "</mm:think>"),
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as templates take it, and the schema of its arguments."""

    definition: Mapping[str, Any]
    arguments: GrammarPart

    @property
    def name(self) -> str:
        return str(self.definition["function"]["name"])


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call now, and its arguments in the grammar, as Lark."""

    name: str
    arguments: str
    rules: Sequence[str] = ()  # that only these need
    parameters: Parameters | None = None  # where they are written one by one


class Parts:
    """The parts of a grammar, as they are added: each once. Raises BadRequest for too many."""

    def __init__(self) -> None:
        self._parts: list[GrammarPart] = []
        self._rules: dict[tuple[str, str, bool], str] = {}  # whosever they are
        self._size_bytes = 0

    def rule(self, part: GrammarPart) -> str:
        """The rule of a part in the frame."""
        known = part.kind, part.text, part.is_lenient
        if known not in self._rules:
            self._rules[known] = f"@p{len(self._parts)}"
            self._parts.append(part)
            self._size_bytes += len(part.text.encode())
            if self._size_bytes > MAX_GRAMMAR_BYTES:  # the worker would refuse it: no more work
                raise BadRequest(
                    f"Schemas may have {MAX_GRAMMAR_BYTES:,} bytes in all.", param=part.param
                )
        return self._rules[known]

    def all(self) -> tuple[GrammarPart, ...]:
        return tuple(self._parts)


class ToolFormat(ABC):
    """How models of one family are told of tools and call them. Subclasses have no state."""

    name: ClassVar[str]
    opener: ClassVar[str]  # what the first call begins with
    line_openers: ClassVar[tuple[str, ...]] = ()  # others, at the beginning of a line
    visible: ClassVar[tuple[str, ...]] = ()  # control tokens that its splitter looks for
    shows_tools: ClassVar[bool] = True  # the template prints the tools that it is given
    calls_after_text: ClassVar[bool] = True
    thinks_again: ClassVar[bool] = False  # also where the prompt has ended its thoughts
    mixes_with_json: ClassVar[bool] = True  # a call cannot be taken for an answer that is JSON

    @abstractmethod
    def fits(self, template: str) -> bool:
        """The template is of this family."""

    def function(self, tool: Tool, number: int, parts: Parts) -> Function:
        """A tool that may be called, the `number`th, with its parts of the grammar among all.
        Raises BadRequest."""
        return Function(tool.name, parts.rule(tool.arguments))

    def openers(self, functions: Sequence[Function]) -> Sequence[str]:
        """What is always the beginning of a call; none where heads of messages tell."""
        return [self.opener]

    @abstractmethod
    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        """Lark of the rule `calls`: one or more calls, from behind the first opener."""

    @abstractmethod
    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        """A splitter of text and calls. `only_first`: calls come only at the beginning."""

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """The conversation as the family's templates take it."""
        return messages

    def reasoning(self, template: str) -> ReasoningTags | None:
        """The tags of the thoughts, for models that think."""
        return next((tags for tags in REASONING_TAGS if tags.close in template), None)

    def ending(self, tags: ReasoningTags, functions: Sequence[Function]) -> str:
        """What ends thoughts that take too long."""
        return f"\n{tags.close}\n\n"

    def frame(
        self,
        functions: Sequence[Function],
        *,
        answer: str | None,
        is_required: bool,
        is_parallel: bool,
        tags: ReasoningTags | None,
        is_open: bool,
    ) -> str:
        """Lark of a whole answer: thoughts, then calls or, unless they are required, the `answer`:
        a rule, or None for any text, which may also stand before the calls."""

        def body(unlike: str = "") -> str:
            return self.body(functions, answer=answer, is_required=is_required, unlike=unlike)

        rules = [f"body: {body()}", "SPACE: /[ \\n]{1,4}/"]
        if tags is None:
            rules.append("start: body")
        elif is_open:
            rules.append(f"start: «until {tags.close}» SPACE? body")
        else:  # an answer that begins like thoughts is no text
            rules.append(f"start: «spaced {tags.open}» «until {tags.close}» SPACE? body | first")
            rules.append("first: " + body(r"\s*" + pattern(tags.open)))
        if functions:
            rules.append(self.calls(functions, is_parallel=is_parallel))
        return "\n".join(rules)

    def body(
        self, functions: Sequence[Function], *, answer: str | None, is_required: bool, unlike: str
    ) -> str:
        """Lark of what comes after the thoughts. Free text in it does not begin like `unlike`."""
        if is_required:
            return f"«{self.opener}» calls"
        if answer:
            return f"«{self.opener}» calls | {answer}" if functions else answer
        unlike = unlike and f"unlike {unlike} "
        return f"«{unlike}until {self.opener}» calls | «{unlike}»"

    def splitter(
        self,
        functions: Sequence[Function],
        *,
        only_first: bool,
        tags: ReasoningTags | None,
        is_open: bool,
    ) -> Splitter:
        """A splitter of a whole answer."""
        splitter: Splitter = PlainText()
        if functions:
            splitter = self.call_splitter(functions, only_first=only_first)
        return self.thinking_splitter(tags, splitter, is_open=is_open) if tags else splitter

    def thinking_splitter(self, tags: ReasoningTags, rest: Splitter, *, is_open: bool) -> Splitter:
        """A splitter of thoughts, and of the rest by another."""
        return ReasoningSplitter(tags, rest, is_open=is_open)


def add_to_system(turns: list[dict[str, Any]], told: str | tuple[Segment, ...]) -> None:
    """Tell it at the end of the system text, or in one of its own."""
    if not turns or turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": told})
    elif isinstance(told, str):
        turns[0]["content"] += f"\n\n{told}"
    else:
        turns[0]["content"] = (turns[0]["content"], "\n\n", *told)


def one_call_a_turn(messages: Messages) -> list[Mapping[str, Any]]:
    """For templates that take one call in a turn: of several each gets its own, with its result."""
    turns: list[Mapping[str, Any]] = []
    rest = deque(messages)
    while rest:
        turn = dict(rest.popleft())
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            turns.append(turn)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for call in calls:
            turns.append(turn | {"tool_calls": [call]})
            turn = {"role": turn["role"], "content": ""}  # what was said and thought comes once
            own = (r for r in results if r.get("tool_call_id") == call.get("id"))
            if result := next(own, None):
                results.remove(result)
                turns.append(result)
        turns += results
    return turns


def literal(text: str) -> str:
    """A text in Lark, in which no mark of a frame is found."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted.replace("«", "\\u00ab").replace("»", "\\u00bb")


def named(functions: Sequence[Function], key: str) -> str:
    """Lark of the rest of `{"name": `: a name and its arguments, as one object."""
    options = [
        f"{literal(f'{json.dumps(f.name, ensure_ascii=False)}, {json.dumps(key)}: ')} {f.arguments}"
        for f in functions
    ]
    return f"({' | '.join(options)}) {literal('}')}"
