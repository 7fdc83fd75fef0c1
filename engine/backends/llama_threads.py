"""Sets how many threads a context of llama.cpp computes with, before each step."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp as lib

from engine import machine
from engine.threads import PAUSE_S, Threads

N_LOOKS = 3  # after a pause: who is done within a millisecond, as the one who asked, takes no core
LOOK_S = 0.0003  # between two


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
        if now_s - self._ended_at > PAUSE_S:
            self._threads.resume(self._n_free())
        elif self._threads.is_due(now_s):
            self._threads.observe(now_s, time.process_time(), machine.cores())

    def _n_free(self) -> int:
        n_free = machine.n_idle_cores()
        for _ in range(N_LOOKS - 1):
            if n_free >= self._n_most:
                break
            time.sleep(LOOK_S)
            n_free = max(n_free, machine.n_idle_cores())
        return n_free
