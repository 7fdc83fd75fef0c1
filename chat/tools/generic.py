"""For templates that know nothing of tools, or write them as nobody else does: the system text says
how, in the form of Hermes, and results come back in a user turn.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

    <tool_response>
    {"temperature": 12}
    </tool_response>
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from chat.tools.base import Messages, add_to_system
from chat.tools.hermes import CLOSE, OPEN, Hermes

INSTRUCTIONS = """\
You can call functions. Here are their descriptions, one JSON object a line:
{tools}

To call one, write its name and its arguments as JSON between these tags:
<tool_call>
{{"name": "the_name", "arguments": {{"an_argument": "its value"}}}}
</tool_call>
The results come back between <tool_response> tags. Without need of a function just answer."""


class Generic(Hermes):
    name = "generic"
    shows_tools = False

    def fits(self, template: str) -> bool:
        return True

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        turns: list[dict[str, Any]] = []
        for message in messages:
            turn = _plain(message)
            is_result = message["role"] == "tool"
            if turn["role"] == "user" and turns and turns[-1]["is_result"]:
                between = "\n" if is_result else "\n\n"
                turns[-1]["content"] += between + turn["content"]
            else:
                turns.append({**turn, "is_result": is_result})
        for turn in turns:
            del turn["is_result"]
        if tools:
            lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            add_to_system(turns, INSTRUCTIONS.format(tools=lines))
        return turns


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without anything of tools in it but its text."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls") or ()
    if not calls:
        return dict(message)
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        function = call["function"]
        call = {"name": function["name"], "arguments": function["arguments"]}
        texts.append(f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(texts)}
