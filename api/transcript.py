"""The messages of a chat, put together from the pieces that other formats cut them into."""

from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from typing import Any

THOUGHTS_MARK = b"quintet:"


@dataclass(slots=True)
class Transcript:
    """Neighbours of one role are one message, since many templates want turns to alternate.

    An assistant's message has thoughts, text and calls, in this order: what comes out of order
    begins another one.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)

    def text(self, role: str, text: str, *, between: str = "\n\n") -> None:
        message = self._message(role, "tool_calls")
        before = message.get("content")
        message["content"] = text if before is None else before + between + text

    def thoughts(self, text: str) -> None:
        message = self._message("assistant", "reasoning_content", "content", "tool_calls")
        message["reasoning_content"] = text

    def call(self, call_id: str, name: str, arguments: str | dict[str, Any]) -> None:
        call = {"id": call_id, "function": {"name": name, "arguments": arguments}}
        self._message("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, text: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _message(self, role: str, *unless: str) -> dict[str, Any]:
        """The last message if it is of this role and has none of these, or else a new one."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != role or any(name in last for name in unless):
            last = {"role": role}
            self.messages.append(last)
        return last


def packed_thoughts(text: str) -> str:
    """Thoughts as `encrypted_content` of Responses, which is what many clients send back of them,
    and all; or as the `signature` of Messages. It is no secret."""
    return b64encode(THOUGHTS_MARK + text.encode()).decode()


def thoughts_in(packed: str) -> str | None:
    """None where it is another provider's, or broken."""
    try:
        content = b64decode(packed, validate=True)
        is_ours = content.startswith(THOUGHTS_MARK)
        return content.removeprefix(THOUGHTS_MARK).decode() if is_ours else None
    except ValueError:
        return None
