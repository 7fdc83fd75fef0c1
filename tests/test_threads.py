"""How many threads a step gets, on machines that the test makes up."""

import random

import pytest

from engine.machine import Cores
from engine.threads import HOLD_S, LATE, LATE_S, WINDOW_S, Lateness, Threads

STEP_S = 0.02


def new(n_most: int, seed: int = 1) -> Threads:
    return Threads(n_most, random.Random(seed))


class Box:
    """A machine whose programs share its cores alike. Workers compute all the time, with as many
    threads as they have; `n_busy` other programs of one thread do, too."""

    def __init__(self, *workers: Threads, n_cores: int = 2, noise: float = 0.0) -> None:
        self.n_busy = 0.0
        self.now_s = 0.0
        self.numbers: list[list[int]] = []  # of threads, by step
        self._workers = workers
        self._n_cores = n_cores
        self._used_s = 0.0
        self._own_s = [0.0] * len(workers)
        self._dice = random.Random(1)
        self._noise = noise
        self._look()

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            wanted = [*(worker.n for worker in self._workers), self.n_busy]
            share_s = STEP_S * min(1.0, self._n_cores / sum(wanted))
            for number, worker in enumerate(self._workers):
                self._own_s[number] += worker.n * share_s
            self._used_s += sum(wanted) * share_s
            self.now_s += STEP_S
            self._look()
            self.numbers.append([worker.n for worker in self._workers])

    def _look(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.is_due(self.now_s):
                error_s = self._noise * WINDOW_S * self._dice.uniform(-1, 1)
                cores = [Cores(self._n_cores, self._used_s + error_s)]
                worker.observe(self.now_s, self._own_s[number], cores)


def test_alone_it_has_all_threads_however_coarse_the_clocks_are() -> None:
    threads = new(2)
    box = Box(threads, noise=0.15)
    box.run(60)
    assert box.numbers == [[2]] * len(box.numbers)


@pytest.mark.parametrize(
    ("n_cores", "n_most", "n_busy", "n_threads"),
    [(2, 2, 1, 1), (2, 2, 2, 1), (8, 8, 1, 7), (8, 8, 3, 5), (8, 4, 3, 4), (8, 8, 99, 1)],
)
def test_it_leaves_others_the_cores_that_they_use(
    n_cores: int, n_most: int, n_busy: int, n_threads: int
) -> None:
    threads = new(n_most)
    box = Box(threads, n_cores=n_cores)
    box.run(1)
    box.n_busy = n_busy
    box.run(2)
    assert threads.n == n_threads


def test_it_makes_room_after_one_look_and_comes_back_when_the_others_end() -> None:
    threads = new(2)
    box = Box(threads)
    box.run(1)
    box.n_busy = 2
    box.run(2 * WINDOW_S)
    assert threads.n == 1
    box.run(20)
    box.n_busy = 0
    box.run(2 * HOLD_S + 2 * WINDOW_S)
    assert threads.n == 2


def test_with_others_beside_it_never_tries_for_more() -> None:
    threads = new(2)
    box = Box(threads, noise=0.15)
    box.n_busy = 1
    box.run(1)
    n_steps = len(box.numbers)
    box.run(60)
    assert box.numbers[n_steps:] == [[1]] * (len(box.numbers) - n_steps)


def test_who_comes_and_goes_in_less_time_than_it_waits_changes_nothing() -> None:
    threads = new(2)
    box = Box(threads)
    numbers = set()
    for _ in range(20):
        box.n_busy = 1
        box.run(0.5)
        numbers.add(threads.n)
        box.n_busy = 0
        box.run(0.5)
        numbers.add(threads.n)
    assert numbers == {1}


def test_little_use_by_others_costs_no_thread() -> None:
    threads = new(2)
    box = Box(threads)
    box.n_busy = 0.2
    box.run(10)
    assert box.numbers == [[2]] * len(box.numbers)


@pytest.mark.parametrize("n_cores", [2, 3, 4, 8])
@pytest.mark.parametrize("n_workers", [2, 3])
def test_busy_workers_share_the_cores_and_do_not_swing(n_cores: int, n_workers: int) -> None:
    workers = [new(n_cores, seed) for seed in range(n_workers)]
    box = Box(*workers, n_cores=n_cores, noise=0.1)
    box.run(10)
    settled = [worker.n for worker in workers]
    assert sum(settled) == max(n_cores, n_workers)
    n_steps = len(box.numbers)
    box.run(60)
    assert box.numbers[n_steps:] == [settled] * (len(box.numbers) - n_steps)


def test_after_a_pause_only_who_computes_then_counts() -> None:
    threads = new(2)
    threads.observe(0.0, 0.0, [Cores(2, 0.0)])
    threads.observe(0.25, 0.2, [Cores(2, 0.5)])
    assert threads.n == 1
    threads.resume(2)
    assert threads.n == 2
    assert threads.is_due(0.5)
    threads.observe(0.5, 0.2, [Cores(2, 1.0)])  # what they did meanwhile
    assert threads.n == 2
    threads.observe(0.75, 0.4, [Cores(2, 1.45)])
    assert threads.n == 1
    threads.resume(1)
    assert threads.n == 1


@pytest.mark.parametrize(
    ("n_most", "n_free", "n"),
    [(2, 2, 2), (2, 1, 1), (2, 0, 1), (8, 5, 5), (8, 0, 4), (4, 60, 4), (4, None, 4)],
)
def test_after_a_pause_it_takes_the_free_cores_and_half_of_its_threads_in_any_case(
    n_most: int, n_free: int | None, n: int
) -> None:
    threads = new(n_most)
    threads.resume(n_free)
    assert threads.n == n


def test_who_was_about_to_end_when_it_looked_costs_one_step() -> None:
    threads = new(8)
    threads.resume(5)
    assert threads.may_be_more
    threads.look_again(3)
    assert threads.n == 5
    threads.look_again(6)
    assert threads.n == 6
    threads.look_again(60)
    assert (threads.n, threads.may_be_more) == (8, False)
    threads.resume(8)
    assert not threads.may_be_more


def test_once_something_is_measured_it_looks_at_no_moment() -> None:
    threads = new(2)
    threads.resume(1)
    threads.observe(0.0, 0.0, [Cores(2, 0.0)])
    assert threads.may_be_more
    threads.observe(1.0, 1.0, [Cores(2, 2.0)])
    assert (threads.n, threads.may_be_more) == (1, False)


@pytest.mark.parametrize("n_cores", [2, 4, 8])
def test_who_comes_later_gets_its_part(n_cores: int) -> None:
    first, second = new(n_cores, 1), new(n_cores, 2)
    second.resume(0)
    box = Box(first, second, n_cores=n_cores)
    box.run(10)
    assert first.n + second.n == n_cores
    assert min(first.n, second.n) >= n_cores // 4


def test_the_tightest_of_several_limits_counts() -> None:
    threads = new(8)
    threads.observe(0.0, 0.0, [Cores(16, 0.0), Cores(4, 0.0)])
    threads.observe(1.0, 2.0, [Cores(16, 9.0), Cores(4, 3.0)])  # one core by others in the group
    assert threads.n == 3


def test_a_part_of_a_core_is_no_core() -> None:
    threads = new(8)
    threads.observe(0.0, 0.0, [Cores(2.5, 0.0)])
    threads.observe(1.0, 2.0, [Cores(2.5, 2.0)])
    assert threads.n == 2


def test_limits_that_change_are_measured_anew() -> None:
    threads = new(2)
    threads.observe(0.0, 0.0, [Cores(2, 0.0)])
    threads.observe(1.0, 1.0, [Cores(2, 1.0), Cores(1, 1000.0)])
    assert threads.n == 2
    threads.observe(2.0, 2.0, [Cores(2, 2.0), Cores(1, 1001.0)])
    assert threads.n == 1


def test_where_nothing_is_known_it_stays() -> None:
    threads = new(2)
    for second in range(3):
        threads.observe(float(second), 2.0 * second, [])
    assert threads.n == 2


def test_it_looks_no_oftener_than_it_must_and_with_one_thread_never() -> None:
    threads = new(2)
    assert threads.is_due(10.0)
    threads.observe(10.0, 0.0, [Cores(2, 0.0)])
    assert not threads.is_due(10.0 + 0.9 * WINDOW_S)
    assert threads.is_due(10.0 + WINDOW_S)
    assert not new(1).is_due(10.0)


def test_a_step_is_late_by_what_steps_of_its_size_take() -> None:
    lateness = Lateness()
    assert lateness.limit_s(4, 100) is None
    lateness.took(4, 100, 0.2)
    assert lateness.limit_s(4, 100) == lateness.limit_s(7, 127) == LATE * 0.2
    assert lateness.limit_s(8, 100) is None
    assert lateness.limit_s(4, 128) is None, "each token looks at what is in the cells"
    lateness.took(5, 100, 0.1)
    assert lateness.limit_s(4, 100) == LATE * 0.1, "the fastest"
    for _ in range(100):
        lateness.took(4, 100, 0.3)
    assert lateness.limit_s(4, 100) == LATE * 0.3
    lateness.took(1, 0, 0.001)
    assert lateness.limit_s(1, 0) == LATE_S, "short ones vary"


def test_a_step_that_was_broken_off_for_nothing_is_not_again() -> None:
    lateness = Lateness()
    lateness.took(4, 100, 0.1)
    lateness.took(4, 100, 0.8, at_least=True)
    limit_s = lateness.limit_s(4, 100)
    assert limit_s is not None
    assert limit_s > 0.8
    lateness.took(4, 100, 0.2, at_least=True)
    assert lateness.limit_s(4, 100) == limit_s
    lateness.took(4, 100, 0.1)
    assert lateness.limit_s(4, 100) == LATE * 0.1, "so it was others"


def test_half_of_the_threads_give_way_to_whom_a_step_waits_for() -> None:
    threads = new(8)
    numbers = []
    for _ in range(5):
        threads.give_way()
        numbers.append(threads.n)
    assert numbers == [4, 2, 1, 1, 1]
