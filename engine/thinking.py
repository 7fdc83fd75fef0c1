"""Whether a model still thinks, and for how long it may."""

import sys
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.wire import Thinking


class Thoughts:
    """Follows one answer token by token; implements Constraint, over that of the grammar.

    Thoughts end with the first `close`. They begin in the prompt, or where the answer begins with
    `open`, after spaces. When they have taken `budget` tokens, the tokens of the `ending` are all
    that is allowed, one after the other.
    """

    def __init__(
        self,
        thinking: Thinking,
        text_of: Callable[[int], bytes],
        ending: Sequence[int],
        grammar: Constraint | None,
    ) -> None:
        self._is_open = thinking.is_open
        self._may_open = not thinking.is_open  # so far the answer may begin with `open`
        self._open = thinking.open.encode()
        self._close = thinking.close.encode()
        self._text_of = text_of
        self._n_left = sys.maxsize if thinking.budget is None else thinking.budget
        self._ending = deque(ending)
        self._grammar = grammar
        self._tail = b""

    @property
    def is_over(self) -> bool:
        """The model answers."""
        return not (self._is_open or self._may_open)

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        if self._is_open and self._n_left <= 0 and self._ending:
            wanted = logits[self._ending[0]]
            logits[:] = -np.inf
            logits[self._ending[0]] = max(wanted, 0)
        elif self._grammar:
            self._grammar.apply(logits)

    def accept(self, token: int) -> None:
        if self._grammar:
            self._grammar.accept(token)
        if self.is_over:
            return
        if self._is_open:
            self._n_left -= 1
            if self._n_left < 0 and self._ending:
                self._ending.popleft()
        self._follow(self._text_of(token))

    def _follow(self, data: bytes) -> None:
        self._tail += data
        if self._may_open:
            text = self._tail.lstrip()
            if text.startswith(self._open):
                self._is_open, self._may_open = True, False
                self._tail = text[len(self._open) :]
            elif not self._open.startswith(text):
                self._may_open = False
        if self._is_open:
            self._is_open = self._close not in self._tail
            self._tail = self._tail[-len(self._close) :]
