"""Sets how many threads contexts of llama.cpp compute with, before each step."""

import random
import time
from typing import Any

import llama_cpp as lib

from engine import machine
from engine.threads import PAUSE_S, Threads

N_LOOKS = 3  # after a pause: who is done within a millisecond, as the one who asked, takes no core
LOOK_S = 0.0003  # between two


class ContextThreads:
    def __init__(self, context: Any, n_most: int) -> None:
        self._contexts = [context]
        self._threads = Threads(n_most, random.Random())
        self._n_most = self._n_set = n_most
        self._ended_at = self._own_s = 0.0  # when the last step did, and what was computed by then

    def add(self, context: Any) -> None:
        """One more, that is computed with in the same steps."""
        self._contexts.append(context)
        lib.llama_set_n_threads(context, self._n_set, self._n_set)

    def step(self, *, is_steady: bool = False) -> "ContextThreads":
        """To be entered around a step: give way where others want cores, unless it must have as
        many threads as ever."""
        self._look()
        n = self._n_most if is_steady else self._threads.n
        if n != self._n_set:
            self._n_set = n
            for context in self._contexts:
                lib.llama_set_n_threads(context, n, n)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._ended_at, self._own_s = time.monotonic(), time.process_time()

    def _look(self) -> None:
        if self._n_most == 1:
            return
        now_s, own_s = time.monotonic(), time.process_time()
        # what this process did itself since the last step, as to draw tokens, is no pause
        if now_s - self._ended_at - (own_s - self._own_s) > PAUSE_S:
            self._threads.resume(self._n_free())
        if self._threads.is_due(now_s):
            self._threads.observe(now_s, own_s, machine.cores())

    def _n_free(self) -> int | None:
        most: int | None = None
        for number in range(N_LOOKS):
            if number:
                time.sleep(LOOK_S)
            n_free = machine.n_idle_cores()
            if n_free is None or n_free >= self._n_most:
                return n_free
            most = max(most or 0, n_free)
        return most
