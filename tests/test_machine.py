"""How much memory there is, by control groups in a folder of our own."""

from pathlib import Path

import psutil

from engine.machine import available_bytes, total_bytes

MB = 1 << 20


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
