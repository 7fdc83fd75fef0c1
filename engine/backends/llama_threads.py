"""Sets how many threads a context of llama.cpp computes with, before each step."""

import random
import time
from typing import Any

import llama_cpp as lib

from engine import machine
from engine.threads import Threads


class ContextThreads:
    def __init__(self, context: Any, n_most: int) -> None:
        self._context = context
        self._threads = Threads(n_most, random.Random())
        self._n_most = self._n_set = n_most
        self._look()

    def set(self, n_tokens: int, *, is_steady: bool = False) -> None:
        """Before a step of so many tokens: give way where others want cores, unless the step must
        have as many threads as ever."""
        self._look()
        n = self._n_most if is_steady else self._threads.n(n_tokens)
        if n != self._n_set:
            lib.llama_set_n_threads(self._context, n, n)
            self._n_set = n

    def _look(self) -> None:
        now_s = time.monotonic()
        if self._threads.is_due(now_s):
            self._threads.observe(now_s, time.process_time(), machine.cores())
