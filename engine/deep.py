"""Threads with a deep stack, for libraries that follow by recursion what a client has sent."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

# llguidance goes down a chain of references by recursion, and std::regex a match, character by
# character: thousands ended the process. What of a stack is not used takes no memory.
STACK_BYTES = 512 << 20
LEAST_BYTES = 8 << 20  # where what is not used is counted too (ulimit -v, no overcommit)
_STARTING = threading.Lock()  # the size is said to all threads that start


class DeepThread(threading.Thread):
    stack_bytes = STACK_BYTES

    def start(self) -> None:
        with _STARTING:
            before = threading.stack_size(self.stack_bytes)
            try:
                super().start()
            except RuntimeError:
                self.stack_bytes = LEAST_BYTES
                threading.stack_size(LEAST_BYTES)
                super().start()
            finally:
                threading.stack_size(before)


def in_depth(function: Callable[[int], T], *, alone: bool = False) -> T:
    """What `function` returns in a deep thread, which may be the caller's; it is told how many
    bytes of stack it has. `alone` in one of its own: what was used of a stack goes with its
    thread."""
    thread = threading.current_thread()
    if isinstance(thread, DeepThread) and not alone:
        return function(thread.stack_bytes)
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function(deep.stack_bytes))
        except BaseException as error:
            result.set_exception(error)

    deep = DeepThread(target=run, daemon=True)
    deep.start()
    deep.join()
    return result.result()
