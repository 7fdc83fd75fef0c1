"""Whether a model still thinks, and for how long it may."""

import codecs
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.text import overlap
from engine.wire import Thinking


class Thoughts:
    """Follows one answer token by token; implements Constraint, over that of the grammar.

    Thoughts end with the first `close`. They begin in the prompt, or where the answer begins with
    `open`, after spaces; where an answer is several messages, in those with `open` in their heads.
    A message that is a call is the last one. Those that come `again` begin anywhere.
    When they have taken `budget` tokens, and the last character is whole, the tokens of the
    `ending` are all that is allowed, one after the other.
    """

    def __init__(
        self,
        thinking: Thinking,
        text_of: Callable[[int], bytes],
        ending: Sequence[int],
        grammar: Constraint | None,
    ) -> None:
        self._state: Literal["before", "open", "after", "over", "call"]
        self._state = "open" if thinking.is_open else "before"
        self._close = thinking.close.encode()
        self._has_messages = bool(thinking.heads)
        self._heads = [head.encode() for head in thinking.heads or [thinking.open]]
        self._body = (thinking.body or thinking.open).encode()
        self._open = thinking.open.removesuffix(thinking.body).encode()
        self._call = thinking.call.encode()
        self._again = thinking.again
        self._text_of = text_of
        self._n_left = sys.maxsize if thinking.budget is None else thinking.budget
        self._ending = self._to_say = ending
        self._forced: deque[int] = deque()
        self._grammar = grammar
        self._tail = b""
        self.n_begun = 0  # bytes at the end that begin the answer, or will unless thoughts do
        self.n_held = 0  # of which this is not known yet
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._force_end()

    @property
    def is_over(self) -> bool:
        """The model answers; spaces behind its thoughts are no answer yet, and heads are none."""
        return self._state == "over"

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        if self._forced:
            wanted = logits[self._forced[0]]
            logits[:] = -np.inf
            logits[self._forced[0]] = max(wanted, 0)
        elif self._grammar:
            self._grammar.apply(logits)

    def accept(self, token: int) -> None:
        if self._grammar:
            self._grammar.accept(token)
        if self._forced:
            self._forced.popleft()
        elif self._state == "open":
            self._n_left -= 1
        if self._state != "call" and (self._state != "over" or self._has_messages or self._again):
            self._follow(self._text_of(token))
            self._force_end()

    def _follow(self, data: bytes) -> None:
        self._characters.decode(data)
        self._tail += data
        if self._state == "before":
            self._begin()
        if self._state == "open" and self._has_ended():
            self._state = "before" if self._has_messages else "after"
        if self._state == "after":
            if not self._has_messages:  # spaces behind thoughts are left out of the answer
                self._tail = self._tail.lstrip()
            if self._tail.strip():
                self._state = "over"
        self.n_begun = 0 if self._state in ("open", "call") else len(self._tail)
        if self._state == "over" and self._has_messages and self._has_ended():
            self._state = "before"
            self.n_begun = len(self._tail)
        self.n_held = 0 if self._state == "over" else self.n_begun
        if self._state == "over" and self._again:
            self._open_again()

    def _begin(self) -> None:
        text = self._tail if self._has_messages else self._tail.lstrip()
        if not any(text.startswith(head) or head.startswith(text) for head in self._heads):
            self._state = "over"
            return
        head, body, rest = text.partition(self._body)
        if body:
            self._state = "open" if self._open in head + body else "after"
            if self._call and self._call in head:
                self._state = "call"
            self._tail = rest
            self._to_say = self._ending  # again, where there are thoughts again

    def _open_again(self) -> None:
        _, opened, rest = self._tail.partition(self._open)
        if opened:
            self._state, self._tail, self.n_begun = "open", rest, 0
            self._to_say = self._ending
        else:
            self.n_held = overlap(self._tail, self._open)
            self._tail = self._tail[len(self._tail) - self.n_held :]

    def _has_ended(self) -> bool:
        _, close, after = self._tail.partition(self._close)
        self._tail = after if close else self._tail[-len(self._close) :]
        return bool(close)

    def _force_end(self) -> None:
        is_whole = not self._characters.getstate()[0]
        if self._state == "open" and self._n_left <= 0 and is_whole:
            self._forced += self._to_say
            self._to_say = ()
