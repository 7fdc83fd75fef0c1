"""Shared work: whoever stays gets all of it, whatever the others do."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import BadRequest, InternalError, QueueFull, ServiceError
from flights import Flights, Reader, Tell

Item = tuple[int, int]  # which flight's, and its number


@dataclass
class Work:
    """One flight's work, which makes an item, ends or fails when the test says so."""

    number: int
    orders: "asyncio.Queue[Exception | str]" = field(default_factory=asyncio.Queue)
    n_made: int = 0
    n_closed: int = 0
    outcome: "Exception | str" = "open"

    async def run(self, tell: Tell[Item]) -> None:
        try:
            while True:
                order = await self.orders.get()
                if order == "end":
                    self.outcome = order
                    return
                if isinstance(order, Exception):
                    self.outcome = order
                    raise order
                self.n_made += 1
                tell((self.number, self.n_made - 1))
        finally:
            self.n_closed += 1


@dataclass
class Works:
    """All that a test's flights have started."""

    flights: Flights[Item] = field(default_factory=Flights)
    started: list[Work] = field(default_factory=list)

    async def make(self, tell: Tell[Item]) -> None:
        self.started.append(Work(len(self.started)))
        await self.started[-1].run(tell)

    async def read(self, name: bytes, got: list[Item]) -> None:
        with self.flights.join(name, self.make) as reader:
            async for item in reader:
                got += [item]  # each as it comes


async def settle() -> None:
    """Everybody does what can be done now."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(main: Callable[[Works], Awaitable[None]], **more: Any) -> None:
    async def whole() -> None:
        works = Works(Flights(**more))
        await main(works)
        await settle()
        assert len(works.flights) == 0
        assert all(work.n_closed == 1 for work in works.started)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


def of(work: Work) -> list[Item]:
    return [(work.number, n) for n in range(work.n_made)]


def test_who_joins_late_gets_all_from_the_first_item() -> None:
    async def main(works: Works) -> None:
        first: list[Item] = []
        second: list[Item] = []
        tasks = [asyncio.create_task(works.read(b"a", first))]
        await settle()
        (work,) = works.started
        for _ in range(3):
            work.orders.put_nowait("item")
        await settle()
        assert first == of(work)
        tasks.append(asyncio.create_task(works.read(b"a", second)))
        await settle()
        assert second == first
        work.orders.put_nowait("item")
        work.orders.put_nowait("end")
        await asyncio.gather(*tasks)
        assert first == second == of(work)
        assert len(works.started) == 1

    run(main)


def test_readers_know_whether_they_joined_and_other_keys_are_other_work() -> None:
    async def main(works: Works) -> None:
        join, make = works.flights.join, works.make
        with join(b"a", make) as one, join(b"a", make) as two, join(b"b", make) as three:
            await settle()
            assert [reader.is_joined for reader in (one, two, three)] == [False, True, False]
            assert len(works.started) == len(works.flights) == 2

    run(main)


def test_the_last_to_leave_cancels_the_work_and_nobody_before() -> None:
    async def main(works: Works) -> None:
        tasks = [asyncio.create_task(works.read(b"a", [])) for _ in range(32)]
        await settle()
        (work,) = works.started
        for task in tasks[:-1]:
            task.cancel()
        await settle()
        work.orders.put_nowait("item")
        await settle()
        assert (work.n_made, work.n_closed) == (1, 0)
        tasks[-1].cancel()
        await settle()
        assert work.n_closed == 1

    run(main)


def test_who_comes_after_the_last_has_left_starts_anew() -> None:
    async def main(works: Works) -> None:
        with works.flights.join(b"a", works.make):
            await settle()
        got: list[Item] = []  # before the cancelled task has run
        task = asyncio.create_task(works.read(b"a", got))
        await settle()
        old, new = works.started
        assert old.n_closed == 1
        with works.flights.join(b"a", works.make) as reader:
            assert reader.is_joined  # the old one's end has not freed the new one's place
        new.orders.put_nowait("item")
        new.orders.put_nowait("end")
        await task
        assert got == [(1, 0)]

    run(main)


def test_work_that_nobody_waited_for_until_it_began_never_begins() -> None:
    async def main(works: Works) -> None:
        with works.flights.join(b"a", works.make):
            pass
        await settle()
        assert not works.started

    run(main)


def test_who_comes_after_the_end_starts_anew_and_who_had_joined_gets_all() -> None:
    async def main(works: Works) -> None:
        with works.flights.join(b"a", works.make) as slow:
            await settle()
            works.started[0].orders.put_nowait("item")
            works.started[0].orders.put_nowait("end")
            await settle()
            assert len(works.flights) == 0
            with works.flights.join(b"a", works.make) as next_one:
                assert not next_one.is_joined
                assert [item async for item in slow] == [(0, 0)]
                await settle()

    run(main)


@pytest.mark.parametrize(
    "error", [BadRequest("no", param="p"), QueueFull("full", retry_after_s=3), OSError(5, "no")]
)
def test_each_reader_has_its_own_copy_of_an_error_after_all_items(error: Exception) -> None:
    async def main(works: Works) -> None:
        got: list[list[Item]] = [[], [], []]
        tasks = [asyncio.create_task(works.read(b"a", items)) for items in got]
        await settle()
        (work,) = works.started
        work.orders.put_nowait("item")
        work.orders.put_nowait(error)
        raised = await asyncio.gather(*tasks, return_exceptions=True)
        assert got == [of(work)] * 3
        assert len({id(e) for e in (*raised, error)}) == 4
        for one in raised:
            assert type(one) is type(error)
            assert str(one) == str(error)
            assert isinstance(one, BaseException)
            assert one.__traceback__
            if isinstance(one, ServiceError) and isinstance(error, ServiceError):
                assert (one.body(), one.headers()) == (error.body(), error.headers())

    run(main)


class Odd(Exception):
    def __init__(self, *, needed: int) -> None:
        super().__init__("odd", needed)


def test_an_error_that_cannot_be_copied_reaches_everybody_as_it_is() -> None:
    async def main(works: Works) -> None:
        tasks = [asyncio.create_task(works.read(b"a", [])) for _ in range(3)]
        await settle()
        works.started[0].orders.put_nowait(Odd(needed=1))
        raised = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, Odd) for one in raised)

    run(main)


def test_work_that_cannot_even_begin_is_an_error() -> None:
    def make(tell: Tell[Item]) -> NoReturn:
        raise QueueFull("full")

    async def main(works: Works) -> None:
        with pytest.raises(QueueFull), works.flights.join(b"a", make) as reader:
            await anext(reader)

    run(main)


@pytest.mark.parametrize("has_begun", [True, False])
def test_work_that_is_cancelled_from_outside_is_an_error_and_no_end(has_begun: bool) -> None:
    async def main(works: Works) -> None:
        with works.flights.join(b"a", works.make) as reader:
            if has_begun:
                await settle()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            with pytest.raises(InternalError, match="cancelled"):
                await anext(reader)

    run(main)


def test_a_slow_reader_does_not_hold_the_work() -> None:
    async def main(works: Works) -> None:
        got: list[Item] = []
        with works.flights.join(b"a", works.make) as slow:
            task = asyncio.create_task(works.read(b"a", got))
            await settle()
            (work,) = works.started
            for _ in range(100):
                work.orders.put_nowait("item")
            work.orders.put_nowait("end")
            await task
            assert len(got) == 100
            assert await anext(slow) == (0, 0)

    run(main)


def test_long_work_cannot_be_joined_and_keeps_only_what_somebody_has_not_read() -> None:
    async def main(works: Works) -> None:
        with (
            works.flights.join(b"a", works.make) as one,
            works.flights.join(b"a", works.make) as two,
        ):
            await settle()
            (work,) = works.started

            async def make_items(n: int) -> None:
                for _ in range(n):
                    work.orders.put_nowait("item")
                while not work.orders.empty():
                    await settle()
                await settle()

            await make_items(5)
            assert len(works.flights) == 1
            for _ in range(5):
                await anext(one)
            await make_items(1)
            assert len(works.flights) == 0  # newcomers would miss what is forgotten
            assert len(one._flight._items) == 6
            for _ in range(5):
                await anext(two)
            await make_items(1)
            assert len(one._flight._items) == 2
            work.orders.put_nowait("end")
            assert [item async for item in one] == of(work)[5:]
            assert [item async for item in two] == of(work)[5:]

    run(main, max_items=5)


# Any order of what readers and works may do

NAMES = st.sampled_from([b"a", b"a", b"b"])
WHO = st.integers(0, 5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), NAMES),
        st.tuples(st.just("order"), WHO, st.just("item")),
        st.tuples(st.just("order"), WHO, st.just("item")),
        st.tuples(st.just("read"), WHO, st.integers(1, 5)),
        st.tuples(st.just("let them"), st.integers(1, 9)),
        st.tuples(st.just("let them"), st.integers(1, 9)),
        st.one_of(  # seldom
            st.tuples(st.just("order"), WHO, st.sampled_from(["end", "fail"])),
            st.tuples(st.sampled_from(["cancel", "leave"]), WHO),
        ),
    ),
    min_size=20,
    max_size=60,
)


@dataclass
class Client:
    """A reader in a task of its own, which takes as many items as it may."""

    name: bytes
    may_read: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    got: list[Item] = field(default_factory=list)
    reader: Reader[Item] | None = None
    leaves: bool = False
    end: "Exception | str" = "open"

    async def run(self, works: Works) -> None:
        try:
            with works.flights.join(self.name, works.make) as self.reader:
                while True:
                    await self.may_read.acquire()
                    if self.leaves:
                        self.end = "left"
                        return
                    self.got.append(await anext(self.reader))
        except StopAsyncIteration:
            self.end = "end"
        except Exception as error:
            self.end = error
        except asyncio.CancelledError:
            self.end = "cancelled"
            raise


async def act(works: Works, steps: list[tuple[Any, ...]]) -> None:
    clients: list[Client] = []
    tasks: list[asyncio.Task[None]] = []
    for what, *more in steps:
        if what == "join":
            clients.append(Client(more[0]))
            tasks.append(asyncio.create_task(clients[-1].run(works)))
        elif what == "order" and works.started:
            work = works.started[more[0] % len(works.started)]
            work.orders.put_nowait(QueueFull("full") if more[1] == "fail" else more[1])
        elif what == "let them":
            for _ in range(more[0]):
                await asyncio.sleep(0)
        elif what in ("read", "cancel", "leave") and clients:
            n = more[0] % len(clients)
            if what == "cancel":
                tasks[n].cancel()
            else:
                clients[n].leaves |= what == "leave"
                for _ in range(more[-1] if what == "read" else 1):
                    clients[n].may_read.release()
    await settle()
    for work in works.started:
        work.orders.put_nowait("end")
    for client in clients:
        for _ in range(200):
            client.may_read.release()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    for client in clients:
        assert client.end != "open" or not client.got  # cancelled before it began
        if client.got:
            work = works.started[client.got[0][0]]
            assert client.got == of(work)[: len(client.got)]
            if client.end == "end":
                assert client.got == of(work)
                assert work.outcome == "end"
        elif client.end == "end":
            assert any(work.outcome == "end" and not work.n_made for work in works.started)
        if isinstance(client.end, Exception):
            assert isinstance(client.end, QueueFull)


@settings(max_examples=3 * settings().max_examples)
@given(STEPS, st.sampled_from([2, 1000]))
def test_whatever_the_others_do_who_stays_gets_the_whole(
    steps: list[tuple[Any, ...]], max_items: int
) -> None:
    async def main(works: Works) -> None:
        await act(works, steps)

    run(main, max_items=max_items)
