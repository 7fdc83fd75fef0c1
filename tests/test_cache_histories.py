"""Whatever happens around it, a result out of the cache is the one that would be made without.

Histories of requests at the same time, some of which leave early, of a clock that goes on, of
entries that are cleared or find no room, of a disk that is slow, forgets and lies, and of models
that fail and die, on the fake backend.
"""

import asyncio
import copy
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from answers import Answers, Begun
from cache import Cache
from cache_disk import DiskStats
from cache_file import Stored
from caching import Caching
from engine import wire
from engine.client import Handle
from engine.types import SamplingParams
from errors import ServiceError
from generating import Generation
from lookups import Lookups
from model_manager import ModelManager
from tests import serving
from tests.serving import fake, in_threads, script
from tier import Tier

T = TypeVar("T")
RULES = (
    {"match": "dice", "answer": ["one", "two", "three"]},
    {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
    {"match": "long", "answer": "0123456789" * 6},
    {"match": "poison", "fault": "nan"},
)
HISTORIES = settings(
    max_examples=settings().max_examples,  # 100 of each kind, or 10,000 with the profile `deep`
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Disk:
    """A disk for the cache that the test moves: what it has is there after `n` turns of the loop,
    is damaged, or is gone."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Stored] = {}
        self.n_turns = 0
        self.is_damaged = self.is_lost = False

    def start(self) -> None: ...

    async def close(self) -> None: ...

    async def get_many(self, kind: str, keys: Sequence[bytes]) -> dict[bytes, Stored]:
        known = {key: self.entries[key] for key in keys if key in self.entries}
        for _ in range(self.n_turns):
            await asyncio.sleep(0)
        if self.is_lost:
            return {}
        if self.is_damaged:  # in a way that a checksum would have found
            known = {key: s._replace(value=s.value[:-1]) for key, s in known.items()}
        return {key: stored for key, stored in known.items() if stored.kind == kind}

    def put(self, key: bytes, stored: Stored) -> None:
        if not self.is_lost:
            self.entries[key] = stored

    def touch(self, keys: Any) -> None: ...

    async def clear(self, kind: str | None) -> None:
        self.entries = {k: s for k, s in self.entries.items() if kind not in (None, s.kind)}

    async def stats(self) -> DiskStats:
        return DiskStats()


@dataclass
class Service:
    """What answers, with a cache or without."""

    manager: ModelManager
    answers: Answers
    lookups: Lookups


class World:
    """Tiers on the fake backend and a loop of their own, for all histories."""

    def __init__(self, path: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.handles: list[Handle] = []
        of = serving.settings(light=fake(path), embedding=fake(path), reranker=fake(path))
        self.manager = ModelManager(of, launch=self._launch)
        # that nothing happens to
        plain = ModelManager(of, launch=in_threads)
        self.plain = Service(plain, Answers(None, "off"), Lookups(None))
        self.managers = [self.manager, plain]
        self._expected: dict[str, Any] = {}

    async def _launch(self, sock: Any) -> Handle:
        self.handles.append(await in_threads(sock))
        return self.handles[-1]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    async def expected(self, ask: "Question", seed: int) -> Any:
        """What the same request is answered without a cache."""
        name = repr((ask, seed))
        if name not in self._expected:
            told = await ask.put(self.plain, Caching(), seed)
            self._expected[name] = told
        return copy.deepcopy(self._expected[name])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(script(tmp_path_factory.mktemp("histories"), *RULES))
    for manager in world.managers:
        world.run(manager.__aenter__())
    yield world
    for manager in world.managers:
        world.run(manager.__aexit__())
    world.loop.close()


class Question:
    """One of what clients ask. Its answer is plain data; a ServiceError is one too."""

    texts: tuple[str, ...]

    async def put(
        self, service: Service, caching: Caching, seed: int, n_items: int | None = None
    ) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Chat(Question):
    texts: tuple[str, ...]
    temperature: float
    is_seeded: bool
    n: int
    max_tokens: int | None
    n_logprobs: int | None

    async def put(
        self, service: Service, caching: Caching, seed: int, n_items: int | None = None
    ) -> Any:
        sampling = SamplingParams(
            temperature=self.temperature, seed=seed, n_logprobs=self.n_logprobs
        )
        requests = [
            wire.Generate(
                [wire.Segment(f"<|user|>{text}<|end|><|assistant|>", True)], True, sampling, [],
                self.max_tokens, n=self.n,
            )
            for text in self.texts
        ]  # fmt: skip
        told: dict[int, list[Any]] = {}
        seen = seed
        n_prompt = 0
        try:
            items = service.answers.to(
                requests,
                service.manager.tiers["light"],
                priority=0,
                is_seeded=self.is_seeded,
                caching=caching,
            )
            async with aclosing(items):
                async for item in items:
                    if n_items == 0:
                        break
                    if isinstance(item, Begun):
                        seen, n_prompt = item.seed, item.n_prompt
                    elif not isinstance(item, Generation):
                        index, out = item
                        told.setdefault(index, []).append(out)
                    n_items = None if n_items is None else n_items - 1
        except ServiceError as error:
            return seen, type(error).__name__, n_prompt, plain(told)
        return seen, "whole" if n_items is None else "left", n_prompt, plain(told)


def plain(told: dict[int, list[wire.TokenOut]]) -> dict[int, Any]:
    """What each choice said, however it was cut."""
    said = {}
    for index, outs in told.items():
        logprobs = [logprob for out in outs for logprob in out.logprobs]
        done = outs[-1].done
        said[index] = "".join(out.text for out in outs), logprobs, done, outs[-1].n_tokens
    return said


@dataclass(frozen=True)
class Embed(Question):
    texts: tuple[str, ...]
    outputs: tuple[Any, ...]
    role: Any
    truncate: Any
    return_tokens: bool

    async def put(
        self, service: Service, caching: Caching, seed: int, n_items: int | None = None
    ) -> Any:
        asked = wire.Embed(
            [*self.texts], [*self.outputs], self.truncate, self.role, self.return_tokens
        )
        tier = service.manager.tiers["embedding"]
        work = service.lookups.vectors(tier, asked, caching)
        return await result(work, n_items)


@dataclass(frozen=True)
class Score(Question):
    texts: tuple[str, ...]  # the queries
    documents: tuple[str, ...]
    tier: Any
    method: Any
    weights: Any
    max_tokens: int | None

    async def put(
        self, service: Service, caching: Caching, seed: int, n_items: int | None = None
    ) -> Any:
        pairs = [(q, d) for q in range(len(self.texts)) for d in range(len(self.documents))]
        asked = wire.Score(
            [*self.texts], [*self.documents], pairs, self.method, self.weights, self.max_tokens
        )
        work = service.lookups.scores(service.manager.tiers[self.tier], asked, caching)
        return await result(work, n_items)


async def result(work: Coroutine[Any, Any, Sequence[Any]], n_turns: int | None) -> Any:
    """What it says, or its error; nothing where its client leaves after so many turns."""
    task = asyncio.ensure_future(work)
    if n_turns is not None:
        for _ in range(n_turns):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait({task})
    if task.cancelled():
        return None
    error = task.exception()
    if isinstance(error, ServiceError):
        return type(error).__name__, error.message, error.numbers
    found = task.result()
    n_tokens = sum(one.item.n_tokens for one in found)
    return [numbers(one) for one in found], n_tokens


def numbers(one: Any) -> Any:
    """Without the tokens: a score's may count at another pair of its text."""
    item = one.item
    if isinstance(item, wire.Scored):
        return item.index, item.n_cut, pytest.approx(item.score, abs=1e-6), one.method, one.scale
    return one


@dataclass
class History:
    """What happens, in order. A question is asked beside those that have not been answered."""

    steps: list[tuple[Any, ...]]
    max_bytes: int
    policy: Any
    can_fail: bool = field(init=False)

    def __post_init__(self) -> None:
        # a step that fails takes along who was in it
        self.can_fail = any(
            step[0] == "kill" or (step[0] == "ask" and "break" in step[1].texts)
            for step in self.steps
        )


CONTROLS = st.sampled_from(["", "", "", "", "no-store", "no-cache", "max-age=5", "max-age=0"])
LEAVES = st.one_of(st.none(), st.none(), st.integers(0, 30))


def histories(questions: st.SearchStrategy[Any]) -> st.SearchStrategy[History]:
    """Of a few questions, so that most have been asked before."""
    return st.lists(questions, min_size=1, max_size=3).flatmap(_histories_of)


def _histories_of(questions: list[Any]) -> st.SearchStrategy[History]:
    ask = st.tuples(
        st.just("ask"), st.sampled_from(questions), CONTROLS, st.sampled_from([None, None, "me"]),
        LEAVES, st.integers(0, 2),
    )  # fmt: skip
    other = st.one_of(
        st.tuples(st.just("wait")),
        st.tuples(st.just("turn"), st.integers(1, 40)),
        st.tuples(st.just("later"), st.sampled_from([1.0, 6.0, 100.0, -100.0])),
        st.tuples(st.just("clear"), st.sampled_from([None, "answer", "dense", "score"])),
        st.tuples(st.just("restart")),
        st.tuples(st.just("disk"), st.integers(0, 5), st.booleans(), st.booleans()),
    )
    steps = st.lists(st.one_of(ask, ask, ask, other, other), min_size=2, max_size=12)
    deadly = st.tuples(steps, steps).map(lambda s: [*s[0], ("kill",), *s[1]])
    return st.builds(
        History,
        st.integers(0, 7).flatmap(lambda n: steps if n else deadly),
        st.sampled_from([1000, 3000, 1 << 20]),
        st.sampled_from(["repeatable", "all"]),
    )


class Play:
    """One history as it happens."""

    def __init__(self, world: World, history: History) -> None:
        self._world = world
        self._history = history
        self.disk = Disk()
        self._now = 1000.0
        self._asked: list[tuple[Question, int, bool, asyncio.Task[Any]]] = []
        self._begin()

    def _begin(self) -> None:
        disk: Any = self.disk
        self.cache = Cache(
            max_bytes=self._history.max_bytes, ttl_s=50, disk=disk, clock=lambda: self._now
        )
        answers = Answers(self.cache, self._history.policy)
        self._service = Service(self._world.manager, answers, Lookups(self.cache))

    async def run(self) -> None:
        try:
            for name, *values in self._history.steps:
                await getattr(self, f"_{name}")(*values)
            await self._wait()
        finally:
            for *_, task in self._asked:
                task.cancel()

    async def _ask(
        self, question: Question, control: str, owner: str | None, leaves: int | None, seed: int
    ) -> None:
        caching = Caching.of(control, owner)
        work = question.put(self._service, caching, seed, leaves)
        self._asked.append((question, seed, leaves is None, asyncio.ensure_future(work)))

    async def _wait(self) -> None:
        asked, self._asked = self._asked, []
        for question, seed, stays, task in asked:
            await self._check(question, seed, stays, await task)

    async def _check(self, question: Question, seed: int, stays: bool, found: Any) -> None:
        if isinstance(question, Chat) and not question.is_seeded and found is not None:
            seed = found[0]  # of the answer that it shares
        expected = await self._world.expected(question, seed)
        if found is None or found == expected:
            return
        if isinstance(question, Chat):
            _, end, n_prompt, said = found
            if end == expected[1] != "whole":
                return
            if end == "left" or (self._history.can_fail and end != "whole"):
                _, expected_end, all_prompt, whole = expected
                if expected_end != "whole":  # how much was said by then is chance
                    return
                assert n_prompt in (0, all_prompt)
                for index, (text, logprobs, done, _) in said.items():
                    assert whole[index][0].startswith(text)
                    assert whole[index][1][: len(logprobs)] == logprobs
                    assert done in (None, whole[index][2])
                return
        elif not stays or (self._history.can_fail and isinstance(found[0], str)):
            return
        assert found == expected, question

    async def _turn(self, n: int) -> None:
        for _ in range(n):
            await asyncio.sleep(0)

    async def _later(self, seconds: float) -> None:
        self._now += seconds

    async def _clear(self, kind: str | None) -> None:
        await self.cache.clear(kind)

    async def _restart(self) -> None:
        """Of the service; those of before still have their answers."""
        self._begin()

    async def _disk(self, n_turns: int, is_damaged: bool, is_lost: bool) -> None:
        self.disk.n_turns, self.disk.is_damaged, self.disk.is_lost = n_turns, is_damaged, is_lost

    async def _kill(self) -> None:
        for handle in self._world.handles:
            handle.kill()


TEXTS = st.sampled_from(["a b", "b", "c d e", "a", "poison", "word " * 9000])
CHATS = st.builds(
    Chat,
    st.lists(
        st.sampled_from(["Hi", "Hi", "dice", "dice", "long", "x" * 9000, "break"]),
        min_size=1,
        max_size=2,
    ).map(tuple),
    st.sampled_from([0.0, 0.8]),
    st.booleans(),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([None, None, 3]),
    st.sampled_from([None, None, 1]),
)
EMBEDS = st.builds(
    Embed,
    st.lists(TEXTS, min_size=1, max_size=4).map(tuple),
    st.sampled_from([("dense",), ("dense", "sparse"), ("colbert",), ("sparse", "colbert")]),
    st.sampled_from(["none", "query"]),
    st.sampled_from(["none", "end", "start"]),
    st.booleans(),
)
SCORES = st.builds(
    Score,
    st.lists(TEXTS, min_size=1, max_size=2).map(tuple),
    st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    st.sampled_from(["embedding", "embedding", "reranker"]),
    st.sampled_from([None, "dense", "hybrid", "colbert", "cross-encoder"]),
    st.sampled_from([None, None, (1.0, 2.0, 3.0), (0.0, 0.0, 1.0)]),
    st.sampled_from([None, None, 1, 3]),
)
QUERIES = st.builds(
    Embed, st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    st.just(("dense", "sparse", "colbert")), st.sampled_from(["query", "passage"]),
    st.sampled_from(["none", "end"]), st.just(False),
)  # fmt: skip


@HISTORIES
@given(histories(CHATS))
def test_no_answer_differs_from_one_without_a_cache(world: World, history: History) -> None:
    world.run(played(world, history))


@HISTORIES
@given(histories(EMBEDS))
def test_no_vector_differs_from_one_without_a_cache(world: World, history: History) -> None:
    world.run(played(world, history))


@HISTORIES
@given(histories(st.one_of(SCORES, QUERIES)))
def test_no_score_differs_from_one_without_a_cache(world: World, history: History) -> None:
    world.run(played(world, history))


async def played(world: World, history: History) -> None:
    await Play(world, history).run()
    if history.can_fail:
        await asyncio.gather(*map(revived, world.manager.tiers.values()))


async def revived(tier: Tier) -> None:
    """Ready for the next history, whatever this one has done to it."""
    for _ in range(100):
        tier.life._retry_at = tier.life._n_deaths = tier.life._n_load_failures = 0
        try:
            return await tier.load()
        except ServiceError:
            await asyncio.sleep(0.01)
    raise AssertionError("it does not come back")
