"""Hermes, Qwen 2.5, Qwen 3 and what was trained after them: JSON between tags.

Let me look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

from collections.abc import Sequence

from chat.events import Event, Splitter
from chat.tools.base import Function, ToolFormat, literal, named
from chat.tools.calls import CallReader, OpenedCalls, after_close

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    opener = OPEN
    visible = (OPEN, CLOSE)

    def fits(self, template: str) -> bool:
        # what others write between or around these tags
        others = ("<function=", "<arg_key>", "<invoke", "<tool_calls>")
        return OPEN in template and not any(other in template for other in others)

    def calls(self, functions: Sequence[Function], *, is_parallel: bool) -> str:
        more = f' ("\\n"? «{OPEN}» call)*' if is_parallel else ""
        begin, end = literal('\n{"name": '), literal("\n")
        call = f"{begin} {named(functions, 'arguments')} {end} «{CLOSE}»"
        return f'calls: call{more} "\\n"?\ncall: {call}'

    def call_splitter(self, functions: Sequence[Function], *, only_first: bool) -> Splitter:
        return HermesSplitter(OPEN, only_first=only_first)


class HermesSplitter(OpenedCalls):
    def _begin(self) -> None:
        self._reader = CallReader()
        self._after = ""  # the object

    @property
    def is_calling(self) -> bool:
        return self._in_call and not self._reader.is_whole

    def _read(self, text: str) -> tuple[list[Event], str | None]:
        events: list[Event] = []
        if not self._reader.is_whole:
            events, rest = self._reader.feed(text)
            if rest is None or not self._reader.is_call:
                return events, rest
            text = rest
        self._after += text
        return events, after_close(self._after, CLOSE)

    def _unread(self) -> str:
        return "" if self._reader.is_call else OPEN + self._reader.raw
