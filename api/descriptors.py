"""How many connections there may be, by the file descriptors that the process may have.

Where there is none left all the same, libuv (uvloop) closes the connections that wait.
"""

import contextlib
import logging
import resource

logger = logging.getLogger(__name__)

RESERVED = 100  # for files, workers, and connections that are about to be refused


def room_for(n_connections: int) -> int:
    """How many connections of those wanted this process may have. Raises its limit of descriptors
    as far as it may."""
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
