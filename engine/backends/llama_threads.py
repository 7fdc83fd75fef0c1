"""Sets how many threads a context of llama.cpp computes with, before each step."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp as lib

from engine import machine
from engine.threads import Threads


class ContextThreads:
    def __init__(self, context: Any, n_most: int) -> None:
        self._context = context
        self._threads = Threads(n_most, random.Random())
        self._n_most = self._n_set = n_most
        self._ended_at = 0.0

    @contextmanager
    def step(self, *, is_steady: bool = False) -> Iterator[None]:
        """Around a step: give way where others want cores, unless it must have as many threads as
        ever."""
        self._look()
        n = self._n_most if is_steady else self._threads.n
        if n != self._n_set:
            lib.llama_set_n_threads(self._context, n, n)
            self._n_set = n
        yield
        self._ended_at = time.monotonic()

    def _look(self) -> None:
        now_s = time.monotonic()
        self._threads.paused(now_s - self._ended_at)
        if self._threads.is_due(now_s):
            self._threads.observe(now_s, time.process_time(), machine.cores())
