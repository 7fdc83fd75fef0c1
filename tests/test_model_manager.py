"""The tiers' queues, workers' lives and the failure contract, without HTTP."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from encoding import Encoding, Item, error_of
from engine import wire
from engine.backends.fake import model_file
from engine.client import Handle, Launcher, launch_process
from engine.model_file import ModelFile
from engine.types import SamplingParams
from errors import (
    BadRequest,
    InternalError,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
    ServiceError,
    TierUnavailable,
    WorkerCrashed,
)
from model_manager import ModelManager
from settings import ServerSettings, TierSettings
from tests.serving import Held, fake, in_threads, script, settings
from tier import Tier
from worker_spec import (
    default_kv_tokens,
    default_n_threads,
    effective_n_ctx,
    lane_tokens,
    worker_spec,
)

T = TypeVar("T")
LONG = {"match": "long", "answer": "0123456789" * 1000}


def request(text: str = "Hi", max_tokens: int | None = None) -> wire.Generate:
    prompt: list[Any] = [wire.Segment(f"<|user|>{text}<|end|><|assistant|>", parse_special=True)]
    return wire.Generate(prompt, True, SamplingParams(), [], max_tokens)


async def ask(tier: Tier, text: str = "Hi", max_tokens: int | None = None) -> str:
    with tier.lease(), tier.submit(request(text, max_tokens)) as generation:
        await generation.started()
        said: list[str] = []
        await generation.tell(lambda out: said.append(out.text))
        return "".join(said)


async def items_of(encoding: Encoding[Item]) -> list[Item]:
    """Every item, in the order in which they were asked for. Raises the fault of the first that has
    one."""
    items = sorted([item async for item in encoding], key=lambda item: item.index)
    for item in items:
        if item.fault is not None:
            raise error_of(item)
    return items


async def until(holds: Callable[[], object]) -> None:
    async def poll() -> None:
        while not holds():  # noqa: ASYNC110 (there is no event for what others see)
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), 20)


class Launches:
    """A launcher that remembers what it launched."""

    def __init__(self, launch: Launcher = in_threads) -> None:
        self.handles: list[Handle] = []
        self._launch = launch

    async def __call__(self, sock: Any) -> Handle:
        self.handles.append(await self._launch(sock))
        return self.handles[-1]

    @property
    def pids(self) -> list[int]:
        return [handle.pid for handle in self.handles]


def run(
    test: Callable[[ModelManager], Awaitable[T]],
    launch: Launcher = in_threads,
    server: dict[str, Any] | None = None,
    **tiers: TierSettings,
) -> T:
    async def main() -> T:
        async with ModelManager(settings(server, **tiers), launch=launch) as manager:
            return await asyncio.wait_for(test(manager), 60)

    return asyncio.run(main())


def test_nothing_is_started_before_somebody_asks() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        await asyncio.sleep(0)
        assert manager.tiers["light"].state == "stopped"

    run(test, launches)
    assert launches.handles == []


def test_many_first_requests_start_one_worker() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> list[str]:
        return await asyncio.gather(*(ask(manager.tiers["light"], f"{i}") for i in range(20)))

    assert run(test, launches) == [f"You said: {i}" for i in range(20)]
    assert len(launches.handles) == 1


def test_a_model_is_found_by_tier_then_alias_then_stem(tmp_path: Path) -> None:
    path = script(tmp_path)
    tiers = {"light": fake(path, aliases=["heavy", "gpt"]), "heavy": fake(path, aliases=["gpt"])}

    async def test(manager: ModelManager) -> None:
        assert manager.resolve("heavy").name == "heavy"
        assert manager.resolve("gpt").name == "light"
        assert manager.resolve(Path(path).stem).name == "light"
        with pytest.raises(ModelNotFound, match="Known: light, heavy, gpt, script0"):
            manager.resolve("Light")

    run(test, **tiers)


def test_the_queue_is_bounded_also_while_the_model_loads() -> None:
    launcher = Held()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        tasks = [asyncio.create_task(ask(tier, f"{i}")) for i in range(3)]
        await until(lambda: tier.state == "starting")
        with pytest.raises(QueueFull) as caught:
            tier.submit(request())
        assert caught.value.retry_after_s is not None
        launcher.go_on()
        assert await asyncio.gather(*tasks) == ["You said: 0", "You said: 1", "You said: 2"]
        assert await ask(tier) == "You said: Hi"

    run(test, launcher, light=fake(queue_size=3))


def test_a_worker_that_answers_one_at_a_time_is_waited_for_longer() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        tier._job_s = 2.0
        before = tier._wait_s(8)
        await ask(tier)
        assert tier.life.worker is not None
        tier._job_s, tier.life.worker.ready = 2.0, wire.Ready(100, 1)
        assert (before, tier._wait_s(8)) == (4, 16)

    run(test, light=fake(n_parallel=4))


def test_requests_are_served_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> list[int]:
        order: list[int] = []

        async def one(i: int) -> None:
            await ask(manager.tiers["light"], f"{i}")
            order.append(i)

        await asyncio.gather(*map(one, range(10)))
        return order

    assert run(test, light=fake(n_parallel=1)) == list(range(10))


def test_those_that_wait_are_served_by_priority() -> None:
    async def test(manager: ModelManager) -> list[str]:
        tier = manager.tiers["light"]
        order: list[str] = []

        async def one(name: str, priority: int) -> None:
            with tier.submit(request(name), priority=priority) as generation:
                await generation.started()
                order.append(name)
                await generation.tell(lambda _: None)

        asked = {"low": 2, "first": 0, "second": 0, "high": -2}
        await asyncio.gather(*(one(name, priority) for name, priority in asked.items()))
        return order

    assert run(test, light=fake(n_parallel=1)) == ["high", "first", "second", "low"]


def test_leaving_the_block_ends_a_request_wherever_it_is(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with tier.submit(request("long")) as running, tier.submit(request("long")):
            await running.started()
        assert await asyncio.wait_for(ask(tier), 5) == "You said: Hi"

    run(test, light=fake(script(tmp_path, LONG, step_ms=1), n_parallel=1))


def test_one_that_left_during_the_load_is_never_run_and_the_load_is_kept(tmp_path: Path) -> None:
    launcher = Held()
    launches = Launches(launcher)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with tier.submit(request("poison")):
            await until(lambda: tier.state == "starting")
        launcher.go_on()
        assert await ask(tier) == "You said: Hi"

    poison = {"match": "poison", "fault": "step"}
    run(test, launches, light=fake(script(tmp_path, poison)))
    assert len(launches.handles) == 1


def test_a_load_that_fails_fails_who_waits_and_is_not_repeated_at_once(tmp_path: Path) -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        for error in await asyncio.gather(*(ask(tier) for _ in range(3)), return_exceptions=True):
            assert isinstance(error, ModelLoadFailed)
            assert error.message == "The fake backend was told to fail."
        assert tier.state == "failed"
        with pytest.raises(TierUnavailable, match=r"told to fail\. It is tried again in") as caught:
            await ask(tier)
        assert caught.value.retry_after_s
        assert await ask(manager.tiers["heavy"]) == "You said: Hi"

    tiers = {"light": fake(script(tmp_path, fault="load")), "heavy": fake()}
    run(test, launches, **tiers)
    assert len(launches.handles) == 2


def test_a_file_that_was_repaired_is_loaded(tmp_path: Path) -> None:
    path = Path(script(tmp_path))
    good = path.read_text()
    path.write_text("not a script")

    def repair() -> None:
        path.write_text(good)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with pytest.raises(ModelLoadFailed, match="cannot read the script"):
            await ask(tier)
        repair()
        assert await ask(tier) == "You said: Hi"
        assert tier.life.status() == ("ready", None)

    run(test, light=fake(str(path)))


def test_a_repaired_file_is_loaded_at_once_also_after_a_worker_failed(tmp_path: Path) -> None:
    path = Path(script(tmp_path, fault="load"))

    def repair() -> None:
        path.write_text('{"load_s": 0}')

    async def test(manager: ModelManager) -> None:
        with pytest.raises(ModelLoadFailed):
            await ask(manager.tiers["light"])
        repair()
        assert await ask(manager.tiers["light"]) == "You said: Hi"

    run(test, light=fake(str(path)))


def test_a_file_that_is_replaced_during_the_load_is_not_taken_for_what_answers(
    tmp_path: Path,
) -> None:
    path, other = Path(script(tmp_path)), Path(script(tmp_path, step_ms=1))
    launcher = Held()

    def replace_it() -> None:
        other.replace(path)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        asked = asyncio.create_task(ask(tier))
        await until(lambda: tier.state == "starting")
        before = tier.identity
        replace_it()
        assert tier.identity == before
        launcher.go_on()
        await asked
        assert tier.identity != before
        assert not tier.is_still(before)
        assert tier.is_still(tier.identity), "it was loaded once more"

    run(test, launcher, light=fake(str(path)))


def test_what_changes_answers_changes_the_fingerprint_and_nothing_else(tmp_path: Path) -> None:
    path = script(tmp_path)
    found: list[str] = []

    async def test(manager: ModelManager) -> None:
        first, other = (manager.tiers[name].fingerprint for name in ("light", "medium"))
        assert first == other
        found.append(first)

    decisive: list[dict[str, Any]] = [
        {}, {"n_batch": 128}, {"n_gpu_layers": 1}, {"flash_attention": False}, {"n_ctx": 100}
    ]  # fmt: skip
    for values in decisive:
        of_others = fake(path, n_parallel=1, max_stall_ms=100, **values)
        run(test, light=fake(path, **values), medium=of_others)
    assert len(set(found)) == len(found)


def test_a_file_that_is_replaced_during_each_load_is_neither(tmp_path: Path) -> None:
    path = Path(script(tmp_path))
    n_launches = 0

    def replace_it() -> None:
        nonlocal n_launches
        n_launches += 1
        path.write_text(json.dumps({"step_ms": n_launches}))

    async def replace_and_launch(sock: socket.socket) -> Handle:
        replace_it()
        return await in_threads(sock)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        before = tier.identity
        assert await ask(tier) == "You said: Hi"
        assert n_launches == 2
        for identity in (before, tier.identity):
            assert not tier.is_still(identity)

    run(test, replace_and_launch, light=fake(str(path)))


def test_a_file_that_is_replaced_while_memory_is_waited_for_is_the_one_that_is_loaded(
    tmp_path: Path,
) -> None:
    path = Path(script(tmp_path, {"match": "Hi", "answer": "old"}))
    other = Path(script(tmp_path, {"match": "Hi", "answer": "new"}))

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        wait_for = manager.room.wait_for
        n_waits = 0

        def replace_it() -> None:
            if other.exists():
                other.replace(path)
                tier.model()  # as any request does

        async def replaced_meanwhile(tenant: Any, needed: int) -> bool:
            nonlocal n_waits
            n_waits += 1
            replace_it()
            return await wait_for(tenant, needed)

        manager.room.wait_for = replaced_meanwhile  # type: ignore[method-assign]
        assert await ask(tier) == "new"
        assert tier.is_still(tier.identity)
        assert n_waits == 2, "for the memory of each"

    run(test, light=fake(str(path)))


def test_memory_is_unknown_of_a_worker_that_ends_while_it_is_asked() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        worker = tier.life.worker

        class Ending:
            @property
            def pid(self) -> int:
                tier.life.worker = None  # as the event loop does, beside the thread that asks
                return 1 << 40

        tier.life.worker = Ending()  # type: ignore[assignment]
        assert tier.life.memory_bytes is None
        tier.life.worker = worker

    run(test)


def test_a_request_that_cannot_be_sent_fails_alone(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]

        async def bad() -> str:
            with tier.submit(request(max_tokens=2**64)) as generation:
                await generation.started()
            return ""

        good = [ask(tier, f"{i}") for i in range(3)]
        error, *answers = await asyncio.gather(outcome(bad()), *good)
        assert isinstance(error, InternalError)
        assert answers == ["You said: 0", "You said: 1", "You said: 2"]

    run(test, light=fake(n_parallel=1))


def test_a_fault_of_ours_fails_who_waits_and_the_tier_goes_on() -> None:
    async def fails(sock: socket.socket) -> Handle:
        raise ZeroDivisionError

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with pytest.raises(InternalError, match="The log has the reason"):
            await ask(tier)
        with pytest.raises(TierUnavailable, match="tried again"):
            await ask(tier)

    run(test, fails)


def test_a_load_that_gets_no_further_is_ended(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        with pytest.raises(ModelLoadFailed, match="got no further"):
            await ask(manager.tiers["light"])

    run(test, launches, {"watchdog_s": 0.2}, light=fake(script(tmp_path, load_s=1000)))
    assert not any(psutil.pid_exists(pid) for pid in launches.pids)


def test_closing_during_an_idle_stop_leaves_no_process(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        await until(lambda: tier.state == "stopping")

    run(test, launches, light=fake(idle_ttl_s=0.01))
    assert not any(psutil.pid_exists(pid) for pid in launches.pids)


def test_an_idle_worker_is_stopped_and_started_again(tmp_path: Path) -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        assert await ask(tier) == "You said: Hi"
        await until(lambda: tier.state == "stopped")
        assert await ask(tier) == "You said: Hi"

    run(test, launches, light=fake(idle_ttl_s=0.01))
    assert len(launches.handles) == 2


def test_how_long_a_model_stays_may_be_said_when_nobody_uses_it() -> None:
    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        assert await ask(light) == "You said: Hi"
        await until(lambda: not light._wakeup.is_set())  # it waits for IDLE_TTL_S to be over
        light.keep_alive(0)
        await until(lambda: light.state == "stopped")

    run(test, light=fake())


def test_how_long_a_model_stays_ends_with_its_worker(tmp_path: Path) -> None:
    def kill_worker_of(tier: Tier) -> None:
        assert tier.life.worker is not None
        tier.life.worker._handle.kill()

    async def test(manager: ModelManager) -> None:
        light = manager.tiers["light"]
        await ask(light)
        light.keep_alive(-1)
        kill_worker_of(light)
        await until(lambda: light.state == "stopped")
        assert light._keep_alive_s is None
        with light.lease(), light.submit(request("hang")):
            await until(lambda: light.n_running)
            light.keep_alive(-1)
            kill_worker_of(light)
            await until(lambda: light.life.worker is None)
            assert light._keep_alive_s == -1, "it is tried again"

    path = script(tmp_path, {"match": "hang", "fault": "hang"})
    run(test, launch_process, light=fake(path))


def test_a_lease_keeps_the_worker(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with tier.lease():
            await ask(tier)
            await asyncio.sleep(0.1)
            assert tier.state == "ready"
        await until(lambda: tier.state == "stopped")

    run(test, light=fake(idle_ttl_s=0.02))


def test_a_lease_keeps_the_worker_also_when_its_time_runs_already() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        await until(lambda: not tier._wakeup.is_set())
        with tier.lease():
            await asyncio.sleep(0.3)
            assert tier.state == "ready"
        await until(lambda: tier.state == "stopped")

    run(test, light=fake(idle_ttl_s=0.15))


def test_a_pinned_tier_stays_and_a_preloaded_one_needs_no_request() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await until(lambda: tier.state == "ready")
        await ask(tier)
        await asyncio.sleep(0.05)
        assert tier.state == "ready"

    run(test, light=fake(preload=True, pin=True, idle_ttl_s=0.01))


def test_closing_fails_what_is_left_and_leaves_no_process(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> list[asyncio.Task[str]]:
        tier = manager.tiers["light"]
        tasks = [asyncio.create_task(ask(tier, "long")) for _ in range(3)]
        await until(lambda: len(tier._running) == 2)
        return tasks

    async def main() -> None:
        tier = fake(script(tmp_path, LONG, step_ms=1), n_parallel=2)
        async with ModelManager(settings(light=tier), launch=launches) as manager:
            tasks = await test(manager)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, TierUnavailable)
        with pytest.raises(TierUnavailable):
            manager.tiers["light"].submit(request())

    asyncio.run(main())
    assert not any(psutil.pid_exists(pid) for pid in launches.pids)


def test_closing_during_a_load_leaves_no_process(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        task = asyncio.create_task(ask(tier))
        await until(lambda: launches.handles and tier.state == "starting")
        task.cancel()

    run(test, launches, light=fake(script(tmp_path, load_s=30)))
    assert not any(psutil.pid_exists(pid) for pid in launches.pids)


# texts and tokens


def text(of: str) -> list[wire.Segment]:
    return [wire.Segment(of, parse_special=True)]


def test_the_first_to_ask_for_tokens_loads_the_model() -> None:
    launches = Launches()

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        answer, back = await asyncio.gather(
            tier.tokenize(text("Hi"), add_bos=True), tier.detokenize([72, 105])
        )
        assert (answer.ids, answer.pieces, back) == ([72, 105], [b"H", b"i"], "Hi")
        with pytest.raises(BadRequest, match="0 to"):
            await tier.detokenize([100_000])
        assert not tier._conversions

    run(test, launches)
    assert len(launches.handles) == 1


def test_tokens_do_not_wait_for_those_that_run_or_wait(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with tier.submit(request("long")) as running, tier.submit(request("long")):
            await running.started()
            for _ in range(5):
                assert await tier.detokenize([72]) == "H"
            assert tier._running
            assert tier._waiting

    run(test, light=fake(script(tmp_path, LONG, step_ms=1), n_parallel=1))


def test_tokens_are_refused_as_answers_are_while_the_model_cannot_be_loaded(
    tmp_path: Path,
) -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        with pytest.raises(ModelLoadFailed, match="told to fail"):
            await tier.tokenize(text("Hi"), add_bos=True)
        with pytest.raises(TierUnavailable, match="tried again"):
            await tier.detokenize([72])
        assert not tier._conversions

    run(test, light=fake(script(tmp_path, fault="load")))


def test_those_that_wait_for_tokens_are_bounded_and_told_when_the_service_stops() -> None:
    launcher = Held()
    launches = Launches(launcher)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        tasks = [asyncio.create_task(tier.detokenize([72])) for _ in range(3)]
        await until(lambda: tier.state == "starting")
        with pytest.raises(QueueFull):
            await tier.detokenize([72])
        tasks[0].cancel()
        manager.abandon()
        left, *told = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(left, asyncio.CancelledError)
        assert all(isinstance(error, TierUnavailable) for error in told)
        with pytest.raises(TierUnavailable):
            await tier.tokenize(text("Hi"), add_bos=True)
        assert not tier._conversions
        launcher.go_on()
        await until(lambda: launches.handles)  # then closing ends a worker, not a launch

    run(test, launches, light=fake(queue_size=3))


async def asked_in_vain(
    tier: Tier, launches: Launches
) -> tuple[psutil.Process, "asyncio.Task[str]"]:
    """A worker that does nothing, and who waits for a text of it."""
    worker = psutil.Process(launches.pids[0])
    worker.suspend()
    question = asyncio.create_task(tier.detokenize([72]))
    await until(lambda: any(c.worker for c in tier._conversions.values()))
    return worker, question


def test_who_waits_for_tokens_of_a_worker_is_told_when_the_service_stops() -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        worker, question = await asked_in_vain(tier, launches)
        manager.abandon()
        with pytest.raises(TierUnavailable):
            await asyncio.wait_for(question, 5)
        worker.kill()

    run(test, launches)


def test_tokens_that_a_worker_counts_are_in_no_queue() -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        tier._server = tier._server.model_copy(update={"queue_timeout_s": 0.2})
        worker, question = await asked_in_vain(tier, launches)
        await asyncio.wait({question}, timeout=0.3)
        worker.resume()
        assert await question == "H"

    run(test, launches)


def test_a_text_that_cannot_be_sent_fails_alone() -> None:
    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        bad = tier.tokenize(text("\ud800"), add_bos=True)
        error, answer = await asyncio.gather(bad, ask(tier), return_exceptions=True)
        assert isinstance(error, InternalError)
        assert answer == "You said: Hi"

    run(test)


def test_who_waits_for_tokens_when_the_worker_dies_is_told(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        worker, question = await asked_in_vain(tier, launches)
        worker.kill()
        with pytest.raises(WorkerCrashed, match="died"):
            await question
        assert await tier.detokenize([72]) == "H"

    run(test, launches)


def test_a_worker_that_hangs_is_ended_also_when_only_tokens_are_waited_for() -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        await ask(tier)
        psutil.Process(launches.pids[0]).suspend()
        with pytest.raises(WorkerCrashed):
            await tier.detokenize([72])

    run(test, launches, {"watchdog_s": 1.5})


# when a worker dies


async def outcome(work: Coroutine[Any, Any, str]) -> str | ServiceError:
    try:
        return await work
    except ServiceError as error:
        return error


def test_a_worker_that_dies_costs_only_those_that_had_text_and_the_poison(tmp_path: Path) -> None:
    launches = Launches(launch_process)
    path = script(tmp_path, LONG, {"match": "poison", "fault": "crash"}, step_ms=1)

    async def test(manager: ModelManager) -> None:
        tier, other = manager.tiers["light"], manager.tiers["heavy"]
        elsewhere = asyncio.create_task(ask(other, "hello " * 50))
        with tier.submit(request("long")) as streaming:
            await streaming.started()
            said: list[wire.TokenOut] = []
            telling = asyncio.create_task(streaming.tell(said.append))
            await until(lambda: said)
            batch = ["poison", *(f"{i}" for i in range(8))]  # more than there are sequences
            tasks = [asyncio.create_task(outcome(ask(tier, text))) for text in batch]
            with pytest.raises(WorkerCrashed, match="died") as caught:
                await telling
            assert "x-should-retry" not in caught.value.headers()
        poisoned, *results = await asyncio.gather(*tasks)
        assert isinstance(poisoned, WorkerCrashed)
        assert poisoned.headers() == {"x-should-retry": "false"}
        assert results == [f"You said: {i}" for i in range(8)]
        assert await elsewhere == "You said: " + "hello " * 50
        assert await ask(tier) == "You said: Hi"
        assert tier.life.status() == ("ready", None)

    tiers = {"light": fake(path, n_parallel=4), "heavy": fake(script(tmp_path, step_ms=1))}
    run(test, launches, **tiers)
    assert len(launches.handles) == 4  # heavy's, the first, the poison's second try, the last
    assert not any(psutil.pid_exists(pid) for pid in launches.pids)


def test_a_worker_that_is_killed_is_replaced_for_the_queue(tmp_path: Path) -> None:
    launches = Launches(launch_process)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        running = asyncio.create_task(outcome(ask(tier, "long")))
        waiting = asyncio.create_task(ask(tier, "patient"))
        await until(lambda: any(g.has_answered for g in tier._running.values()))
        psutil.Process(launches.pids[0]).kill()
        assert isinstance(await running, WorkerCrashed)
        assert await waiting == "You said: patient"

    run(test, launches, light=fake(script(tmp_path, LONG, step_ms=1), n_parallel=1))


def test_a_worker_that_hangs_is_ended_and_its_requests_tried_again(tmp_path: Path) -> None:
    launches = Launches(launch_process)
    path = script(tmp_path, {"match": "tar", "fault": "hang"})

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        stuck, fine = await asyncio.gather(outcome(ask(tier, "tar")), outcome(ask(tier)))
        assert isinstance(stuck, WorkerCrashed)
        assert fine == "You said: Hi"

    run(test, launches, {"watchdog_s": 1.5}, light=fake(path))


def test_a_worker_that_dies_while_it_loads_is_a_load_failure(tmp_path: Path) -> None:
    async def test(manager: ModelManager) -> None:
        with pytest.raises(ModelLoadFailed, match="killed by SIGKILL"):
            await ask(manager.tiers["light"])

    run(test, launch_process, light=fake(script(tmp_path, fault="load_crash")))


def test_kv_tokens_are_never_less_than_one_request_needs() -> None:
    model = model_file("")
    assert default_kv_tokens(1000, 4, model) == 4000
    assert default_kv_tokens(1000, 4, replace(model, kv_bytes_per_token=1 << 40)) == 1000


def test_the_cells_bound_requests_only_where_text_is_generated() -> None:
    tier = TierSettings(backend="fake", kv_tokens=64)
    for kind, n_ctx in (("chat", 64), ("embedding", 8192), ("reranker", 8192)):
        model = replace(model_file(""), kind=kind, n_ctx_train=1 << 17)
        assert effective_n_ctx(tier, model) == n_ctx


def test_where_no_physical_cores_are_told_threads_are_as_many_as_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr("worker_spec.n_cores", lambda: 4.5)
    assert default_n_threads() == 4


@pytest.mark.parametrize(
    ("n_ctx", "kv_tokens", "expected"),
    [
        (2048, None, 4096),
        (2048, 3000, 3000),
        (4096, 9000, 4096),
        (4097, 9000, 9000),
        (None, None, 8192 * 4),
    ],
)
def test_cells_do_not_decide_how_rope_is_scaled(
    n_ctx: int | None, kv_tokens: int | None, expected: int
) -> None:
    """Where a request cannot have more tokens than the short context of a model, nor can all."""
    model = replace(model_file(""), n_ctx_short=4100, n_ctx_train=1 << 17)
    tier = TierSettings(backend="fake", n_ctx=n_ctx, kv_tokens=kv_tokens, n_parallel=4)
    assert worker_spec("light", tier, model, ServerSettings()).kv_tokens == expected


SMALL = replace(model_file(""), n_layer=30, n_head=9, size_bytes=98_000_000, has_plain_cells=True)


@pytest.mark.parametrize(
    ("model", "n_ctx", "n_parallel", "kv_tokens", "expected"),
    [
        (SMALL, 8192, 8, 16384, 2048),
        (SMALL, 8192, 8, 18000, 2048),  # a context's cells come in multiples of 256
        (SMALL, 1000, 8, 16384, 1024),  # no sequence becomes longer
        (SMALL, 8192, 64, 16000, 0),
        (SMALL, 256, 8, 256, 0),  # so few cells take no time
        (replace(SMALL, n_layer=16, n_head=32, size_bytes=800_000_000), 8192, 8, 12000, 1280),
        (replace(SMALL, n_layer=32, n_head=32, size_bytes=4_900_000_000), 8192, 8, 8192, 0),
        (replace(SMALL, has_plain_cells=False), 8192, 8, 16384, 0),
    ],
)
def test_sequences_have_cells_apart_where_looking_for_them_takes_long(
    model: ModelFile, n_ctx: int, n_parallel: int, kv_tokens: int, expected: int
) -> None:
    assert lane_tokens(n_ctx, n_parallel, kv_tokens, model) == expected


@pytest.mark.parametrize(
    ("values", "model", "has_lanes"),
    [
        ({}, SMALL, True),
        ({"n_parallel": 3}, SMALL, True),
        ({"n_parallel": 2}, SMALL, False),
        ({"n_parallel": 2, "flash_attention": False}, SMALL, True),
        ({"backend": "mlx"}, SMALL, False),
        ({}, replace(SMALL, kind="embedding"), False),
    ],
)
def test_lanes_are_for_several_answers_of_llama_cpp(
    values: dict[str, Any], model: ModelFile, has_lanes: bool
) -> None:
    server = ServerSettings.model_construct(log_level="INFO", log_format="text")
    spec = worker_spec("light", TierSettings(**values), model, server)
    assert (spec.lane_tokens > 0) == has_lanes
