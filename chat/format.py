"""How a model chats: its template, its tool calls, its thoughts. From a conversation to what the
worker is asked for, and to a splitter of what comes back."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from chat.events import Splitter
from chat.splitter import ReasoningTags
from chat.template import ChatTemplate, in_order, normalised, with_names
from chat.tools import BY_NAME, FAMILIES
from chat.tools.base import Function, Parts, Tool, ToolFormat
from engine.model_file import ModelFile
from engine.wire import Calls, Grammar, GrammarPart, Segment, Thinking
from errors import BadRequest, ModelLoadFailed, UnsupportedParameter

# what templates call the switch of thinking, and how far it goes
SWITCHES = ("enable_thinking", "thinking")
BUDGETS = {"none": 0, "minimal": 256, "low": 1024, "medium": 8192}  # where it knows no effort
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
COMMON_EFFORTS = ("low", "medium", "high")  # of templates that write whatever they are told


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools may be called now, and whether one must be."""

    names: frozenset[str]
    is_required: bool = False
    is_parallel: bool = True


NO_TOOLS = ToolChoice(frozenset())


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation made ready for the worker."""

    segments: list[Segment]
    grammar: Grammar | None
    thinking: Thinking | None
    visible: list[str]
    calls: Calls | None
    splitter: Callable[[], Splitter]
    idle: tuple[str, ...] = ()  # params that this model has no use for


class ChatFormat:
    """How one model chats. Threads may share it."""

    def __init__(self, model: ModelFile, tool_format: str = "auto") -> None:
        """`tool_format` is the name of a family, or `auto`: by the template. Raises
        ModelLoadFailed."""
        self._with_tools: ChatFormat | None = None
        if model.tool_template and tool_format != "generic":
            only = replace(model, chat_template=model.tool_template, tool_template=None)
            with suppress(ModelLoadFailed):  # the default one has to do
                with_tools = ChatFormat(only, tool_format)
                self._with_tools = with_tools if with_tools._family.shows_tools else None
        self._template = _template_of(model)
        source = self._template.source
        fitting = next(family for family in FAMILIES if family.fits(source))
        chosen = BY_NAME.get(tool_format, fitting)
        # the choice was for the template that shows tools
        self._family: ToolFormat = fitting if model.tool_template and chosen.shows_tools else chosen
        self._tags = self._family.reasoning(source)
        # some write it only before the last user turn
        self._takes_system = all(
            self._shows("system", *turns) or not self._shows(*turns)
            for turns in (["user"], ["user", "assistant"])
        )
        self._takes_later_system = self._shows(
            "system", "user", "assistant", "system", "user", in_order=True
        ) or not self._shows("system", "user", "assistant", "user")
        self._takes_neighbours = self._shows("user", "user") or not self._shows("user")
        self._efforts = self._known_efforts()

    @property
    def thinks(self) -> bool:
        """The model writes thoughts that can be told from its answer."""
        return self._tags is not None

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime,
        tools: Sequence[Tool] = (),
        choice: ToolChoice = NO_TOOLS,
        answer: GrammarPart | None = None,
        effort: str | None = None,
        budget: int | None = None,
        continues: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render a conversation. `answer` says what the text must look like, `effort` and `budget`
        how long the model may think, `extra` goes to the template. With `continues` the answer
        goes on with the last message. Raises BadRequest."""
        if tools and self._with_tools:
            with suppress(BadRequest):  # some of these templates fail on unions of types
                return self._with_tools.prompt(
                    messages,
                    now=now,
                    tools=tools,
                    choice=choice,
                    answer=answer,
                    effort=effort,
                    budget=budget,
                    continues=continues,
                    extra=extra,
                )
        callable_ = [tool for tool in tools if tool.name in choice.names]
        self._check(callable_, choice, answer, continues)
        asked = {"reasoning_effort": effort, "thinking_budget_tokens": budget}
        idle = () if self.thinks else tuple(n for n in asked if asked[n] not in (None, "none", 0))
        switches, budget = self._effort(effort, budget)
        messages = in_order(with_names(normalised(message) for message in messages))
        if not (self._takes_system and self._takes_later_system):
            messages = _without_system(messages, but_first=True)
        turns = self._family.history(messages, [tool.definition for tool in tools])
        if not self._takes_neighbours:
            turns = _alternating(turns)
        segments = self._template.render(
            turns if self._takes_system else _without_system(turns, but_first=False),
            now=now,
            continues=continues,
            tools=[t.definition for t in tools] if tools and self._family.shows_tools else None,
            **switches | dict(extra or {}),
        )
        continued = messages[-1]["content"] if continues else None
        tags, is_open = self._thoughts(segments, continued)
        parts = Parts()
        said = parts.rule(answer) if answer else None
        functions = self._functions(callable_, parts)
        grammar = None
        if answer or functions:
            frame = self._family.frame(
                functions,
                answer=said,
                is_required=choice.is_required,
                is_parallel=choice.is_parallel,
                tags=tags,
                is_open=is_open,
            )
            grammar = Grammar(parts.all(), frame)
        thinking = None
        if tags:
            ending = self._family.ending(tags, functions)
            call = tags.call if functions else ""
            again = self._family.thinks_again and grammar is None  # it has them once
            thinking = Thinking(
                tags.open, tags.close, is_open, budget, ending, tags.heads, tags.body, call, again
            )
        calls = None
        if functions and (openers := self._family.openers(functions)):
            only_first = answer is not None or not self._family.calls_after_text
            calls = Calls(tuple(openers), only_first, self._family.line_openers)
        is_split = tags or functions
        return Prompt(
            segments,
            grammar,
            thinking,
            [*self._family.visible, *([tags.open, tags.close] if tags else [])] if is_split else [],
            calls,
            lambda: self._family.splitter(
                functions, only_first=answer is not None, tags=tags, is_open=is_open
            ),
            idle,
        )

    def _functions(self, tools: Sequence[Tool], parts: Parts) -> list[Function]:
        try:
            return [self._family.function(tool, n, parts) for n, tool in enumerate(tools)]
        except RecursionError:
            raise BadRequest("A schema is nested too deeply.", param="tools") from None

    def _check(
        self,
        functions: Sequence[Tool],
        choice: ToolChoice,
        answer: GrammarPart | None,
        continues: bool,
    ) -> None:
        if answer and functions and not choice.is_required and not self._family.mixes_with_json:
            raise UnsupportedParameter(
                f"This model's calls ({self._family.name}) look like JSON answers; send "
                f"'{answer.param}' without tools, or tool_choice 'required' or 'none'.",
                param=answer.param,
            )
        if continues and answer:
            raise UnsupportedParameter(
                f"'{answer.param}' is about a whole answer and not about the end of one.",
                param=answer.param,
            )
        if continues and functions and (choice.is_required or not self._family.calls_after_text):
            raise UnsupportedParameter(
                "An answer that is continued cannot become a tool call.", param="tools"
            )

    def _effort(self, effort: str | None, budget: int | None) -> tuple[dict[str, Any], int | None]:
        """What the template is told of the effort, and the tokens that thoughts may take."""
        source = self._template.source
        if not self.thinks:
            return {}, None
        switches: dict[str, Any] = {}
        if effort is None:
            return switches, budget
        switches = {name: effort != "none" for name in SWITCHES if name in source}
        if self._efforts:
            asked = EFFORTS.index(effort)
            switches["reasoning_effort"] = min(
                self._efforts,
                key=lambda known: (abs(EFFORTS.index(known) - asked), -EFFORTS.index(known)),
            )
        if budget is None and (effort == "none" or not self._efforts):
            budget = BUDGETS.get(effort)
        return switches, budget

    def _thoughts(
        self, segments: Sequence[Segment], continued: str | None
    ) -> tuple[ReasoningTags | None, bool]:
        """The tags if the model may still think, and whether the prompt ends in its thoughts."""
        tags = self._tags
        if tags is None:
            return None, False
        if continued is not None:
            is_open = continued.rfind(tags.open) > continued.rfind(tags.close)
            return (tags, True) if is_open else (None, False)
        end = "".join(segment.text for segment in segments).rstrip()
        is_over = end.endswith(tags.close) and not self._family.thinks_again
        return (None if is_over else tags), end.endswith(tags.open)

    def _shows(self, *roles: str, in_order: bool = False, **extra: Any) -> bool:
        """The template takes turns of these roles, and the prompt has what each says."""
        try:
            places = _places(self._template, *roles, **extra)
        except BadRequest:
            return False
        return min(places) >= 0 and (places == sorted(places) or not in_order)

    def _known_efforts(self) -> Sequence[str]:
        """Those that the template may be told of; none where it knows no effort."""
        source = self._template.source
        if "reasoning_effort" not in source:
            return ()
        known = [effort for effort in EFFORTS if self._shows("user", reasoning_effort=effort)]
        if 0 < len(known) < len(EFFORTS):
            return known
        # it refuses none, so what it makes of one that it does not name is not known
        return [
            e for e in EFFORTS if e in COMMON_EFFORTS or f"'{e}'" in source or f'"{e}"' in source
        ]


def _template_of(model: ModelFile) -> ChatTemplate:
    """The model's template, given content in the form in which it shows that of users. One that
    refuses the question, since it wants tools for example, takes texts. Raises ModelLoadFailed."""
    in_texts = ChatTemplate.from_model_file(model)
    try:
        if min(_places(in_texts, "user")) >= 0:
            return in_texts
        is_refused = False
    except BadRequest:
        is_refused = True
    in_parts = ChatTemplate.from_model_file(model, in_parts=True)
    with suppress(BadRequest):
        if min(_places(in_parts, "user")) >= 0:
            return in_parts
    if is_refused:
        return in_texts
    raise ModelLoadFailed(
        "The model's chat template leaves out what users say; take a file of the model that has "
        "another template."
    )


def _places(template: ChatTemplate, *roles: str, **extra: Any) -> list[int]:
    """Where the prompt has what turns of these roles say; -1: nowhere. Raises BadRequest."""
    turns = [{"role": role, "content": f"text {n}"} for n, role in enumerate(roles)]
    segments = template.render(turns, now=datetime(2000, 1, 1), **extra)
    prompt = "".join(segment.text for segment in segments)
    return [prompt.find(turn["content"]) for turn in turns]


def _without_system(
    turns: Sequence[Mapping[str, Any]], *, but_first: bool
) -> Sequence[Mapping[str, Any]]:
    """For templates that refuse system texts, or leave them out: all of them, or all but those at
    the beginning, which are one. They are the user's, and of one turn with neighbours, since many
    templates want turns to alternate."""
    told: list[Mapping[str, Any]] = []
    was_system = False
    for turn in turns:
        is_system = turn["role"] == "system"
        last = told[-1]["role"] if told else "system"
        if is_system and not (but_first and last == "system"):
            turn = {**turn, "role": "user"}
        if told and (is_system or was_system) and last == turn["role"]:
            told[-1] = {**turn, **told[-1], "content": _joined(told[-1], turn)}
        else:
            told.append(turn)
        was_system = is_system
    return told


def _alternating(turns: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """For templates that refuse two turns of one role: those of users are one, and those of the
    assistant too, but those with calls, beside which many templates show no text, and those with
    thoughts behind a text."""
    joined: list[Mapping[str, Any]] = []
    for turn in turns:
        last = joined[-1] if joined else {"role": ""}
        is_same = turn["role"] == last["role"] in ("user", "assistant")
        has_calls = "tool_calls" in last or "tool_calls" in turn
        if is_same and not has_calls and "reasoning_content" not in turn:
            joined[-1] = {**turn, **last, "content": _joined(last, turn)}
        else:
            joined.append(turn)
    return joined


def _joined(turn: Mapping[str, Any], next_turn: Mapping[str, Any]) -> str | tuple[Any, ...]:
    """Their contents as one, each a text or a tuple of segments."""
    contents = [one["content"] for one in (turn, next_turn) if one["content"]]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    return (contents[0], "\n\n", *contents[1:]) if len(contents) > 1 else contents[0]
