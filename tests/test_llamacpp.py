"""The llama.cpp backend on real and on generated models. One thread: two collapse on a busy box."""

import ctypes
import gc
import json
import logging
import random
import re
import time
import weakref
from array import array
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import llama_cpp as lib
import numpy as np
import numpy.typing as npt
import pytest

from chat.infill import FAMILIES, Marks, infill, marks_of
from chat.template import ChatTemplate
from engine import wire
from engine.backends import llama_memory, llama_threads, llamacpp
from engine.backends.base import Engine
from engine.backends.llama_memory import LlamaMemory
from engine.backends.llama_model import LlamaLog
from engine.backends.llama_threads import N_LOOKS, ContextThreads
from engine.backends.llama_tokenizer import LlamaTokenizer
from engine.backends.llamacpp import LlamaDecoder
from engine.batch_engine import BatchEngine
from engine.cells import Cells
from engine.client import launch_process
from engine.grammar import Compiler
from engine.llama_limits import PLAIN_TOKENS
from engine.machine import Cores
from engine.model_file import read_model_file
from engine.prefix import PrefixTree
from engine.speculation import Guesses
from engine.threads import Lateness
from engine.types import MOST_GUESSES, Batch, Chunk, Sampled, SamplingParams, Sequence
from errors import ModelLoadFailed
from generation_jobs import Jobs, prepare
from settings import TierSettings
from tests import gguf_fixtures
from tests.engines import (
    GREEDY,
    engine_of,
    generate,
    ids,
    lanes_of,
    next_logits,
    open_lanes,
    seeded_answers,
)
from tests.scheduling import FixedSpeculation
from tests.serving import events, serving, settings

pytestmark = pytest.mark.real

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a SentencePiece vocabulary, which puts a space before a text and wants BOS."""
    return gguf_fixtures.write_tiny_spm(tmp_path_factory.mktemp("spm") / "spm.gguf")


@pytest.fixture(scope="session")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That with gpt-oss's control tokens, some of which llama.cpp takes for user-defined ones."""
    names = "start message channel constrain end return call".split()
    path = tmp_path_factory.mktemp("harmony") / "harmony.gguf"
    return gguf_fixtures.write_tiny_spm(path, more_control=[f"<|{name}|>" for name in names])


# many at once


def differ_by_rounding(model: Path, prompts: list[list[int]], answers: list[list[int]],
                       others: list[list[int]], **values: Any) -> int:  # fmt: skip
    """How many of the answers differ from the others; each only where rounding may decide: there
    the gap between the two candidates is below what the logits after the same prefix move when
    others are in the batch."""
    at = [_first_difference(a, b) for a, b in zip(answers, others, strict=True)]
    prefixes = [p + a[:n] for p, a, n in zip(prompts, answers, at, strict=True)]
    crowded = next_logits(model, prefixes, **values)
    for i, n in enumerate(at):
        if n is None:
            assert len(answers[i]) == len(others[i])
            continue
        (lonely,) = next_logits(model, [prefixes[i]], **values)
        noise = float(np.abs(lonely - crowded[i]).max())
        gap = abs(float(lonely[answers[i][n]] - lonely[others[i][n]]))
        assert gap <= 2 * noise, f"answer {i} differs at {n}: gap {gap}, noise {noise}"
    return sum(n is not None for n in at)


@pytest.mark.parametrize(
    ("which", "n_tokens", "lane_tokens"), [("tiny", 48, 0), ("tiny", 48, 256), ("smollm2", 16, 256)]
)
def test_sixteen_streams_at_once_say_what_each_says_alone(
    which: str, n_tokens: int, lane_tokens: int, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model: Path = request.getfixturevalue(which)
    engine = engine_of(model, lane_tokens=lane_tokens)
    if lane_tokens:
        open_lanes(engine)
    prompts = [ids(engine, f"Once upon a time, {i} years ago, there was") for i in range(16)]
    together = generate(engine, dict(enumerate(prompts)), n_tokens)
    if lane_tokens:
        assert lanes_of(engine)._buffer.nbytes  # cells were copied,
        assert lanes_of(engine)._n_cells  # and none failed
    engine.close()
    alone = say_alone(model, prompts, [n_tokens] * 16)
    n_differ = differ_by_rounding(model, prompts, alone, list(together.values()))
    with capsys.disabled():
        print(f"\n{which}: {n_differ} of 16 streams were compared up to a rounding only")
    assert n_differ < 16


def break_steps_off(monkeypatch: pytest.MonkeyPatch) -> list[ContextThreads]:
    """Every step is late from now on. One entry for each that is broken off."""
    broken_off: list[ContextThreads] = []

    def fewer(threads: ContextThreads) -> None:  # but as many, so that the same numbers come
        broken_off.append(threads)
        threads._timer.end()  # type: ignore[union-attr]

    monkeypatch.setattr(Lateness, "limit_s", lambda *_: 0.0)
    monkeypatch.setattr(ContextThreads, "fewer", fewer)
    return broken_off


@pytest.mark.parametrize("lane_tokens", [0, 256])
def test_a_step_that_is_broken_off_is_computed_anew(
    smollm2: Path, lane_tokens: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def say() -> dict[int, list[int]]:
        engine = engine_of(smollm2, n_threads=2, n_parallel=4, lane_tokens=lane_tokens)
        prompts = {i: ids(engine, f"Once upon a time, {i} years ago, " * 9) for i in range(4)}
        try:
            return generate(engine, prompts, 8)
        finally:
            engine.close()

    # all threads, whatever else the machine does: one thread alone waits for nobody
    monkeypatch.setattr(ContextThreads, "_look", lambda _: None)
    whole = say()
    monkeypatch.setattr(llama_threads, "TICK_S", 0.0005)
    broken_off = break_steps_off(monkeypatch)
    assert say() == whole
    assert len(broken_off) > 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_window_begins_where_a_token_sees_the_first_other() -> None:
    sliding, chunked = (
        llama_memory.Window(8, is_chunked=is_chunked) for is_chunked in (False, True)
    )
    assert [sliding.begin(n) for n in (0, 7, 8, 20)] == [0, 0, 1, 13]
    assert [chunked.begin(n) for n in (0, 7, 8, 20, 24)] == [0, 0, 8, 16, 24]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_step_behind_a_sliding_window_is_computed_anew_too(
    is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also all of a sequence, where the window cannot be brought back."""
    path = gguf_fixtures.write_tiny_gemma3(tmp_path / "gemma3.gguf", window=16)

    def say() -> dict[int, list[int]]:
        engine = cast(BatchEngine, engine_of(path, n_threads=2, n_parallel=4, n_batch=128))
        engine._scheduler._speculation = FixedSpeculation(5)
        prompts = {i: [*range(20 + i, 60 + i)] * 3 for i in range(4)}
        try:
            return generate(engine, prompts, 80)
        finally:
            engine.close()

    monkeypatch.setattr(ContextThreads, "_look", lambda _: None)
    whole = say()
    n_begun = n_lost = 0

    def begin(timer: llama_threads._Timer, _: float) -> None:
        nonlocal n_begun
        n_begun += 1
        if n_begun % 3 == 0:
            timer._text[0] = b"!"

    def lost(*given: Any) -> bool:
        nonlocal n_lost
        n_lost += 1
        return n_lost % 4 > 0 and llama_memory.cut(*given)

    monkeypatch.setattr(llama_threads._Timer, "begin", begin)
    broken_off = break_steps_off(monkeypatch)
    if is_lost:
        monkeypatch.setattr(llamacpp, "cut", lost)
    n_same = 10 if is_lost else 30  # other chunks of a prompt are rounded otherwise
    found = say()
    assert {i: said[:n_same] for i, said in found.items()} == {
        i: said[:n_same] for i, said in whole.items()
    }
    assert len(broken_off) > 20
    assert bool(n_lost) == is_lost


def test_the_timer_of_steps_ends_whenever_it_is_told_to() -> None:
    for _ in range(5):
        timer = llama_threads._Timer()
        timer.begin(time.monotonic() + 9)
        timer.end()
        timer.close()
        assert not timer._thread.is_alive()


def say_alone(
    model: Path, prompts: list[list[int]], lengths: list[int], **values: Any
) -> list[list[int]]:
    """One after the other, in cells that hold nothing else."""
    engine = engine_of(model, n_parallel=1, kv_tokens=1024, **values)
    said = [
        generate(engine, {i: prompt}, n, reuses=False)[i]
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    engine.close()
    return said


@pytest.mark.parametrize("lane_tokens", [0, 256])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_shared_forked_and_remembered_cells_say_what_fresh_ones_say(
    tiny: Path, flash_attention: bool, lane_tokens: int
) -> None:
    """Two rounds of requests with common beginnings on few slots and few cells: cells are shared
    between running sequences, moved out, brought back whole and in part, and preempted."""
    room = {"n_parallel": 3, "kv_tokens": 300, "n_ctx": 200, "n_batch": 32}
    engine = engine_of(tiny, **room, flash_attention=flash_attention, lane_tokens=lane_tokens)
    if lane_tokens:
        open_lanes(engine)
    system = [1000 + i for i in range(60)]
    first = [system + [2000 + 10 * i + k for k in range(8)] for i in range(5)]
    first += [first[0]] * 3  # as the answers to one prompt with n = 4 are
    said = generate(engine, dict(enumerate(first)), 30)
    second = [first[i] + said[i] + [3000 + i, 3001] for i in range(5)]
    second += [first[i][:40] + [4000 + i] * 20 for i in range(5)]
    n_cached = {}
    for number, prompt in enumerate(second, start=100):
        engine.admit(number, prompt, GREEDY)
    tokens: dict[int, list[int]] = {number: [] for number in range(100, 100 + len(second))}
    while not engine.idle:
        result = engine.step()
        n_cached |= dict(result.started)
        for number, (token, *_) in result.tokens:
            tokens[number].append(token)
            if len(tokens[number]) == 20:
                engine.cancel(number)
    if lane_tokens:
        assert lanes_of(engine)._buffer.nbytes  # cells were copied,
        assert lanes_of(engine)._n_cells  # and none failed
    engine.close()
    assert all(n >= 90 for number, n in n_cached.items() if number < 105), n_cached
    assert all(n >= 40 for n in n_cached.values()), n_cached
    prompts = first + second
    answers = [*said.values(), *tokens.values()]
    kind = {"flash_attention": flash_attention}
    fresh = say_alone(tiny, prompts, list(map(len, answers)), **kind)
    assert differ_by_rounding(tiny, prompts, fresh, answers, **kind) <= 3


def _first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def test_only_seeded_answers_alone_keep_their_threads_and_numbers_on_a_busy_machine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention adds up 512 cells and more in as many parts as there are threads."""
    used_s = 0.0
    is_busy = False

    def cores() -> list[Cores]:
        nonlocal used_s
        used_s += 1e6 * is_busy
        return [Cores(2, used_s)]

    numbers: list[int] = []
    set_n_threads = lib.llama_set_n_threads

    def record(context: Any, n_decode: int, n_prefill: int) -> None:
        numbers.append(n_decode)
        set_n_threads(context, n_decode, n_prefill)

    monkeypatch.setattr("engine.machine.cores", cores)
    monkeypatch.setattr("engine.machine.n_idle_cores", lambda: 1 if is_busy else 2)
    monkeypatch.setattr("engine.threads.WINDOW_S", 0.0)
    monkeypatch.setattr(lib, "llama_set_n_threads", record)
    engine = engine_of(tiny, n_threads=2)
    prompt = [1000 + i for i in range(400)]
    sampling = SamplingParams(temperature=1.0, seed=7, n_logprobs=2)
    said: list[list[Sampled]] = []
    rounds = ((False, False, []), (True, False, []), (True, True, [1]))
    for number, (busy, reuses, expected) in enumerate(rounds):
        is_busy = busy
        numbers.clear()
        engine.admit(number, prompt, sampling, reuses=reuses)
        first = None if reuses else number
        engine.admit(number + 10, prompt, sampling, reuses=reuses, goes_on_from=first, rank=10.0)
        answers: list[Sampled] = []
        while len(answers) < 9:
            answers += [sampled for _, sampled in engine.step().tokens]
        engine.cancel(number)
        engine.cancel(number + 10)
        said.append(answers)
        assert numbers == expected
    engine.close()
    assert said[0] == said[1]


def test_a_core_that_was_taken_for_a_moment_only_is_used_from_the_next_step_on(
    tiny: Path, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a client that has just asked, or by threads of a server that still look for work."""
    # a core is free, then two beside the two that the step itself has, then all
    n_idle = iter([*[1] * N_LOOKS, 1, 2, 4])
    numbers: list[int] = []
    monkeypatch.setattr("engine.machine.cores", lambda: [Cores(4, 0.0)])
    monkeypatch.setattr("engine.machine.n_idle_cores", lambda: next(n_idle))
    monkeypatch.setattr("engine.threads.WINDOW_S", 1e6)
    monkeypatch.setattr("engine.backends.llama_threads.PAUSE_S", 5.0)
    engine = load(tiny, n_threads=4)
    monkeypatch.setattr(lib, "llama_set_n_threads", lambda _, n, __: numbers.append(n))
    engine.admit(1, [1000, 1001, 1002], SamplingParams(temperature=0))
    for expected in ([2], [2], [2, 3], [2, 3, 4], [2, 3, 4]):
        engine.step()
        assert numbers == expected


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
def test_all_answers_to_a_seeded_request_are_the_same_every_time(
    tiny: Path, load: Callable[..., Engine], n_parallel: int
) -> None:
    """Whatever the tier has computed before, the same prompt or another."""
    engine = load(tiny, n_parallel=n_parallel, n_ctx=1024, speculates=True)
    prompt = [1000 + i for i in range(600)]
    said = seeded_answers(engine, prompt, n=5)
    assert len({len(answer) for answer in said}) > 2
    generate(engine, {101: prompt[:590], 102: prompt}, 12)
    assert seeded_answers(engine, prompt, n=5) == said
    assert seeded_answers(engine, prompt, n=5) == said


def test_without_flash_attention_128_tokens_are_computed_at_once_with_the_same_numbers(
    smollm2: Path,
) -> None:
    prompt = [1000 + i for i in range(300)]
    engine = engine_of(smollm2, flash_attention=False)
    decoder = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)
    assert lib.llama_n_ubatch(decoder._context) == PLAIN_TOKENS
    assert decoder.memory.block == 69  # one of 256 takes 0.1 s to save where streams ran together
    engine.close()
    (flash,) = next_logits(smollm2, [prompt])
    (plain,) = next_logits(smollm2, [prompt], flash_attention=False)
    assert np.corrcoef(flash, plain)[0, 1] > 0.999
    assert not np.array_equal(flash, plain)  # it was off


def test_with_a_gpu_flash_attention_stays_on_and_there_are_no_lanes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lib, "llama_supports_gpu_offload", lambda: True)
    caplog.set_level("INFO", "llama.cpp")
    for n_gpu_layers, is_plain in ((-1, False), (0, True)):
        caplog.clear()
        engine = engine_of(tiny, flash_attention=False, n_gpu_layers=n_gpu_layers, lane_tokens=256)
        decoder = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)
        assert (decoder._lanes is not None) == is_plain
        assert (lib.llama_n_ubatch(decoder._context) == PLAIN_TOKENS) == is_plain
        assert ("does nothing with a GPU" in caplog.text) != is_plain
        assert (f"{tiny.name} is computed on the CPU" in caplog.text) == is_plain
        assert (f"{tiny.name} is computed with a GPU" in caplog.text) != is_plain
        engine.close()


def test_there_is_room_for_the_logits_of_all_guesses_and_for_no_more(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "llama.cpp")
    engine = engine_of(tiny, n_parallel=4, n_batch=256)
    assert re.search(rf"n_outputs_max += {4 + 1 + 4 * MOST_GUESSES}\n", caplog.text)
    decoder = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)
    batch = Batch()
    for slot in range(4):
        sequence = Sequence(slot, array("i", [1000 + slot]), slot=slot)
        batch.add(sequence, 1)
        batch.guess(batch.chunks[-1], array("i", range(2000, 2000 + MOST_GUESSES)))
    decoder.decode(batch)
    assert len(decoder._rows) == 4 * (1 + MOST_GUESSES)
    engine.close()


def test_a_sliding_window_says_the_same_with_and_without_reuse(tmp_path: Path) -> None:
    path = gguf_fixtures.write_tiny_gemma3(tmp_path / "gemma3.gguf")
    room = {"n_parallel": 4, "kv_tokens": 512, "n_batch": 128}
    dice = random.Random(1)
    engine = engine_of(path, **room, lane_tokens=256)
    assert cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)._lanes is None
    history: list[list[int]] = []
    for number in range(30):
        prompt = [dice.randint(3, 390) for _ in range(dice.randint(20, 160))]
        if history and dice.random() < 0.6:
            said = dice.choice(history[-4:])
            prompt = said[: dice.randint(len(said) // 2, len(said))][:195] + prompt[:5]
        answer = generate(engine, {number: prompt}, dice.randint(3, 40))[number]
        history.append(prompt + answer)
        fresh = engine_of(path, **room)
        alone = generate(fresh, {number: prompt}, len(answer))[number]
        fresh.close()
        assert answer[:10] == alone[:10]  # later ones may differ by rounding
    engine.close()


@pytest.mark.parametrize("n_parallel", [1, 3])
@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize(
    "write",
    [
        gguf_fixtures.write_tiny_gemma3,
        gguf_fixtures.write_tiny_lfm2,
        partial(gguf_fixtures.write_tiny_lfm2, window=64),
        gguf_fixtures.write_tiny_qwen35,
    ],
)
def test_wrong_guesses_leave_no_trace_in_windows_and_states(
    write: Callable[[Path], Path], n_parallel: int, flash_attention: bool, tmp_path: Path
) -> None:
    """Of what is said the logits are the same as without guesses, but for rounding."""
    path = write(tmp_path / "model.gguf")
    dice = random.Random(1)

    def drawn(n_tokens: int) -> "array[int]":
        return array("i", [dice.randint(3, 390) for _ in range(n_tokens)])

    texts = [drawn(500) for _ in range(n_parallel)]

    def heard(n_guesses: int) -> dict[tuple[int, int], Logits]:
        """Logits by slot and number of tokens."""
        room = {"n_parallel": 4, "n_batch": 128, "flash_attention": flash_attention}
        engine = cast(BatchEngine, engine_of(path, **room, speculates=True))
        decoder = cast(LlamaDecoder, engine._decoder)
        decoder.can_round = False
        cells = Cells(decoder.memory, PrefixTree(1 << 24), n_slots=4, n_cells=decoder.n_cells)
        sequences = [
            Sequence(slot, text[:30], slot=slot)
            for slot, text in enumerate(texts[: engine.n_parallel])
        ]
        logits = {}
        while going := [sequence for sequence in sequences if len(sequence.tokens) < 480]:
            batch = Batch()
            n_right = []
            for sequence in going:
                batch.add(sequence, sequence.n_pending)
                n, text = len(sequence.tokens), texts[sequence.id]
                n_most = n_guesses if sequence.n_pending == 1 else 0
                n_right.append(dice.randint(0, n_most))
                guesses = text[n : n + n_right[-1]] + drawn(dice.randint(0, n_most))
                assert cells.can_drop(sequence.id)
                batch.guess(batch.chunks[-1], guesses[:n_most])
            decoder.decode(batch)
            row = 0
            for chunk, n in zip(batch.chunks, n_right, strict=True):
                for right in range(n + 1):
                    logits[chunk.slot, chunk.end + right] = decoder._rows[row + right][2].copy()
                row += 1 + len(chunk.guesses)
                chunk.sequence.tokens += texts[chunk.slot][chunk.end : chunk.end + n + 1]
                cells.extend(chunk.slot, chunk.tokens)
                cells.drop(chunk.slot, chunk.end + n)
                chunk.sequence.n_past = len(cells.tokens[chunk.slot])
                assert chunk.sequence.n_past in (chunk.start, chunk.end + n)
        assert not decoder.memory.truncate(0, 200)  # what was there is used again
        engine.close()
        return logits

    plain, guessed = heard(0), heard(MOST_GUESSES)
    assert len(plain) > 400
    for place, logits in plain.items():
        assert np.abs(logits - guessed[place]).max() < logits.std() / 20


@pytest.mark.parametrize(
    ("write", "n_parallel"),
    [
        (gguf_fixtures.write_tiny_gemma3, 3),
        (partial(gguf_fixtures.write_tiny_lfm2, window=64), 1),  # for one request at a time
    ],
)
@pytest.mark.parametrize("flash_attention", [True, False])
def test_a_large_step_sees_all_of_a_window(
    write: Callable[[Path], Path], n_parallel: int, flash_attention: bool, tmp_path: Path
) -> None:
    """llama.cpp may compute it in parts, and the first would miss what it gives to the last."""
    path = write(tmp_path / "model.gguf")
    dice = random.Random(1)
    texts = [[dice.randint(3, 390) for _ in range(1000)] for _ in range(3)]

    def heard(n_batch: int) -> list[Logits]:
        room = {"n_parallel": 3, "n_batch": n_batch, "kv_tokens": 4096, "n_ctx": 1024}
        engine = cast(BatchEngine, engine_of(path, **room, flash_attention=flash_attention))
        decoder = cast(LlamaDecoder, engine._decoder)
        assert engine.n_parallel == n_parallel
        sequences = [
            Sequence(slot, array("i", text), slot=slot)
            for slot, text in enumerate(texts[:n_parallel])
        ]
        logits = {}
        while going := [sequence for sequence in sequences if sequence.n_pending]:
            batch, n_left = Batch(), decoder.n_batch
            for n, sequence in enumerate(going):
                share = n_left if n + 1 == len(going) else n_left // 3
                batch.add(sequence, min(sequence.n_pending, share))
                n_left -= batch.chunks[-1].n_tokens
            decoder.decode(batch)
            wanting = [chunk for chunk in batch.chunks if chunk.wants_logits]
            for row, chunk in enumerate(wanting):
                logits[chunk.slot] = decoder._rows[row][2].copy()
            for chunk in batch.chunks:
                chunk.sequence.n_past = chunk.end
        engine.close()
        return [logits[slot] for slot in range(n_parallel)]

    for large, small in zip(heard(512), heard(48), strict=True):
        assert np.abs(large - small).max() < small.std() / 20


@pytest.mark.parametrize("n_guesses", [0, 5])
@pytest.mark.parametrize(
    ("write", "kv_tokens"),
    [
        (gguf_fixtures.write_tiny_lfm2, 3072),
        (partial(gguf_fixtures.write_tiny_lfm2, window=64), 3072),
        (gguf_fixtures.write_tiny_qwen35, 3072),
        (gguf_fixtures.write_tiny_gemma3, 3072),
        (partial(gguf_fixtures.write_tiny_gemma3, window=256), 1024),  # each needs its own cells
    ],
)
def test_what_cannot_be_cut_goes_on_from_its_marks_and_says_the_same(
    tmp_path: Path,
    write: Callable[[Path], Path],
    kv_tokens: int,
    n_guesses: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "model.gguf")
    room = {"n_parallel": 3, "kv_tokens": kv_tokens, "n_batch": 128, "prefix_cache_bytes": 32 << 20}
    room |= {"n_ctx": 1024, "speculates": n_guesses > 0}
    n_rewound: list[int] = []
    rewind = LlamaMemory.rewind

    def counted(self: LlamaMemory, slot: int, saved: Any, n_tokens: int) -> bool:
        n_rewound.append(n_tokens)
        is_done = rewind(self, slot, saved, n_tokens)
        assert is_done
        return is_done

    n_loaded: list[int] = []
    load = LlamaMemory.load

    def loaded(self: LlamaMemory, slot: int, saved: Any, start: int, end: int) -> bool:
        n_loaded.append(end)
        return load(self, slot, saved, start, end)

    n_guessed: list[int] = []
    guess = Batch.guess

    def guessed(self: Batch, chunk: Chunk, guesses: "array[int]") -> None:
        n_guessed.append(len(guesses))
        guess(self, chunk, guesses)

    monkeypatch.setattr(LlamaMemory, "rewind", counted)
    monkeypatch.setattr(LlamaMemory, "load", loaded)
    monkeypatch.setattr(Batch, "guess", guessed)
    # nearly all wrong
    monkeypatch.setattr(Guesses, "exist", True)
    monkeypatch.setattr(Guesses, "next", lambda _, tokens, n: tokens[-n:])
    dice = random.Random(1)
    engine = cast(BatchEngine, engine_of(path, **room))
    memory = cast(LlamaDecoder, engine._decoder).memory
    if n_guesses:
        engine._scheduler._speculation = FixedSpeculation(n_guesses)
    assert (memory.can_mark, memory.shares_cells) == (True, kv_tokens > 1024)
    history = [[dice.randint(3, 390) for _ in range(700)]]
    for number in range(0, 36, 3):
        prompts = {}
        for id in range(number, number + dice.randint(1, 3)):
            said = dice.choice(history[-6:])
            end = min(dice.randint(len(said) // 3, len(said)), 900)
            rest = [dice.randint(3, 390) for _ in range(dice.randint(5, 40))]
            prompts[id] = said[:end] + rest
        answers = generate(engine, prompts, dice.randint(3, 20))
        for id, prompt in prompts.items():
            history.append(prompt + answers[id])
            fresh = engine_of(path, **room)
            alone = generate(fresh, {id: prompt}, len(answers[id]))[id]
            fresh.close()
            assert answers[id][:8] == alone[:8]  # later ones may differ by rounding
    engine.close()
    assert {n for n in n_rewound if n in (256, 512)}
    assert {n for n in n_rewound if n not in (256, 512)}
    assert n_loaded
    assert bool(n_guessed) == (n_guesses > 0)


def longest_repetition(tokens: list[int]) -> int:
    """Length of the longest run of tokens that was there before."""
    best = 0
    for end in range(1, len(tokens) + 1):
        while best + 1 < end and any(
            tokens[end - best - 1 : end] == tokens[at : at + best + 1]
            for at in range(end - best - 1)
        ):
            best += 1
    return best


def test_dry_ends_a_loop(smollm2: Path, load: Callable[..., Engine]) -> None:
    engine = load(smollm2)
    prompt = ids(engine, "red green blue, " * 6 + "red green")

    def repeats(**values: Any) -> bool:
        answer = generate(engine, {1: prompt}, 16, SamplingParams(temperature=0, **values))[1]
        return longest_repetition(prompt + answer) > longest_repetition(prompt) + 8

    strong: dict[str, Any] = {"dry_multiplier": 10.0, "dry_base": 2.0}
    assert repeats()
    assert repeats(dry_multiplier=0.0, dry_base=4.0)
    assert repeats(dry_multiplier=1e-6, dry_base=1.0)
    assert repeats(**strong, dry_penalty_last_n=0)
    assert repeats(**strong, dry_penalty_last_n=3)  # sees less than one round
    assert repeats(**strong, dry_allowed_length=1000)
    assert repeats(**strong, dry_sequence_breakers=("green", "blue"))
    assert not repeats(**strong)
    assert not repeats(**strong)  # a copy of the first sampler, and with nothing of its past
    assert not repeats(**strong, dry_sequence_breakers=())


@pytest.mark.parametrize("which", ["smollm2", "spm"])
def test_answers_have_the_form_that_is_asked_for(
    which: str, request: pytest.FixtureRequest, load: Callable[..., Engine]
) -> None:
    engine = load(request.getfixturevalue(which))
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    compiler = Compiler(engine.tokenizer)
    constraint = compiler.compile(
        wire.Grammar((wire.GrammarPart("json_schema", json.dumps(person), "response_format"),))
    )
    states = {i: constraint.copy() for i in range(3)}
    for i, state in states.items():
        sampling = SamplingParams(temperature=1.0, seed=i)
        engine.admit(i, ids(engine, "A person as JSON:"), sampling, state)
    texts = dict.fromkeys(states, b"")
    whole = set()
    for _ in range(120):
        if engine.idle:
            break
        result = engine.step()
        assert not result.failed
        for i, (token, *_) in result.tokens:
            texts[i] += engine.tokenizer.piece(token)
            if engine.tokenizer.ends_generation(token):
                whole.add(i)
                engine.cancel(i)
    assert whole
    for i in whole:
        assert states[i].is_complete
        said = json.loads(texts[i])
        assert said.keys() == {"name", "age"}
        assert isinstance(said["age"], int)
        assert len(said["name"]) <= 8


SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0, n_logprobs=1, dry_multiplier=0.5),
    SamplingParams(temperature=2, top_k=0, top_p=1, min_p=0, seed=1),
    SamplingParams(temperature=1, mirostat=1, seed=1),
    SamplingParams(temperature=1, mirostat=2, seed=1),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_the_file_suppresses_is_never_said(
    sampling: SamplingParams, spm: Path, tmp_path: Path, load: Callable[..., Engine]
) -> None:
    prompts = {number: [1, 300 + number, 301] for number in range(4)}
    said = {token for said in generate(load(spm), prompts, 20).values() for token in said}
    path = gguf_fixtures.write_tiny_spm(tmp_path / "spm.gguf", suppressed=sorted(said))
    found = generate(load(path, speculates=True), prompts, 40, sampling)
    assert all(found.values())
    assert said.isdisjoint(token for tokens in found.values() for token in tokens)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {*range(13)}),
        ({"typical_p": 0.1}, {1, 2}),  # the likeliest one surprises too little
        ({"mirostat": 2}, {*range(13)}),
    ],
)
@pytest.mark.parametrize("least", [-np.inf, -200.0])
def test_filters_work_beside_what_is_forbidden(
    values: dict[str, Any], expected: set[int], least: float, spm: Path, load: Callable[..., Engine]
) -> None:
    decoder = cast(LlamaDecoder, cast(BatchEngine, load(spm))._decoder)
    free = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    logits = np.full(decoder.tokenizer.n_vocab, least, np.float32)
    logits[:13] = np.log([0.4, *np.linspace(0.06, 0.04, 12)])
    found = set()
    for seed in range(150):
        chain = decoder._samplers._new_chain(SamplingParams(**free | values | {"seed": seed}), [])
        data = (lib.llama_token_data * len(logits))(*((i, v, 0) for i, v in enumerate(logits)))
        candidates = lib.llama_token_data_array(data, len(logits), -1, False)
        lib.llama_sampler_apply(chain, ctypes.byref(candidates))
        found.add(data[candidates.selected].id)
        lib.llama_sampler_free(chain)
    assert found <= expected
    assert len(found) > 1


# text


WORDS = ["Hello", " world", "\n", "  two  spaces", "the city", "Größe", "世界", "🎉", "=>", " ",
         "1234", "\t", "<x>", "</", "def f():", "'s"]  # fmt: skip


@pytest.mark.parametrize("which", ["smollm2", "spm", "harmony"])
def test_prompts_have_the_ids_of_their_whole_text(
    which: str, request: pytest.FixtureRequest, load: Callable[..., Engine]
) -> None:
    """Without control tokens in client text, what segments give is what one call gives; with them,
    no control id is the client's and every character is still there."""
    path: Path = request.getfixturevalue(which)
    model = read_model_file(path)
    template = ChatTemplate.from_model_file(model)
    tokenizer = load(path).tokenizer
    control = {
        literal: tokenizer.tokenize(literal, parse_special=True, continues=True)[0]
        for literal in model.control_tokens
        if literal != "<unk>"
    }
    dice = random.Random(5)
    for conversation in range(200):
        hostile = conversation % 2 == 1
        words = WORDS + list(control) * hostile
        contents = ["".join(dice.choices(words, k=dice.randint(1, 12))) for _ in range(3)]
        messages = [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant", "user"), contents, strict=True)
        ]
        segments = template.render(messages, now=datetime(2026, 1, 1))
        tokens = [
            token
            for n, segment in enumerate(segments)
            for token in tokenizer.tokenize(
                segment.text, parse_special=segment.parse_special, continues=n > 0
            )
        ]
        text = "".join(segment.text for segment in segments)
        if not hostile:
            whole = tokenizer.tokenize(text, parse_special=True, continues=False)
            assert tokens == whole
        literal = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        in_clients = [m for content in contents for m in literal.findall(content)]
        n_own = len(literal.findall(text)) - len(in_clients)
        assert sum(token in control.values() for token in tokens) == n_own
        spelled = b"".join(
            tokenizer.piece(token) or _literal(control, token) for token in tokens
        ).decode()
        # SPM puts a space before a text, and before text that follows a control token
        assert _squeezed(spelled) == _squeezed(text)


def _literal(control: dict[str, int], token: int) -> bytes:
    return next(literal for literal, number in control.items() if number == token).encode()


def _squeezed(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize("which", ["smollm2", "spm"])
def test_text_in_the_middle_of_a_prompt_is_exactly_that(
    which: str, request: pytest.FixtureRequest, load: Callable[..., Engine]
) -> None:
    tokenizer = load(request.getfixturevalue(which)).tokenizer
    for text in ("hello world", " hello", "  hello", "\n    return x", "Größe 🎉", ""):
        for parse_special in (False, True):
            ids = tokenizer.tokenize(text, parse_special=parse_special, continues=True)
            assert b"".join(map(tokenizer.literal, ids)).decode() == text


@pytest.mark.parametrize("which", ["smollm2", "spm"])
def test_plain_text_has_its_usual_ids_and_no_control_tokens(
    which: str, request: pytest.FixtureRequest, load: Callable[..., Engine]
) -> None:
    path: Path = request.getfixturevalue(which)
    tokenizer = load(path).tokenizer

    def plain(text: str) -> list[int]:
        return tokenizer.tokenize(text, parse_special=False, continues=False)

    text = "hello world, what is the city? " * 20_000
    assert plain(text) == tokenizer.tokenize(text, parse_special=True, continues=False)
    for literal in read_model_file(path).control_tokens:
        ids = plain(f"what {literal} is")
        assert all(map(tokenizer.piece, ids))
        assert b"".join(map(tokenizer.piece, ids)).decode().strip() == f"what {literal} is"


def test_a_control_token_is_written_by_its_name(spm: Path, load: Callable[..., Engine]) -> None:
    tokenizer = load(spm).tokenizer
    (end,) = tokenizer.tokenize("<|im_end|>", parse_special=True, continues=True)
    assert (tokenizer.piece(end), tokenizer.literal(end)) == (b"", b"<|im_end|>")


def test_bos_comes_once(spm: Path, load: Callable[..., Engine]) -> None:
    model = read_model_file(spm)
    assert model.add_bos
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}",
        bos_token=model.bos_token,
        eos_token=model.eos_token,
        control_tokens=model.control_tokens,
        add_bos=model.add_bos,
    )
    tokenizer = cast(LlamaTokenizer, load(spm).tokenizer)
    (segment,) = template.render([{"role": "user", "content": "Hello"}], now=datetime(2026, 1, 1))
    tokens = tokenizer.tokenize(segment.text, parse_special=True, continues=False)
    assert tokenizer.bos is not None
    assert tokenizer.bos not in tokens


@pytest.mark.parametrize("text", ["hello", "<s>hello"])
def test_a_raw_prompt_begins_with_one_bos_and_ids_are_taken_as_they_are(
    spm: Path, load: Callable[..., Engine], text: str
) -> None:
    engine = load(spm)

    def prompt(pieces: list[Any]) -> list[int]:
        request = wire.Generate(pieces, True, GREEDY, [], 1)
        return prepare(request, engine, Compiler(engine.tokenizer)).prompt

    bos = engine.tokenizer.bos
    ids = prompt([wire.Segment(text, parse_special=True)])
    assert (ids[0], ids.count(bos)) == (bos, 1)
    for given in ([bos, 300, 301], [300, 301]):
        assert prompt(given) == given


@pytest.mark.parametrize("text", ["hello there", " hello", "<s>hello", "🙂"])
def test_texts_of_a_prompt_that_is_scored_add_up_to_it(
    spm: Path, load: Callable[..., Engine], text: str
) -> None:
    engine = load(spm)
    sampling = SamplingParams(temperature=0, n_logprobs=0, prompt_logprobs=0)
    request = wire.Generate([wire.Segment(text, True)], True, sampling, [], 0, reuse=False)
    job = prepare(request, engine, Compiler(engine.tokenizer))
    jobs = Jobs(engine)
    jobs.admit(job)
    outs: list[wire.TokenOut] = []
    while not engine.idle:
        for message in jobs.report(engine.step()):
            outs += message.outs if isinstance(message, wire.Step) else ()
    assert outs[-1].done
    prompt = [token for out in outs for token in out.prompt]
    assert "".join(token.text for token in prompt) == text
    assert [token.token for token in prompt] == list(map(engine.tokenizer.literal, job.prompt))
    assert [token.logprob is None for token in prompt] == [n == 0 for n in range(len(job.prompt))]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_a_middle_has_the_models_own_marks_and_the_clients_text(
    family: Marks, tmp_path: Path, load: Callable[..., Engine]
) -> None:
    path = gguf_fixtures.write_tiny_spm(tmp_path / "fim.gguf", more_tokens=family)
    marks = marks_of(read_model_file(path).control_tokens)
    assert marks == family
    engine = load(path)
    before, after = f"def f(:\n  {family[1]}", f"  return <s>{family[2]}\n"
    request = wire.Generate([*infill(before, after, marks)], True, GREEDY, [], 5)
    prompt = prepare(request, engine, Compiler(engine.tokenizer)).prompt
    ids = [engine.tokenizer.n_vocab - 3 + i for i in range(3)]
    assert [token for token in prompt if token in ids] == ids
    assert prompt[:2] == [engine.tokenizer.bos, ids[0]]
    first, second, last = (prompt.index(token) for token in ids)
    spelled = [b"".join(map(engine.tokenizer.piece, part)).decode()
               for part in (prompt[first:second], prompt[second:last], prompt[last:])]  # fmt: skip
    texts = [before, after, ""]
    assert spelled == [text.replace("▁", " ") for text in texts]  # to SentencePiece they are one


# loading


def test_the_log_that_llama_cpp_writes_to_is_kept() -> None:
    """It is the process's, and whoever loaded a model last may have gone."""
    log = weakref.ref(LlamaLog())
    gc.collect()
    assert log() is not None
    LlamaLog()
    gc.collect()
    assert log() is None


def test_the_context_is_never_longer_than_the_model_was_trained_for(
    spm: Path, load: Callable[..., Engine]
) -> None:
    engine = load(spm, n_ctx=100_000, kv_tokens=600, n_parallel=2)
    assert engine.n_ctx == 512
    assert len(generate(engine, {1: [5] * 400}, 111)[1]) == 111


def test_a_prompt_longer_than_a_batch_is_decoded_in_pieces(
    tiny: Path, load: Callable[..., Engine]
) -> None:
    prompt = [1000 + i for i in range(200)]
    small, large = load(tiny, n_batch=16), load(tiny, n_batch=256)
    assert generate(small, {1: prompt}, 10) == generate(large, {1: prompt}, 10)


def test_files_that_are_not_models_fail_with_one_sentence(tmp_path: Path, tiny: Path) -> None:
    broken = {
        "cut.gguf": gguf_fixtures.truncate(tiny, tmp_path / "cut.gguf", -1000),
        "odd.gguf": gguf_fixtures.write_unknown_architecture(tmp_path / "odd.gguf"),
        "letter.gguf": gguf_fixtures.write_text(tmp_path / "letter.gguf"),
        "absent.gguf": tmp_path / "absent.gguf",
    }
    for name, path in broken.items():
        with pytest.raises(ModelLoadFailed) as caught:
            engine_of(path)
        assert name in caught.value.message
        assert str(tmp_path) not in caught.value.message
        if name == "odd.gguf":
            assert "unknown model architecture: 'perpetuum'" in caught.value.message


def test_a_tier_with_a_broken_file_says_so_and_the_others_serve(
    tmp_path: Path, tiny: Path, smollm2: Path
) -> None:
    def tier(path: Path) -> TierSettings:
        return TierSettings(model_path=str(path), n_threads=1, n_parallel=2, n_ctx=256)

    cut = gguf_fixtures.truncate(tiny, tmp_path / "cut.gguf", -1000)
    odd = gguf_fixtures.write_unknown_architecture(tmp_path / "odd.gguf")
    tiers = {"light": tier(smollm2), "medium": tier(cut), "heavy": tier(odd)}
    with serving(settings(**tiers), launch=launch_process) as service:
        for name, path in (("medium", cut), ("heavy", odd)):
            reply = service.chat(model=name)
            assert reply.status_code == 500
            error = reply.json()["error"]
            assert error["code"] == "model_load_failed"
            assert path.name in error["message"]
            health = service.http.get("/health").json()["tiers"][name]
            assert health == {"state": "failed", "reason": error["message"]}
        first = service.chat("What is 2 and 2?", temperature=0, max_tokens=12).json()
        text = first["choices"][0]["message"]["content"]
        chunks = events(service.chat("What is 2 and 2?", temperature=0, max_tokens=12, stream=True))
        streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert streamed == text
        again = service.chat("What is 2 and 2?", temperature=0, max_tokens=8).json()
        n_prompt = again["usage"]["prompt_tokens"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1
