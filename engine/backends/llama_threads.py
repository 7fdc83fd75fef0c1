"""Sets how many threads contexts of llama.cpp compute with, before each step, and breaks a step off
that must have lost a core in its midst."""

import ctypes
import random
import threading
import time
from typing import Any

import llama_cpp as lib

from engine import machine
from engine.threads import PAUSE_S, Lateness, Threads

N_LOOKS = 3  # after a pause: who is done within a millisecond, as the one who asked, takes no core
LOOK_S = 0.0003  # between two


class ContextThreads:
    def __init__(self, context: Any, n_most: int, *, breaks_off: bool = False) -> None:
        """With `breaks_off` llama_decode returns ABORTED for a step that is late; then it is to be
        computed again, after `fewer()`."""
        self._contexts = [context]
        self._threads = Threads(n_most, random.Random())
        self._n_most = self._n_set = n_most
        self._ended_at = self._own_s = 0.0  # when the last step did, and what was computed by then
        self._lateness = Lateness()
        self._size = 0, 0  # of the step: its tokens, and those in the cells
        self._began_at = 0.0
        self._is_timed = False  # the step may be broken off
        self._is_again = False  # it was
        # where nobody can tell what others use, threads that are given away do not come back
        can_see = breaks_off and n_most > 1 and machine.cores()
        self._timer = _Timer() if can_see else None
        if self._timer:
            self._timer.watch(context)

    @property
    def n(self) -> int:
        return self._n_set

    def close(self) -> None:
        if self._timer:
            self._timer.close()

    def add(self, context: Any) -> None:
        """One more, that is computed with in the same steps."""
        self._contexts.append(context)
        lib.llama_set_n_threads(context, self._n_set, self._n_set)
        if self._timer:
            self._timer.watch(context)

    def step(
        self, n_tokens: int = 0, n_held: int = 0, *, is_steady: bool = False
    ) -> "ContextThreads":
        """To be entered around a step: give way where others want cores, unless it must have as
        many threads as ever. It may be broken off where its size is given."""
        self._look()
        self._set(self._n_most if is_steady else self._threads.n)
        self._size = n_tokens, n_held
        self._is_timed = n_tokens > 0 and not is_steady
        self._is_again = False
        return self

    def fewer(self) -> None:
        """The step was broken off: it is computed anew, with fewer threads and to its end."""
        if self._timer:
            self._timer.end()
        self._threads.give_way()
        self._set(self._threads.n)
        self._is_again = True
        self._began_at = time.monotonic()

    def __enter__(self) -> None:
        self._began_at = time.monotonic()
        if self._timer and self._is_timed and self._n_set > 1:
            limit_s = self._lateness.limit_s(*self._size)
            if limit_s is not None:
                self._timer.begin(self._began_at + limit_s)

    def __exit__(self, kind: object, *_: object) -> None:
        # before the step's answers wake those who hand them on; its own threads still look for work
        if self._threads.may_be_more and (n_free := machine.n_idle_cores()) is not None:
            self._threads.look_again(n_free + self._n_set - 1)
        self._ended_at, self._own_s = time.monotonic(), time.process_time()
        if self._timer:
            self._timer.end()
            if self._is_timed and kind is None:
                seconds = self._ended_at - self._began_at
                if self._is_again:  # with fewer threads
                    seconds *= self._n_set / self._n_most
                self._lateness.took(*self._size, seconds, at_least=self._is_again)

    def _set(self, n: int) -> None:
        if n != self._n_set:
            self._n_set = n
            for context in self._contexts:
                lib.llama_set_n_threads(context, n, n)

    def _look(self) -> None:
        if self._n_most == 1:
            return
        now_s, own_s = time.monotonic(), time.process_time()
        # what this process did itself since the last step, as to draw tokens, is no pause
        if now_s - self._ended_at - (own_s - self._own_s) > PAUSE_S:
            self._threads.resume(self._n_free())
        elif self._threads.is_due(now_s):
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


ABORTED = 2  # what llama_decode returns then
TICK_S = 0.02  # between two looks at the time, while there are steps
REST_S = 1.0  # without one after which it looks no more


class _Timer:
    """Breaks off what is computed when its time is over.

    llama.cpp asks a function after each node of its graph whether to go on, hundreds of times for a
    token: one in Python would take the GIL each time. This is strlen of the C library, asked about
    a text of ours: of none it is 0, which is false.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p)
        self._is_over = ctypes.cast(strlen, lib.ggml_abort_callback)
        self._ends_at: float | None = None
        self._has_steps = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="step-timer", daemon=True)
        self._thread.start()

    def watch(self, context: Any) -> None:
        text = ctypes.cast(self._text, ctypes.c_void_p)
        lib.llama_set_abort_callback(context, self._is_over, text)

    def begin(self, ends_at: float) -> None:
        self._ends_at = ends_at
        if not self._has_steps.is_set():
            self._has_steps.set()

    def end(self) -> None:
        self._ends_at = None
        self._text[0] = b"\0"

    def close(self) -> None:
        self._is_closed = True
        while self._thread.is_alive():
            self._has_steps.set()  # which it may just be taking back
            self._thread.join(TICK_S)

    def _run(self) -> None:
        rests_at = 0.0
        while self._has_steps.wait() and not self._is_closed:
            time.sleep(TICK_S)
            now = time.monotonic()
            ends_at = self._ends_at
            if ends_at is None:
                if now > rests_at:
                    self._has_steps.clear()
                continue
            rests_at = now + REST_S
            if now > ends_at and self._ends_at is ends_at:  # and not of a step that has begun since
                self._text[0] = b"!"
