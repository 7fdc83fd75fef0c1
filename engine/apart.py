"""Has the threads that compute beside the caller wake on other cores than the caller's.

In a virtual machine (KVM) Linux takes a core that has gone to sleep for one that its host may have
given away, so whom a thread wakes it puts on its own core, whatever else is free. Two threads that
wait for each other at every node then take turns on one, for the 10 to 20 ms until the system
spreads them: a step after a pause took four times as long.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator

REST_S = 0.001  # whoever waits longer for the next step may have gone to sleep (GOMP_SPINCOUNT)


class Apart:
    """To be entered around each step. Made before the library that computes has threads of its own:
    those that are there by then, and Python's, are not touched."""

    def __init__(self) -> None:
        self._has_gone_on = 0.0  # when the last step ended
        self._can = hasattr(os, "sched_setaffinity") and hasattr(ctypes.CDLL(None), "sched_getcpu")
        self._before = set(_threads()) if self._can else set[int]()
        self._moved: list[tuple[int, set[int]]] = []  # threads, and the cores they may use

    def __enter__(self) -> None:
        if self._can and time.monotonic() - self._has_gone_on > REST_S:
            own = {thread.native_id for thread in threading.enumerate()}
            core: int = ctypes.CDLL(None).sched_getcpu()
            for thread in _threads():
                if thread not in self._before and thread not in own:
                    self._keep_off(core, thread)

    def __exit__(self, *_: object) -> None:
        for thread, cores in self._moved:
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, cores)
        self._moved.clear()
        self._has_gone_on = time.monotonic()

    def _keep_off(self, core: int, thread: int) -> None:
        with contextlib.suppress(OSError):  # it has ended, or may not be told
            cores = os.sched_getaffinity(thread)
            if core in cores and len(cores) > 1:
                os.sched_setaffinity(thread, cores - {core})
                self._moved.append((thread, cores))


def _threads() -> Iterator[int]:
    """Of this process."""
    with contextlib.suppress(OSError):
        yield from map(int, os.listdir("/proc/self/task"))
