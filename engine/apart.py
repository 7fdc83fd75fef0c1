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
from collections.abc import Callable, Iterator
from pathlib import Path

REST_S = 0.001  # whoever waits longer for the next step may have gone to sleep (GOMP_SPINCOUNT)
HEAD_BYTES = 1 << 12  # of a file that says the same of each core
CPUINFO = Path("/proc/cpuinfo")


class Apart:
    """To be entered around each step. Made before the library that computes has threads of its own:
    those that are there by then, and Python's, are not touched. Outside of virtual machines, and on
    systems that do not tell, it does nothing."""

    def __init__(self) -> None:
        self._has_gone_on = 0.0  # when the last step ended
        self._core_of_caller = _getcpu()
        self._before = set(_threads())
        self._moved: list[tuple[int, set[int]]] = []  # threads, and the cores they may use

    def __enter__(self) -> None:
        if self._core_of_caller and time.monotonic() - self._has_gone_on > REST_S:
            own = {thread.native_id for thread in threading.enumerate()}
            core = self._core_of_caller()
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


def _getcpu() -> Callable[[], int] | None:
    """What says on which core its caller is, in a virtual machine on Linux."""
    try:
        with CPUINFO.open("rb") as file:
            is_virtual = b" hypervisor" in file.read(HEAD_BYTES)
    except OSError:
        return None
    if not is_virtual or not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _threads() -> Iterator[int]:
    """Of this process."""
    with contextlib.suppress(OSError):
        yield from map(int, os.listdir("/proc/self/task"))
