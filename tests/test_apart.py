"""Threads that compute beside the caller wake on other cores: what is asked of the system, and that
workers ask it."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import worker
from engine import apart, wire
from engine.apart import Apart
from tests.test_worker import Served, generate, spec

LIBC = ctypes.CDLL(None)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2,
    reason="it wants Linux and two cores",
)


@pytest.fixture(autouse=True)
def is_virtual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system says of the cores of a virtual machine."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor: 0\nflags: fpu vme hypervisor lahf_lm\n\nprocessor: 1\n")
    monkeypatch.setattr(apart, "CPUINFO", path)
    return path


@contextmanager
def native_thread() -> Iterator[int]:
    """One that Python knows nothing of, as OpenMP's, asleep. Its number."""
    before = set(apart._threads())
    gate, thread = ctypes.create_string_buffer(64), ctypes.c_ulong()
    LIBC.sem_init(gate, 0, 0)
    assert LIBC.pthread_create(ctypes.byref(thread), None, LIBC.sem_wait, gate) == 0
    (number,) = set(apart._threads()) - before
    try:
        yield number
    finally:
        LIBC.sem_post(gate)
        LIBC.pthread_join(thread, None)


@pytest.fixture
def on_one_core() -> Iterator[int]:
    """The caller's, on which it stays."""
    cores = os.sched_getaffinity(0)
    core = min(cores)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, cores)


def test_who_computes_beside_the_caller_is_kept_off_its_core_during_a_step() -> None:
    cores = os.sched_getaffinity(0)
    keep = Apart()
    with native_thread() as thread:
        with keep:
            during = os.sched_getaffinity(thread)
            assert os.sched_getaffinity(0) == cores
        after = os.sched_getaffinity(thread)
    assert len(cores - during) == 1
    assert after == cores


def test_it_is_the_callers_core(on_one_core: int) -> None:
    keep = Apart()
    with native_thread() as thread:
        os.sched_setaffinity(thread, range(os.cpu_count() or 1))
        with keep:
            assert on_one_core not in os.sched_getaffinity(thread)


def test_threads_from_before_and_pythons_are_left_alone() -> None:
    cores = os.sched_getaffinity(0)
    has_ended = threading.Event()
    with native_thread() as before:
        keep = Apart()
        python = threading.Thread(target=has_ended.wait)
        python.start()
        assert python.native_id is not None
        with keep:
            assert os.sched_getaffinity(before) == cores
            assert os.sched_getaffinity(python.native_id) == cores
        has_ended.set()
        python.join()


def test_a_step_right_after_another_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    cores = os.sched_getaffinity(0)
    keep = Apart()
    with native_thread() as thread:
        seen = []
        for after_s in (0.0, apart.REST_S / 2, 2 * apart.REST_S):
            now += after_s
            with keep:
                seen.append(os.sched_getaffinity(thread) == cores)
    assert seen == [False, True, False]


def test_a_thread_that_has_one_core_keeps_it(on_one_core: int) -> None:
    keep = Apart()
    with native_thread() as thread:
        with keep:
            assert os.sched_getaffinity(thread) == {on_one_core}
        assert os.sched_getaffinity(thread) == {on_one_core}


def test_a_thread_that_ends_meanwhile_costs_no_step() -> None:
    keep = Apart()
    with native_thread():
        keep.__enter__()
        assert keep._moved
    keep.__exit__()
    assert not keep._moved


@pytest.mark.parametrize("what", ["sched_getaffinity", "sched_setaffinity", "listdir"])
def test_where_the_system_refuses_steps_go_on(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    keep = Apart()
    with native_thread():
        monkeypatch.setattr(os, what, refuse)
        with keep:
            assert not keep._moved


def does_nothing() -> bool:
    keep = Apart()
    with native_thread(), keep:
        return not keep._moved


def test_on_real_machines_and_other_systems_it_does_nothing(is_virtual: Path) -> None:
    assert not does_nothing()
    is_virtual.write_text("flags: fpu vme lahf_lm\n")
    assert does_nothing()
    is_virtual.unlink()
    assert does_nothing()


def test_where_threads_have_no_cores_of_their_own_it_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    assert does_nothing()


@pytest.mark.parametrize("encoder", [None, wire.EncoderSpec(kind="embedding")])
def test_a_worker_computes_so(
    encoder: wire.EncoderSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Told(Apart):
        def __init__(self) -> None:
            happened.append("made")

        def __enter__(self) -> None:
            happened.append("begun")

        def __exit__(self, *_: object) -> None:
            happened.append("ended")

    def telling(name: str, what: str) -> None:
        original = getattr(worker, name)

        def call(*args: Any) -> Any:
            happened.append(what)
            return original(*args)

        monkeypatch.setattr(worker, name, call)

    monkeypatch.setattr(worker, "Apart", Told)
    telling("load_encoder" if encoder else "load_engine", "loaded")
    served = Served(wire.Load(spec(encoder=encoder)), lambda: None)
    try:
        served.ready()
        assert happened == ["made", "loaded"]
        served.send(wire.Embed(["Hi"], ["dense"], job=1) if encoder else generate(max_tokens=1))
        while not isinstance(served.read(), wire.Vectors | wire.Step):
            pass
    finally:
        served.close()
    assert happened[2:4] == ["begun", "ended"]
