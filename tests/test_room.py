"""Who may have memory: decisions as a list of calls, and tiers that share too little of it."""

import asyncio
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import wire
from engine.client import launch_process
from errors import InsufficientMemory, QueueFull, QueueTimeout
from model_manager import ModelManager
from room import Go, Never, Occupant, Room, Stop, Wait, decide
from tests.serving import Held, fake, script, serving, settings, wait_until
from tests.test_model_manager import Launches, ask, items_of, outcome, request, run, until
from tier import Tier


def of(name: str, n_bytes: int = 10, **values: Any) -> Occupant:
    known = {"is_pinned": False, "is_wanted": False, "used_at": 0.0, "stays_until": 0.0}
    return Occupant(name, n_bytes, **(known | values))


def decided(needed: int, *occupants: Occupant, now: float = 100, impatient_at: float = 130) -> Any:
    return decide(needed, 30, occupants, now=now, impatient_at=impatient_at)


def test_what_fits_goes() -> None:
    assert decided(30) == Go()
    assert decided(10, of("a"), of("b")) == Go()


def test_what_would_not_fit_without_the_others_never_goes() -> None:
    assert decided(31) == Never(30)
    assert decided(25, of("a", is_pinned=True), of("b")) == Never(20)


def test_the_least_recently_used_makes_way_and_no_more_than_need_be() -> None:
    three = of("a", used_at=3), of("b", used_at=1), of("c", used_at=2)
    assert decided(10, *three) == Stop(["b"])
    assert decided(20, *three) == Stop(["b", "c"])
    assert decided(10, of("a", used_at=1, is_pinned=True), of("b", 20, used_at=2)) == Stop(["b"])


def test_whoever_is_wanted_or_was_just_loaded_stays_for_a_while() -> None:
    assert decided(20, of("a", 20, is_wanted=True)) == Wait(130)
    assert decided(20, of("a", 20, stays_until=105)) == Wait(105)
    assert decided(20, of("a", 20, stays_until=105), now=105) == Stop(["a"])
    assert decided(20, of("a", stays_until=110), of("b", stays_until=105)) == Wait(105)


def test_patience_ends_also_with_those_that_are_wanted() -> None:
    both = of("a", 15, is_wanted=True, used_at=1), of("b", 15, used_at=2)
    assert decided(15, *both, now=131) == Stop(["b"])
    assert decided(20, *both) == Wait(130), "b alone would not do, so it stays"
    assert decided(20, *both, now=131) == Stop(["b", "a"])


def test_one_that_loads_stays_and_then_as_long_as_that_took_also_where_patience_ends() -> None:
    loads = of("a", 20, is_wanted=True, stays_until=math.inf)
    assert decided(20, loads, now=131) == Wait(math.inf)
    assert decided(20, of("a", 20, is_wanted=True, stays_until=150), now=131) == Wait(150)
    assert decided(20, of("a", 20, is_wanted=True, stays_until=150), now=150) == Stop(["a"])
    assert decided(20, of("a", 20, is_wanted=True), loads, now=131) == Wait(math.inf)
    assert decided(10, of("a", 20, is_wanted=True), loads, now=131) == Stop(["a"])


class Comer:
    """A tenant that wants to come back whenever it has made way."""

    def __init__(self, name: str, n_bytes: int, room: Room, leaves_after: int = 0) -> None:
        self.name = name
        self.is_wanted = True
        self.stays_until = 0.0
        self.n_held = 0
        self.is_leaving = False
        self.comes: list[asyncio.Task[None]] = []
        self._n_bytes = n_bytes
        self._wanted_until = 0.0
        self._room = room
        self._leaves_after = leaves_after  # turns of the event loop
        room.enter(self)

    def occupant(self) -> Occupant | None:
        if not self.n_held:
            return None
        return of(self.name, self.n_held, is_wanted=self.is_wanted, stays_until=self.stays_until)

    @property
    def wanted_until(self) -> float:
        return math.inf if self.is_wanted else self._wanted_until

    def want(self) -> None:
        self.is_wanted = True

    def leave(self) -> None:
        self.is_wanted, self._wanted_until = False, time.monotonic()
        self._room.changed()

    async def come(self) -> None:
        if await self._room.wait_for(self, self._n_bytes):
            self.n_held = self._n_bytes
            self._room.changed()

    async def make_way(self) -> None:
        self.is_leaving = True
        try:
            for _ in range(self._leaves_after):
                await asyncio.sleep(0)
        finally:
            self.is_leaving = False
        self.n_held = 0
        self._room.changed()
        self.comes.append(asyncio.create_task(self.come()))


def test_who_makes_way_with_others_does_not_come_back_before_all_have() -> None:
    async def test() -> None:
        room = Room(100, patience_s=0)
        light = Comer("light", 40, room)
        medium = Comer("medium", 40, room, leaves_after=10)
        heavy = Comer("heavy", 90, room)
        heavy.stays_until = math.inf
        await asyncio.gather(light.come(), medium.come())
        await asyncio.wait_for(heavy.come(), 5)
        assert (light.n_held, medium.n_held, heavy.n_held) == (0, 0, 90)
        assert len(light.comes) == len(medium.comes) == 1
        heavy.n_held = 0
        room.changed()
        await asyncio.gather(*light.comes, *medium.comes)
        assert (light.n_held, medium.n_held) == (40, 40)

    asyncio.run(test())


def test_who_fits_now_and_beside_the_one_that_comes_does_not_wait_for_who_goes() -> None:
    async def test() -> None:
        room = Room(100, patience_s=0)
        medium = Comer("medium", 60, room, leaves_after=20)
        heavy, small, large = (
            Comer("heavy", 80, room),
            Comer("small", 10, room),
            Comer("l", 30, room),
        )
        await medium.come()
        coming = asyncio.create_task(heavy.come())
        await asyncio.sleep(0)
        await small.come()
        assert (medium.n_held, small.n_held, heavy.n_held) == (60, 10, 0)
        beyond = asyncio.create_task(large.come())
        await coming
        assert (heavy.n_held, small.n_held, large.n_held) == (80, 10, 0)
        for task in (beyond, *medium.comes):
            task.cancel()

    asyncio.run(test())


def test_who_fits_later_beside_those_that_go_and_the_one_that_comes_waits_no_longer() -> None:
    async def test() -> None:
        room = Room(100, patience_s=0)
        embedding = Comer("embedding", 35, room, leaves_after=5)
        heavy = Comer("heavy", 60, room, leaves_after=1000)
        medium, light = Comer("medium", 70, room), Comer("light", 20, room)
        await heavy.come()
        await embedding.come()
        coming = asyncio.create_task(medium.come())
        await asyncio.sleep(0)
        await asyncio.wait_for(light.come(), 5)
        assert (heavy.n_held, embedding.n_held, light.n_held) == (60, 0, 20)
        await coming
        assert (heavy.n_held, medium.n_held, light.n_held) == (0, 70, 20)
        for task in (*heavy.comes, *embedding.comes):
            task.cancel()

    asyncio.run(test())


def test_nothing_is_kept_for_one_that_is_wanted_no_more() -> None:
    async def test() -> None:
        room = Room(100, patience_s=1000)
        light = Comer("light", 60, room, leaves_after=10**9)
        heavy, medium = Comer("heavy", 80, room), Comer("medium", 30, room)
        await light.come()
        room._patience_s = 0  # others go at once,
        coming = asyncio.create_task(heavy.come())
        while not light.is_leaving:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0)
        room._patience_s = 1000  # and for long
        heavy.leave()
        await asyncio.wait_for(medium.come(), 5)
        assert (light.n_held, medium.n_held) == (60, 30)
        for task in (coming, *light.comes):
            task.cancel()

    asyncio.run(test())


def test_who_waits_for_others_that_wait_goes_when_nobody_wants_it_any_more() -> None:
    async def test() -> None:
        room = Room(100, patience_s=0)
        heavy = Comer("heavy", 60, room, leaves_after=1000)
        medium, light = Comer("medium", 70, room), Comer("light", 80, room)
        await heavy.come()
        coming = asyncio.create_task(medium.come())
        other = asyncio.create_task(light.come())
        await asyncio.sleep(0)
        light.leave()
        await asyncio.wait_for(other, 5)
        assert (heavy.n_held, medium.n_held, light.n_held) == (60, 0, 0)
        await coming
        assert medium.n_held == 70
        for task in heavy.comes:
            task.cancel()

    asyncio.run(test())


def test_nobody_goes_for_one_that_is_wanted_no_more_or_fits_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(ends: Callable[[Comer, Comer], None]) -> int:
        room = Room(100, patience_s=0.05)
        light = Comer("light", 60, room, leaves_after=10**9)
        small = Comer("small", 10, room)
        heavy = Comer("heavy", 40, room)
        await light.come()
        light.leave()
        await small.come()
        small.stays_until = math.inf
        coming = asyncio.create_task(heavy.come())
        for _ in range(5):
            await asyncio.sleep(0)
        ends(heavy, small)
        room.changed()
        await asyncio.wait_for(coming, 5)
        assert (light.n_held, light.is_leaving) == (60, False)
        return heavy.n_held

    def leaves(heavy: Comer, small: Comer) -> None:
        small.n_held = 0

    def is_wanted_no_more(heavy: Comer, small: Comer) -> None:
        heavy.leave()

    assert asyncio.run(test(leaves)) == 40
    assert asyncio.run(test(is_wanted_no_more)) == 0
    assert not caplog.records, "which asyncio makes of errors that nobody looks at"


def test_those_that_go_do_so_also_for_one_whose_client_comes_again() -> None:
    async def test() -> None:
        room = Room(100, patience_s=60)
        light, heavy = Comer("light", 60, room, leaves_after=100), Comer("heavy", 80, room)
        await light.come()
        light.leave()
        coming = asyncio.create_task(heavy.come())
        for heavy_does in (heavy.leave, heavy.want, heavy.leave, heavy.want):
            for _ in range(5):
                await asyncio.sleep(0)
            assert light.is_leaving
            heavy_does()
        await asyncio.wait_for(coming, 5)
        assert (light.n_held, heavy.n_held) == (0, 80)

    asyncio.run(test())


FAKE = 42 << 20  # what a worker of the fake backend is taken to need
TWO = {"memory_limit": "100M", "swap_wait_s": 0.05}


def test_models_that_nobody_wants_make_way() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tiers = manager.tiers
        for name in ("light", "medium", "heavy", "medium"):
            assert await ask(tiers[name]) == "You said: Hi"  # type: ignore[index]
        assert [t.state for t in tiers.values()] == ["stopped", "ready", "ready"]

    run(test, launches, TWO, light=fake(), medium=fake(), heavy=fake())
    assert len(launches.handles) == 3


def test_one_that_is_used_makes_way_after_a_while_and_nothing_is_cut(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 300}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        long = asyncio.create_task(ask(light, "long"))
        await until(lambda: light.n_running)
        other = asyncio.create_task(ask(heavy))
        await until(lambda: heavy.state == "waiting")
        later = asyncio.create_task(ask(light, "after"))
        assert await long == "x" * 300
        assert await other == "You said: Hi"
        assert await later == "You said: after"

    run(test, server=TWO | {"memory_limit": "50M"}, light=fake(path), heavy=fake(path))


def test_one_that_makes_way_serves_on_when_the_other_is_wanted_no_more(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 20_000}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        with light.lease(), light.submit(request("long")) as generation:
            await generation.started()
            other = asyncio.create_task(ask(heavy))
            await until(lambda: light._n_making_way)
            later = asyncio.create_task(ask(light))
            other.cancel()
            assert await asyncio.wait_for(later, 5) == "You said: Hi"
            assert light.n_running == 1, "the long answer goes on"
            assert heavy.state == "stopped"
            assert light.metrics.evictions._value.get() == 0

    run(test, server=TWO | {"memory_limit": "50M"}, light=fake(path), heavy=fake())


def test_one_that_makes_way_does_so_also_when_the_others_client_tries_again(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 1000}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        long = asyncio.create_task(ask(light, "long"))
        await until(lambda: light.n_running)
        other = asyncio.create_task(ask(heavy))
        await until(lambda: light._n_making_way)
        later = asyncio.create_task(ask(light))
        other.cancel()
        await until(lambda: not heavy.is_wanted)
        assert await ask(heavy) == "You said: Hi"
        assert long.done()
        assert not later.done()
        assert await later == "You said: Hi"

    server = {"memory_limit": "50M", "swap_wait_s": 0.3}
    run(test, server=server, light=fake(path), heavy=fake())


def test_two_that_take_turns_stay_for_as_long_as_they_load(tmp_path: Any) -> None:
    path = script(tmp_path, load_s=0.2)
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        async def busy(tier: Tier) -> None:
            for _ in range(10):
                await ask(tier)

        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        await asyncio.gather(*(busy(tier) for tier in (light, heavy) for _ in range(3)))
        assert 2 <= len(launches.handles) <= 10

    run(test, launches, TWO | {"memory_limit": "50M"}, light=fake(path), heavy=fake(path))


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    async def test(manager: ModelManager) -> None:
        assert await ask(manager.tiers["light"]) == "You said: Hi"
        with pytest.raises(InsufficientMemory) as caught:
            await ask(manager.tiers["heavy"])
        assert caught.value.retry_after_s is None
        assert caught.value.headers() == {"x-should-retry": "false"}
        assert caught.value.numbers["needed_bytes"] == FAKE
        assert caught.value.numbers["available_bytes"] == (50 << 20) - FAKE
        assert manager.tiers["heavy"].state == "stopped"

    run(test, server={"memory_limit": "50M"}, light=fake(pin=True), heavy=fake())


def test_one_that_was_to_be_loaded_at_start_and_never_fits_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = {"memory_limit": "50M"}
    with serving(settings(server, light=fake(pin=True), heavy=fake(preload=True))) as service:
        wait_until(lambda: service.manager.tiers["heavy"].state == "ready")
        assert service.http.get("/health").status_code == 200
    for preload, status in ((False, 200), (True, 503)):
        tiers = {"light": fake(pin=True, preload=True), "heavy": fake(preload=preload)}
        with serving(settings(server, **tiers)) as service:
            wait_until(lambda: service.manager.tiers["light"].state == "ready")
            for _ in range(2):
                reply = service.chat(model="heavy")
                assert (reply.status_code, reply.json()["error"]["code"]) == (
                    503, "insufficient_memory",
                )  # fmt: skip
            reply = service.http.get("/health")
            assert reply.status_code == status
            assert reply.json()["tiers"]["heavy"]["state"] == "failed"
            assert "MEMORY_LIMIT" in reply.json()["tiers"]["heavy"]["reason"]
            assert service.http.get("/ready").status_code == 503
            service.http.post("/v1/models/light/unload")
            for path in ("/health", "/ready"):
                assert service.http.get(path).status_code == 200, "it could be loaded now"
            said = [r for r in caplog.messages if "heavy cannot be loaded" in r]
            assert len(said) == 1
            caplog.clear()


def test_waiting_for_memory_has_an_end_that_says_when_to_try_again(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 3000}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        await light.load()
        with light.submit(request("long")) as generation:
            await generation.started()
            with pytest.raises(InsufficientMemory) as caught:
                await ask(manager.tiers["heavy"])
            assert caught.value.retry_after_s

    server = {"memory_limit": "50M", "queue_timeout_s": 0.5}
    run(test, server=server, light=fake(path), heavy=fake(path))


def test_waiting_for_memory_has_an_end_also_where_the_file_has_gone(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 3000}, step_ms=1)
    other = Path(script(tmp_path))

    def remove() -> None:
        other.unlink()

    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        await light.load()
        with light.submit(request("long")) as generation:
            await generation.started()
            waiting = asyncio.create_task(ask(heavy))
            await until(lambda: heavy.state == "waiting")
            remove()
            with pytest.raises(InsufficientMemory) as caught:
                await asyncio.wait_for(waiting, 10)
            assert caught.value.numbers["needed_bytes"] == FAKE

    server = {"memory_limit": "50M", "queue_timeout_s": 0.5}
    run(test, server=server, light=fake(path), heavy=fake(str(other)))


def test_waiting_in_line_has_an_end(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 3000}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        await light.load()
        with light.submit(request("long")) as generation:
            await generation.started()
            with pytest.raises(QueueTimeout, match="QUEUE_TIMEOUT_S"):
                await ask(light)
            assert light.n_waiting == 0

    run(test, server={"queue_timeout_s": 0.5}, light=fake(path, n_parallel=1))


def test_a_load_at_start_that_failed_is_tried_again_where_nobody_must_go_for_it(
    tmp_path: Any,
) -> None:
    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        await until(lambda: heavy._loads_at is not None)
        await light.load()
        for n_failed in (1, 2):
            heavy._loads_at = 0.0  # now
            heavy._wakeup.set()
            await until(lambda: heavy._loads_at)
            assert heavy._n_preloads_failed == n_failed
            assert (light.state == "ready") == (n_failed == 1)
            await light.unload()

    heavy = fake(script(tmp_path, fault="load"), preload=True)
    run(test, server={"memory_limit": "50M"}, light=fake(), heavy=heavy)


def test_waiting_for_a_conversion_has_an_end() -> None:
    server = {"queue_timeout_s": 0.2}
    launcher = Held()
    chat = {"model": "light", "messages": [{"role": "user", "content": "Hi"}]}
    with serving(settings(server), launch=launcher) as service:
        for path, body in (
            ("/tokenize", {"content": "a"}),
            ("/detokenize", {"tokens": [97]}),
            ("/v1/messages/count_tokens", chat),
            ("/v1/models/light/load", None),
        ):
            reply = service.http.post(path, json=body, timeout=10)
            assert reply.status_code == 503, reply.text
            assert "QUEUE_TIMEOUT_S" in reply.text
            assert reply.headers["retry-after"]
        launcher.go_on()
        assert service.http.post("/tokenize", json={"content": "a"}).json() == {"tokens": [97]}


def test_waiting_for_memory_has_an_end_for_a_conversion_too(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 3000}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light, heavy = manager.tiers["light"], manager.tiers["heavy"]
        await light.load()
        with light.submit(request("long")) as generation:
            await generation.started()
            with pytest.raises(InsufficientMemory):
                await heavy.detokenize([97])
            assert not heavy.is_wanted

    server = {"memory_limit": "50M", "queue_timeout_s": 0.5}
    run(test, server=server, light=fake(path), heavy=fake(path))


def test_four_tiers_in_random_order_never_have_more_than_the_limit() -> None:
    """Of 200 requests none is cut, and models change places far less often than they could."""
    launches = Launches()
    names = ("light", "medium", "heavy", "embedding")
    dice = random.Random(5)

    async def test(manager: ModelManager) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                held = [t.occupant() for t in manager.tiers.values()]
                most = max(most, sum(o.n_bytes for o in held if o is not None))
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        gate = asyncio.Semaphore(8)

        async def one(n: int) -> None:
            async with gate:
                tier: Tier = manager.tiers[dice.choice(names)]
                if tier.name == "embedding":
                    with tier.lease(), tier.embed(wire.Embed([f"{n}"], ["dense"])) as encoding:
                        assert len(await items_of(encoding)) == 1
                else:
                    assert await ask(tier, f"{n}") == f"You said: {n}"

        await asyncio.gather(*(one(n) for n in range(200)))
        watching.cancel()
        assert FAKE <= most <= 100 << 20

    run(test, launches, TWO, light=fake(), medium=fake(), heavy=fake(), embedding=fake())
    assert 4 <= len(launches.handles) < 100


def test_a_model_is_unloaded_when_its_requests_have_ended_or_by_force(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 300}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        await light.load()
        assert light.state == "ready"
        long = asyncio.create_task(ask(light, "long"))
        await until(lambda: light.n_running)
        await light.unload()
        assert light.state == "stopped"
        assert await long == "x" * 300
        long = asyncio.create_task(ask(light, "long"))
        await until(lambda: light.n_running)
        await light.unload(force=True)
        with pytest.raises(Exception, match="by force"):
            await long
        assert await ask(light) == "You said: Hi"

    run(test, light=fake(path))


def test_urgent_requests_take_places_and_the_last_of_a_full_line_leaves_it(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "long", "answer": "x" * 400}, step_ms=2)

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        order: list[str] = []

        async def one(text: str, priority: int) -> None:
            with light.submit(request(text), priority=priority) as generation:
                await generation.started()
                await generation.tell(lambda _: None)
                order.append(text)

        running = [asyncio.create_task(one(f"long {n}", 10)) for n in range(2)]
        await until(lambda: light.n_running == 2)
        waiting = [asyncio.create_task(one(f"long {n}", 10)) for n in (2, 3)]
        await until(lambda: light.n_waiting == 2)
        with pytest.raises(QueueFull):
            await one("too much", 10)
        await one("urgent", -10)
        assert order == ["urgent"], "it did not wait for those that ran"
        with pytest.raises(QueueFull):
            await waiting[1]
        await asyncio.gather(*running, waiting[0])
        assert sorted(order[1:]) == ["long 0", "long 1", "long 2"]

    run(test, light=fake(path, n_parallel=2, queue_size=2))


def test_workers_that_die_again_and_again_are_not_started_for_ever(tmp_path: Any) -> None:
    path = script(tmp_path, {"match": "die", "fault": "crash"})

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        errors = [type(await outcome(ask(light, "die"))).__name__ for _ in range(4)]
        assert errors[:2] == ["WorkerCrashed"] * 2
        assert errors[-1] == "TierUnavailable"
        assert light.state == "failed"
        assert "died" in (light.life.reason or "")

    run(test, launch_process, light=fake(path))
