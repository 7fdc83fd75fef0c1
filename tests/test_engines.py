"""What every engine that runs a model does, on llama.cpp and on MLX: the same weights in both."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine import wire
from engine.backends.base import Engine
from engine.grammar import Compiler
from engine.types import Sampled, SamplingParams
from errors import QueueFull
from model_manager import ModelManager
from settings import TierSettings
from tests.engines import GREEDY, generate, ids, needs_mlx, next_logits
from tests.serving import settings

pytestmark = pytest.mark.real


@pytest.fixture(params=["tiny", pytest.param("tiny_mlx", marks=needs_mlx)])
def model(request: pytest.FixtureRequest) -> Path:
    """Two layers of random weights, in the form of each backend."""
    path: Path = request.getfixturevalue(request.param)
    return path


def test_a_conversation_that_goes_on_says_the_same_with_and_without_reuse(
    model: Path, load: Callable[..., Engine]
) -> None:
    first, second = load(model), load(model)
    prompt = ids(first, "The river is long and the city is old.")
    answer = generate(first, {1: prompt}, 12)[1]
    longer = prompt + answer + ids(first, " What then?")
    reused = {}
    first.admit(2, list(longer), GREEDY)
    while not first.idle:
        result = first.step()
        reused |= dict(result.started)
        if result.tokens:
            break
    # llama.cpp has never decoded the last token; MLX computes a step ahead
    assert reused[2] - len(prompt) - len(answer) in (-1, 0)
    first.cancel(2)
    assert generate(first, {3: longer}, 20)[3] == generate(second, {3: longer}, 20)[3]


def test_when_the_cells_run_out_everybody_still_gets_the_whole_answer(
    model: Path, load: Callable[..., Engine]
) -> None:
    crowded = load(model, n_ctx=96, kv_tokens=96, n_parallel=4)
    roomy = load(model, n_parallel=4)
    prompts = {i: ids(roomy, f"Number {i} is") for i in range(4)}
    assert generate(crowded, prompts, 60) == generate(roomy, prompts, 60)


def test_sampling_follows_its_seed_and_its_rules(model: Path, load: Callable[..., Engine]) -> None:
    engine = load(model)
    prompt = ids(engine, "one two three")

    def say(**values: Any) -> list[int]:
        return generate(engine, {1: prompt}, 24, SamplingParams(**values))[1]

    free = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert say(**free, seed=1) == say(**free, seed=1) != say(**free, seed=2)
    assert say(**free, seed=0xFFFFFFFF) == say(**free, seed=0xFFFFFFFF)
    greedy = say(temperature=0)
    assert say(temperature=1.0, top_k=1) == greedy
    assert say(temperature=1.0, top_k=0, top_p=0.0, seed=5) == greedy
    assert say(temperature=1.0, top_k=0, min_p=1.0, seed=5) == greedy
    assert say(**free, typical_p=0.01, seed=5) == say(**free, typical_p=0.01, seed=6)
    once = say(temperature=0, presence_penalty=2.0, repeat_penalty=10.0)
    assert len(set(once)) == len(once)


FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
Say = Callable[..., list[Sampled]]


@pytest.fixture
def say(model: Path, load: Callable[..., Engine]) -> Say:
    """What the tiny model says to a prompt, by sampling values."""
    engine = load(model)

    def say(prompt: str = "one two three", n_tokens: int = 24, **values: Any) -> list[Sampled]:
        engine.admit(1, ids(engine, prompt), SamplingParams(**values))
        said: list[Sampled] = []
        while len(said) < n_tokens and not engine.idle:
            result = engine.step()
            assert not result.failed
            said += (sampled for _, sampled in result.tokens)
        engine.cancel(1)
        return said

    return say


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_xtc_leaves_out_all_likely_tokens_but_the_last(say: Say, temperature: float) -> None:
    wanted = FREE | {"temperature": temperature, "seed": 3, "n_logprobs": 20}
    threshold = 0.02
    n_left_out = 0
    for sampled in say(**wanted, xtc_probability=1.0, xtc_threshold=threshold):
        likely = [token for token, logprob in sampled.top if np.exp(logprob) >= threshold]
        assert sampled.token not in likely[:-1]
        n_left_out += len(likely) > 1
        if temperature == 0 and likely:
            assert sampled.token == likely[-1]
    assert n_left_out > 5
    plain = say(**wanted)
    assert say(**wanted, xtc_probability=0.0, xtc_threshold=threshold) == plain
    assert say(**wanted, xtc_probability=1.0, xtc_threshold=0.6) == plain
    half = say(**wanted, xtc_probability=0.5, xtc_threshold=threshold)
    assert half == say(**wanted, xtc_probability=0.5, xtc_threshold=threshold) != plain


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_its_seed_and_aims_at_its_surprise(say: Say, version: int) -> None:
    def tokens(**values: Any) -> list[int]:
        return [sampled.token for sampled in say(**values)]

    def surprise(tau: float) -> float:
        said = say(n_tokens=40, **wanted, mirostat_tau=tau, seed=1, n_logprobs=0)
        return float(np.mean([-(sampled.logprob or 0.0) for sampled in said]))

    wanted: dict[str, Any] = {"temperature": 1.0, "mirostat": version}
    first = tokens(**wanted, seed=1)
    assert tokens(**wanted, seed=1) == first != tokens(**wanted, seed=2)
    greedy = tokens(temperature=0)
    assert tokens(**wanted | {"temperature": 0}, seed=1) == greedy
    assert tokens(**wanted, mirostat_tau=0.0, seed=1) == greedy
    assert surprise(0.5) < surprise(3.0) < surprise(9.0)
    assert tokens(**wanted, seed=1, top_k=1, min_p=1.0) == first  # it takes their place
    assert tokens(**FREE, seed=1, mirostat=0, mirostat_tau=0.1) == tokens(**FREE, seed=1)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_all_candidates_while_it_cannot_reach_its_surprise(
    say: Say, version: int
) -> None:
    aims = {"temperature": 1.0, "mirostat": version, "mirostat_tau": 100.0, "mirostat_eta": 1.0}
    said = say(n_tokens=60, **aims, seed=1, n_logprobs=1)
    assert sum(sampled.token != sampled.top[0][0] for sampled in said[20:]) > 8


def test_no_rule_of_sampling_breaks_a_grammar(model: Path, load: Callable[..., Engine]) -> None:
    engine = load(model)
    constraint = Compiler(engine.tokenizer).compile(
        wire.Grammar((wire.GrammarPart("grammar", "start: /(ab){40}/", "grammar"),))
    )
    extremes: list[dict[str, Any]] = [
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
        {"dry_multiplier": 100.0, "dry_base": 100.0},
        {"dry_multiplier": 100.0, "dry_base": 100.0, "temperature": 0.0},
        {"mirostat": 1, "mirostat_tau": 100.0},
        {"mirostat": 2, "mirostat_tau": 100.0, "dry_multiplier": 100.0, "dry_base": 100.0},
    ]
    texts = {}
    for number, values in enumerate(extremes):
        sampling = SamplingParams(**(FREE | {"seed": number} | values))
        engine.admit(number, ids(engine, "ab"), sampling, constraint.copy())
        texts[number] = b""
    while not engine.idle:
        result = engine.step()
        assert not result.failed
        for number, (token, *_) in result.tokens:
            texts[number] += engine.tokenizer.piece(token)
            if engine.tokenizer.ends_generation(token):
                engine.cancel(number)
    assert set(texts.values()) == {b"ab" * 40}


def test_log_probabilities_are_of_the_raw_row_whatever_is_done_to_it(
    model: Path, tiny: Path, load: Callable[..., Engine]
) -> None:
    engine = load(model)
    prompt = ids(engine, "one two three")
    (row,) = next_logits(tiny, [prompt])
    expected = row - np.log(np.exp(row.astype(np.float64)).sum())
    best = np.argsort(-row, kind="stable")[:5]
    banned = {int(best[0]): -100.0}
    for values in (
        {"temperature": 0},
        {"temperature": 0, "logit_bias": banned},
        {"temperature": 0, "repeat_penalty": 2.0},
        {"temperature": 1.5, "top_k": 3, "seed": 4},
    ):
        engine.admit(1, list(prompt), SamplingParams(n_logprobs=5, **values))
        while not (tokens := engine.step().tokens):
            pass
        engine.cancel(1)
        ((_, sampled),) = tokens
        assert sampled.logprob == pytest.approx(expected[sampled.token], abs=5e-3)
        assert [token for token, _ in sampled.top] == best.tolist()
        assert [lp for _, lp in sampled.top] == pytest.approx(expected[best].tolist(), abs=5e-3)
        if "logit_bias" in values:
            assert sampled.token == best[1]


def test_a_prompt_is_scored_by_what_comes_after_each_of_its_beginnings(
    model: Path, tiny: Path, load: Callable[..., Engine]
) -> None:
    engine = load(model, n_parallel=2, n_batch=8)
    prompt = ids(engine, "one two three and the river is long and the city is old " * 2)
    generate(engine, {1: prompt}, 2)  # so it is known
    sampling = SamplingParams(temperature=0, n_logprobs=0, prompt_logprobs=3)
    engine.admit(2, list(prompt), sampling, reuses=False)
    engine.admit(3, ids(engine, "Beside it"), GREEDY)
    scored: list[Sampled] = []
    answer: list[Sampled] = []
    for n in range(40):
        if n == 1:
            engine.admit(4, ids(engine, "One that is urgent"), GREEDY, rank=-1.0)
        if n == 4:
            engine.cancel(3)
            engine.cancel(4)
        result = engine.step()
        assert not result.failed
        assert not (scored and answer and result.scored), "the prompt comes first"
        scored += (sampled for number, sampled in result.scored if number == 2)
        answer += (sampled for number, sampled in result.tokens if number == 2)
    assert [sampled.token for sampled in scored] == prompt[1:]
    rows = next_logits(tiny, [prompt[:n] for n in range(1, len(prompt) + 1)])
    for row, sampled in zip(rows, [*scored, answer[0]], strict=True):
        expected = row - np.log(np.exp(row.astype(np.float64)).sum())
        assert sampled.logprob == pytest.approx(expected[sampled.token], abs=5e-2)
    best = np.argsort(-rows[4], kind="stable")[:3]
    assert [token for token, _ in scored[4].top] == best.tolist()


def test_an_answer_does_not_end_before_it_may(model: Path, load: Callable[..., Engine]) -> None:
    engine = load(model)
    prompt = ids(engine, "one two three")
    end = next(t for t in range(engine.tokenizer.n_vocab) if engine.tokenizer.ends_generation(t))

    def say(**values: Any) -> list[int]:
        sampling = SamplingParams(temperature=0, logit_bias={end: 100.0}, **values)
        return generate(engine, {1: prompt}, 9, sampling)[1]

    assert say() == [end]
    answer = say(min_tokens=5)
    assert (len(answer), answer.index(end)) == (6, 5)
    assert end not in say(ignore_eos=True)


# the worker


REQUEST = wire.Generate([1000, 1001], True, GREEDY, [], 1500)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_costs_only_its_streams(model: Path, fault: int) -> None:
    async def main() -> None:
        tier = TierSettings(model_path=str(model), n_threads=1, n_parallel=2, n_ctx=2048)
        async with ModelManager(settings({"watchdog_s": 3}, light=tier)) as manager:
            light = manager.tiers["light"]
            with light.submit(REQUEST) as generation:
                await generation.started()
                has_begun = asyncio.Event()
                telling = asyncio.create_task(generation.tell(lambda _: has_begun.set()))
                await has_begun.wait()
                assert light.life.worker
                os.kill(light.life.worker.pid, fault)
                with pytest.raises(Exception, match="killed by SIGKILL"):
                    await telling
            short = msgspec.structs.replace(REQUEST, max_tokens=5)
            with light.submit(short) as generation:
                await generation.started()
                outs: list[wire.TokenOut] = []
                await generation.tell(outs.append)
            last = outs[-1]
            assert last.done
            assert last.done.n_tokens == 5

    asyncio.run(main())


def test_a_cancelled_stream_makes_room_and_a_full_queue_is_told(model: Path) -> None:
    """And the process ends in order."""

    async def main() -> None:
        tier = TierSettings(
            model_path=str(model), n_threads=1, n_parallel=1, n_ctx=2048, queue_size=1
        )
        async with ModelManager(settings(light=tier)) as manager:
            light = manager.tiers["light"]
            with light.submit(REQUEST) as first:
                await first.started()
                with light.submit(REQUEST) as second:
                    with pytest.raises(QueueFull), light.submit(REQUEST):
                        pass
                    light.drop(first)
                    await second.started()
                    assert light.life.worker
                    handle = light.life.worker._handle
            await light.unload()
            assert await handle.wait() == "exit code 0"

    asyncio.run(main())
