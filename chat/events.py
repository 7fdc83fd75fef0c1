"""What an answer consists of, as it comes: text, reasoning, tool calls. Every wire format is a fold
over these."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. The arguments that follow are its own, until the next one begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of the JSON text of the arguments."""

    text: str


Event = Text | Reasoning | CallBegin | CallArguments


class Splitter(Protocol):
    """Turns the text of one answer into events. However the text is cut, they join to the same."""

    @property
    def is_reasoning(self) -> bool:
        """What comes next is reasoning, as far as is known."""

    @property
    def is_calling(self) -> bool:
        """A tool call has begun and is not whole."""

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]:
        """What was held back, when no more will come."""


@dataclass(slots=True)
class Call:
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """Events put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, event: Event) -> None:
        if isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, CallBegin):
            self.calls.append(Call(event.name))
        else:
            self.calls[-1].arguments += event.text
