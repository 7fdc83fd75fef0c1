"""How much memory and how many cores there are, by control groups in a folder of our own."""

import os
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from engine.machine import Cores, available_bytes, cores, n_cores, n_idle_cores, total_bytes

MB = 1 << 20


class Times(NamedTuple):
    """Of a core, as macOS tells them; Linux tells more."""

    user: float
    nice: float
    system: float


def system(folder: Path, cgroup: str, **files: str) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    assert total_bytes(tmp_path) == memory.total
    assert 0 < available_bytes(tmp_path) <= memory.total


def test_the_least_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "0::/a.slice/b.service\n",
        a_DOT_slice__memory_DOT_max=f"{100 * MB}\n",
        a_DOT_slice__memory_DOT_current=f"{70 * MB}\n",
        a_DOT_slice__memory_DOT_stat=f"anon 1\ninactive_file {20 * MB}\n",
        a_DOT_slice__b_DOT_service__memory_DOT_max="max\n",
        a_DOT_slice__b_DOT_service__memory_DOT_current=f"{60 * MB}\n",
    )
    assert total_bytes(root) == 100 * MB
    assert available_bytes(root) == 50 * MB


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "5:cpu,cpuacct:/x\n3:memory:/\n",
        memory__memory_DOT_limit_in_bytes=f"{64 * MB}\n",
        memory__memory_DOT_usage_in_bytes=f"{80 * MB}\n",
    )
    assert (total_bytes(root), available_bytes(root)) == (64 * MB, 0)


def test_an_unlimited_group_of_the_first_version_limits_nothing(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "3:memory:/docker/x\n",
        memory__docker__x__memory_DOT_limit_in_bytes="9223372036854771712\n",
        memory__docker__x__memory_DOT_usage_in_bytes="5\n",
    )
    assert total_bytes(root) == psutil.virtual_memory().total


def test_without_groups_the_cores_are_the_machines(tmp_path: Path) -> None:
    (machine,) = cores(tmp_path)
    assert machine.n == n_cores(tmp_path) >= 1
    assert machine.used_s > 0


@pytest.mark.parametrize(
    ("text", "n_others"),
    [
        ("0.20 0.18 0.12 1/80 11206\n", 0),
        ("9.00 9.00 9.00 3/80 11206\n", 2),
        ("9.00 9.00 9.00 999/2000 11206\n", 999),
        ("0.00 0.00 0.00 0/0 0\n", None),
        ("", None),
        ("unknown", None),
    ],
)
def test_a_core_is_idle_while_nobody_but_the_caller_computes(
    tmp_path: Path, text: str, n_others: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text(text)
    monkeypatch.setattr("engine.machine._allowed", lambda: range(os.cpu_count() or 1))
    expected = None if n_others is None else max((os.cpu_count() or 1) - n_others, 0)
    assert n_idle_cores(tmp_path) == expected
    monkeypatch.setattr("engine.machine._allowed", lambda: range((os.cpu_count() or 1) - 1))
    assert n_idle_cores(tmp_path) is None


def test_each_quota_on_the_way_up_counts_with_what_its_group_has_used(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "0::/a.slice/b.service\n",
        a_DOT_slice__cpu_DOT_max="max 100000\n",
        a_DOT_slice__b_DOT_service__cpu_DOT_max="50000 100000\n",
        a_DOT_slice__b_DOT_service__cpu_DOT_stat="usage_usec 7500000\nuser_usec 7000000\n",
    )
    assert cores(root)[1:] == [Cores(0.5, 7.5)]
    assert n_cores(root) == 0.5


def test_quotas_of_the_first_version_count_too(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "4:cpu,cpuacct:/x\n",
        cpu__cpu_DOT_cfs_quota_us="-1\n",
        cpu__x__cpu_DOT_cfs_quota_us="25000\n",
        cpu__x__cpu_DOT_cfs_period_us="100000\n",
        cpu__x__cpuacct_DOT_usage="1500000000\n",
    )
    assert cores(root)[1:] == [Cores(0.25, 1.5)]


def test_programs_that_give_way_by_themselves_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Times(user=1.0, nice=4.0, system=2.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [times])
    monkeypatch.setattr("engine.machine._allowed", lambda: [0, 1])
    niceness = 0
    monkeypatch.setattr("os.getpriority", lambda *_: niceness)
    assert cores(tmp_path) == [Cores(1, 3.0)]
    niceness = 5
    assert cores(tmp_path) == [Cores(1, 7.0)]
