"""How much memory there is: of the machine, or of the container or service that holds this process.

A limit of a control group counts where it is less than the machine has (Linux, both versions).
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")


def total_bytes(root: Path = ROOT) -> int:
    """The most that this process and its workers could have together."""
    limits = [limit for limit, _ in _groups(root)]
    return min([psutil.virtual_memory().total, *limits])


def available_bytes(root: Path = ROOT) -> int:
    """What could be taken now without anybody being ended or swapped out."""
    left = [max(limit - used, 0) for limit, used in _groups(root)]
    return min([psutil.virtual_memory().available, *left])


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in and that has a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = (_text(folder / name).strip() for name in files)
            if limit.isdecimal() and used.isdecimal():  # "max": none
                yield int(limit), int(used) - _reclaimable(folder)
            if folder == base:
                break


def _reclaimable(folder: Path) -> int:
    """Pages of files that the system drops before it ends anybody."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdecimal():
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:  # no such group, or another system
        return ""
