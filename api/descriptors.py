"""File descriptors: how many connections there may be, and what is done when none is left."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from typing import Any

logger = logging.getLogger(__name__)

RESERVED = 100  # for files, workers, and connections that are about to be refused
RETRY_S = 1
N_WAITING = 2048  # connections that the kernel keeps until they are accepted


def room_for(n_connections: int) -> int:
    """How many connections of those wanted this process may have. Raises its limit of descriptors
    as far as it may."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return n_connections
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_connections + RESERVED
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        with contextlib.suppress(ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            limit = wanted
    if limit == resource.RLIM_INFINITY or limit >= n_connections + RESERVED:
        return n_connections
    room = min(n_connections, max(limit - RESERVED, limit // 2))
    if room < n_connections:
        logger.warning(
            "MAX_CONNECTIONS is %d, but this process may open %d files (ulimit -n): "
            "it takes %d connections", n_connections, limit, room,
        )  # fmt: skip
    return room


def lengthen_queue(listener: int) -> None:
    """Let more connections wait at a listening socket than its event loop has been told of.

    asyncio's own loop, up to Python 3.13 at least, accepts as many at a time as its `backlog` says.
    Without a descriptor it goes on through all of them, and makes a timer for each try that does
    the same a second later; so it is started with a backlog of 1.
    """
    door = socket.socket(fileno=listener)
    door.listen(N_WAITING)
    door.detach()


class Spare:
    """A descriptor that is given up to close the connections that wait when there is no other, so
    that their clients learn of it. libuv (uvloop) does so by itself.
    """

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._handle)
        self._descriptor: int | None = None
        self._take()

    def __exit__(self, *_: object) -> None:
        self._loop.set_exception_handler(None)
        self._give()

    def _take(self) -> None:
        try:
            self._descriptor = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._loop.call_later(RETRY_S, self._take)

    def _give(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        is_full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if not is_full or "socket" not in context:  # only accept names one
            loop.default_exception_handler(context)
        elif self._descriptor is not None:
            self._give()
            self._turn_away(context["socket"].fileno())
            # not at once: without a free descriptor the loop cannot see that nobody waits
            loop.call_soon(self._take)

    def _turn_away(self, listener: int) -> None:
        n_closed = 0
        door = socket.socket(fileno=listener)
        with contextlib.suppress(OSError):  # nobody waits any more, or another took the descriptor
            while n_closed < N_WAITING:
                door.accept()[0].close()
                n_closed += 1
        door.detach()
        logger.warning("No file descriptors are left: %d new connections were closed", n_closed)
