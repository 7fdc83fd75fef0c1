"""How much memory and how many cores there are: of the machine, or of the container or service that
holds this process.

A limit of a control group counts where it is less than the machine has (Linux, both versions).
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Cores:
    """`n` cores, or shares of them, on which programs have computed for `used_s` seconds in all."""

    n: float
    used_s: float


def total_bytes(root: Path = ROOT) -> int:
    """The most that this process and its workers could have together."""
    limits = [limit for limit, _ in _memory_groups(root)]
    return min([psutil.virtual_memory().total, *limits])


def available_bytes(root: Path = ROOT) -> int:
    """What could be taken now without anybody being ended or swapped out."""
    left = [max(limit - used, 0) for limit, used in _memory_groups(root)]
    return min([psutil.virtual_memory().available, *left])


def n_cores(root: Path = ROOT) -> float:
    """So many may this process use; in a quota also parts of one."""
    return min([len(_allowed()), *(quota.n for quota in _quotas(root))])


def cores(root: Path = ROOT) -> list[Cores]:
    """Of the machine, as far as this process may use it, where the system tells; and of each
    control group that it is in and that has a quota."""
    # who is nicer than this process does not keep it from a core
    is_nice = os.getpriority(os.PRIO_PROCESS, 0) > 0
    kinds = ("user", "system", "irq", "softirq", *(["nice"] if is_nice else []))
    try:
        times = psutil.cpu_times(percpu=True)
    except OSError:  # Android
        return [*_quotas(root)]
    allowed = [times[i] for i in _allowed() if i < len(times)]
    used_s = sum(getattr(time, kind, 0.0) for time in allowed for kind in kinds)
    return [Cores(len(allowed), used_s), *_quotas(root)]


def n_idle_cores(root: Path = ROOT) -> int | None:
    """On how many of the machine's cores nobody computes at this moment but the caller. None where
    the system does not tell, or where this process may not use all of them."""
    n = os.cpu_count() or 1
    fields = _text(f"{root}/proc/loadavg").split()  # the fourth: threads that run, and all
    n_running = _number(fields[3].partition("/")[0]) if len(fields) > 3 else 0
    if not n_running or len(_allowed()) < n:
        return None
    return max(n - (n_running - 1), 0)


def _allowed() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _quotas(root: Path) -> Iterator[Cores]:
    for folder, is_first in _groups(root, "cpu"):
        if is_first:
            names = (f"{folder}/cpu.cfs_quota_us", f"{folder}/cpu.cfs_period_us")
            quota, period = (_text(name).strip() for name in names)
        else:
            quota, _, period = _text(f"{folder}/cpu.max").strip().partition(" ")
        if not (_number(quota) and _number(period)):  # "max", or -1: none
            continue
        if is_first:  # of a controller of its own, which systems put into the same folder
            used_s = _number(_text(f"{folder}/cpuacct.usage")) / 1e9
        else:
            used_s = _entry(f"{folder}/cpu.stat", "usage_usec") / 1e6
        yield Cores(_number(quota) / _number(period), used_s)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in and that has a limit."""
    for folder, is_first in _groups(root, "memory"):
        names = ("memory.max", "memory.current")
        if is_first:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_text(f"{folder}/{name}").strip() for name in names)
        if limit.isdecimal() and used.isdecimal():  # "max": none
            # pages of files: the system drops them before it ends anybody
            kinds = ("inactive_file", "total_inactive_file")
            yield int(limit), int(used) - _entry(f"{folder}/memory.stat", *kinds)


def _groups(root: Path, controller: str) -> Sequence[tuple[str, bool]]:
    """The folders of the control groups that this process is in, from the innermost outwards, and
    whether they are of the first version."""
    return _folders(root, controller, _text(f"{root}/proc/self/cgroup"))


@lru_cache(maxsize=8)
def _folders(root: Path, controller: str, groups: str) -> Sequence[tuple[str, bool]]:
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        is_first = controllers != ""
        if is_first and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if is_first else "")
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            found.append((str(folder), is_first))
            if folder == base:
                break
    return found


def _entry(path: str, *wanted: str) -> int:
    """The first of some numbers in a file of names and numbers; 0 where none is there."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if name in wanted:
            return _number(value)
    return 0


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _text(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode("ascii", "replace")
    except OSError:  # no such group, or another system
        return ""
