"""MiniCPM5: each argument between tags, of which the beginnings are control tokens. Texts with line
breaks and such stand between marks of their own.

<function name="say"><param name="text"><![CDATA[One.
Two.]]></param></function>
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from chat.tools.base import Function, Messages, literal
from chat.tools.calls import begun
from chat.tools.tagged import NamedTags, arguments_of, written
from engine.grammar_text import pattern
from engine.wire import Segment

CDATA, CDATA_END = "<![CDATA[", "]]>"


class MiniCpm5(NamedTags):
    name = "minicpm5"
    opener, closer = "<function", ""
    visible = (opener, "</function>", "<param", "</param>")
    begin, key, name_end = ' name="', '<param name="', '">'
    value_end = "</param>"
    line = ""

    def fits(self, template: str) -> bool:
        return f"{self.opener}{self.begin}" in template and self.key in template

    def openers(self, functions: Sequence[Function]) -> Sequence[str]:
        return [self.opener + self.begin]

    def key_pattern(self) -> str:
        return rf"{super().key_pattern()}(?:({re.escape(CDATA)})|(?!{begun(CDATA)}\Z))"

    def value_end_of(self, key: re.Match[str]) -> str:
        return f"{CDATA_END if key[2] else ''}{self.value_end}"

    def text(self, length: str = "") -> str:
        plain = super().text(length).replace("«", f"«unlike {pattern(CDATA)} ")
        if length:
            return plain
        return f"{plain} | {literal(CDATA)} «inside until {CDATA_END}» «{self.value_end}»"

    def body(
        self, functions: Sequence[Function], *, answer: str | None, is_required: bool, unlike: str
    ) -> str:
        body = super().body(functions, answer=answer, is_required=is_required, unlike=unlike)
        is_free = functions and not (answer or is_required)
        unlike = unlike and f"unlike {unlike} "
        return f"{body} | «{unlike}until {self.opener}» other" if is_free else body

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        body = self.body(functions, answer=None, is_required=False, unlike="")
        rules = [f"other: (/[^ ]/ ({body}))?"]  # words such as <functional> are no calls
        return "\n".join([super().calls(functions, is_parallel=is_parallel), *rules])

    def history(self, messages: Messages, tools: Sequence[Any]) -> Messages:
        """Past calls in the text, since its template prints each of them twice."""
        turns: list[Mapping[str, Any]] = []
        for message in messages:
            turn = dict(message)
            if calls := turn.pop("tool_calls", None):
                said = [Segment(turn["content"], False)]
                for n, call in enumerate(calls):
                    said.append(Segment("\n" if n or turn["content"] else "", True))
                    said += self._past(call["function"])
                turn["content"] = tuple(said)
                turn.setdefault("reasoning_content", "")  # or it is looked for in the text
            turns.append(turn)
        return turns

    def _past(self, function: Mapping[str, Any]) -> list[Segment]:
        parts = [self.opener + self.begin, function["name"], self.name_end]  # ours and the client's
        for key, value in arguments_of(function).items():
            is_marked = isinstance(value, str) and re.search(r"[<&\n]", value)
            begin, end = (CDATA, CDATA_END) if is_marked else ("", "")
            parts[-1] += self.key
            parts += [key, self.name_end + begin, written(value), end + self.value_end]
        parts[-1] += self.end
        return [Segment(part, n % 2 == 0) for n, part in enumerate(parts)]
