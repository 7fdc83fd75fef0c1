"""Cohere's Command R7B, Command A and North: a list of calls that are numbered through a whole
conversation. What is said to the user stands between marks too.

    <|START_ACTION|>[
        {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},
        {"tool_call_id": "1", "tool_name": "get_weather", "parameters": {"city": "Rome"}}
    ]<|END_ACTION|>

    <|START_RESPONSE|>It rains.<|END_RESPONSE|>
"""

from collections.abc import Sequence
from typing import Any

from chat.splitter import ReasoningTags
from chat.tools.base import Function, Messages, literal
from chat.tools.lists import Listed


class Command(Listed):
    name = "command"
    opener, closer = visible = ("<|START_ACTION|>", "<|END_ACTION|>")
    wraps = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
    layout = ("[\n    ", ",\n    ", "\n]")
    head = " ".join([literal('{"tool_call_id": "'), "/[0-9]{1,4}/", literal('", "tool_name": ')])
    arguments = "parameters"

    def fits(self, template: str) -> bool:
        # where there are templates for several uses, only one of them shows tools
        shows = self.opener in template and "set tools = []" not in template
        return shows and self.wraps[0] in template

    def ending(self, tags: ReasoningTags, functions: Sequence[Function]) -> str:
        return tags.close

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """What was said before calls as a part of the plan for them, since templates show only
        that. Calls by their numbers, and results with those, since templates look for ids in the
        whole conversation, where some may come twice."""
        turns: list[dict[str, Any]] = []
        n_calls = 0
        waiting: list[tuple[str | None, str]] = []  # ids of calls, and their numbers
        for message in messages:
            turn = dict(message)
            if calls := turn.get("tool_calls"):
                numbers = [str(n_calls + n) for n in range(len(calls))]
                n_calls += len(calls)
                ids = [call.get("id") for call in calls]
                waiting = [*zip(ids, numbers, strict=True), *waiting]
                turn["tool_calls"] = [
                    {**call, "id": number} for call, number in zip(calls, numbers, strict=True)
                ]
                plan = "\n\n".join(filter(None, [turn.get("reasoning_content"), turn["content"]]))
                turn |= {"content": "", "tool_plan": plan, "reasoning_content": plan}
            elif turn["role"] == "tool":
                own = next((one for one in waiting if one[0] == turn.get("tool_call_id")), None)
                if own:
                    waiting.remove(own)
                turn["tool_call_id"] = own[1] if own else f"unknown {len(turns)}"
            turns.append(turn)
        return turns


class North(Command):
    name = "north"
    wraps = ("<|START_TEXT|>", "<|END_TEXT|>")
