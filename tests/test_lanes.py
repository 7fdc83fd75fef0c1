"""Cells apart for those who answer at once: the numbers are those of cells that all share."""

import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import llama_cpp as lib
import numpy as np
import numpy.typing as npt
import pytest

from engine.backends.base import CacheFull, Engine
from engine.backends.llama_lanes import Lanes
from engine.backends.llama_model import Error
from engine.backends.llamacpp import LlamaDecoder
from engine.batch_engine import BatchEngine
from engine.prefix import Saved
from engine.types import MOST_GUESSES, Batch, Sequence
from tests.engines import engine_of, generate, lanes_of, open_lanes

pytestmark = pytest.mark.real

N_SLOTS, N_CELLS, LANE = 6, 1536, 256
CLOSE = 0.05  # kernels for other numbers of tokens differ by 0.02, a wrong cell by 0.1 to 2


class Twins:
    """Two decoders that are told the same: one has lanes, the other's sequences share all cells."""

    def __init__(self, model: Path, *, flash_attention: bool) -> None:
        values: dict[str, Any] = {"flash_attention": flash_attention}
        room = {"n_parallel": N_SLOTS, "kv_tokens": N_CELLS, "n_ctx": 512, "n_batch": 512}
        self._engines = [engine_of(model, **room, **values, lane_tokens=lane) for lane in (LANE, 0)]
        self.lanes: Lanes = open_lanes(self._engines[0])
        self.decoders = [decoder_of(engine) for engine in self._engines]
        self.tokens = [array("i") for _ in range(N_SLOTS)]  # by slot, that have cells
        # without flash attention the sums go over what others have too, as zeros
        self.is_flash = flash_attention
        self.rounding = 0 if flash_attention else 1e-3
        self._dice = random.Random(5)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def step(
        self,
        numbers: dict[int, int],
        n_guesses: int = 0,
        n_held: int | None = None,
        reuses: bool = True,
    ) -> float:
        """Compute so many more tokens of each slot, and guesses that are all wrong; the largest
        difference of a logit, in standard deviations. Unless it `reuses` they are of one job."""
        batch = Batch(n_held=sum(map(len, self.tokens)) if n_held is None else n_held)
        for slot, n in numbers.items():
            more = array("i", [self._dice.randrange(1000, 40000) for _ in range(n)])
            first = None if reuses else 0
            sequence = Sequence(
                slot, self.tokens[slot] + more, slot=slot, reuses=reuses, goes_on_from=first
            )
            sequence.n_past = len(self.tokens[slot])
            batch.add(sequence, n)
            if n == 1 and n_guesses:
                batch.guess(batch.chunks[-1], array("i", range(2000, 2000 + n_guesses)))
            self.tokens[slot] = sequence.tokens
        n_rows = len(numbers) + batch.n_guesses
        ours, theirs = (rows(decoder, batch, n_rows) for decoder in self.decoders)
        for chunk in batch.chunks:
            if chunk.guesses:
                self.truncate(chunk.slot, chunk.end)
        return float(np.abs(ours - theirs).max() / theirs.std())

    @property
    def slots(self) -> list[int]:
        """Those that have lanes, by lane."""
        return sorted(self.lanes._lanes, key=lambda slot: self.lanes._lanes[slot])

    def answer(self, *slots: int) -> float:
        return self.step(dict.fromkeys(slots, 1))

    def truncate(self, slot: int, n_tokens: int) -> None:
        for decoder in self.decoders:
            assert decoder.memory.truncate(slot, n_tokens)
        del self.tokens[slot][n_tokens:]

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        for decoder in self.decoders:
            decoder.memory.share(source, slot, n_tokens)
        self.tokens[slot] = self.tokens[source][:n_tokens]

    def save(self, slot: int, start: int, end: int) -> list[Saved]:
        saved = [decoder.memory.save(slot, start, end) for decoder in self.decoders]
        assert saved[0] is not None
        assert saved[1] is not None
        assert saved[0].nbytes == saved[1].nbytes
        return [saved[0], saved[1]]

    def load(self, slot: int, saved: list[Saved], tokens: "array[int]") -> None:
        for decoder, cells in zip(self.decoders, saved, strict=True):
            assert decoder.memory.load(slot, cells, 0, len(tokens))
        self.tokens[slot] = tokens

    def clear(self, slot: int) -> None:
        for decoder in self.decoders:
            decoder.memory.clear(slot)
        self.tokens[slot] = array("i")


def decoder_of(engine: Engine) -> LlamaDecoder:
    return cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)


def rows(decoder: LlamaDecoder, batch: Batch, n: int) -> npt.NDArray[np.float32]:
    decoder.decode(batch)
    assert len(decoder._rows) == n
    for context, index, logits in decoder._rows:
        pointer = lib.llama_get_logits_ith(context, index)
        assert np.array_equal(logits, np.ctypeslib.as_array(pointer, logits.shape))
    return np.stack([logits for _, _, logits in decoder._rows])


@pytest.fixture(params=[True, False], ids=["flash", "plain"])
def twins(tiny: Path, request: pytest.FixtureRequest) -> Iterator[Twins]:
    twins = Twins(tiny, flash_attention=request.param)
    yield twins
    twins.close()


def test_answers_at_once_have_lanes_and_the_same_numbers(twins: Twins) -> None:
    twins.step({0: 40, 1: 50, 2: 30})
    assert twins.answer(0) == 0
    assert twins.slots == []
    assert twins.answer(0, 1) <= twins.rounding
    # three, or two without flash attention, which else computes for the cells of both
    assert twins.slots == ([] if twins.is_flash else [0, 1])
    assert twins.answer(0, 1, 2) <= twins.rounding
    assert twins.slots == [0, 1, 2]
    assert twins.answer(2, 0, 1) <= twins.rounding
    assert twins.answer(0, 2) < CLOSE  # they are there
    assert twins.slots == [0, 1, 2]
    twins.save(1, 0, 52)  # who has ended is moved out
    assert twins.slots == [0, 2]
    assert twins.answer(0, 1, 2) <= twins.rounding


def test_a_beginning_that_all_share_is_looked_at_at_home(twins: Twins) -> None:
    twins.step({0: 80})
    twins.share(0, 1, 80)
    twins.share(0, 2, 80)
    twins.step({1: 8, 2: 8})
    n_held = 80 + 2 * 8
    assert twins.step({0: 1, 1: 1, 2: 1}, n_held=n_held) <= twins.rounding
    assert twins.slots == []
    assert twins.step({0: 1, 1: 1, 2: 1}, n_held=n_held + 300) <= twins.rounding
    assert twins.slots == [0, 1, 2]  # others have most


def test_a_prompt_is_computed_where_the_answers_are(twins: Twins) -> None:
    twins.step({0: 40, 1: 40, 2: 40})
    twins.answer(0, 1, 2)
    assert twins.step({0: 1, 1: 1, 2: 1, 3: 20}) < CLOSE
    assert twins.slots == [0, 1, 2, 3]
    assert twins.step({0: 1, 2: 1, 3: 20}) < CLOSE
    assert twins.answer(0, 1, 2, 3) < CLOSE
    assert twins.slots == [0, 1, 2, 3]


def test_few_go_home_to_a_prompt_that_is_too_long_for_a_lane(twins: Twins) -> None:
    twins.step({0: 40, 1: 40, 2: 40})
    twins.answer(0, 1, 2)
    twins.step({3: 200})
    assert twins.step({0: 1, 1: 1, 2: 1, 3: 100}) < CLOSE
    assert twins.slots == [0, 1, 2]
    assert twins.step({0: 1, 3: 20}) < CLOSE
    assert twins.slots == [1, 2]
    assert twins.lanes._lanes == {1: 1, 2: 2}
    assert twins.answer(1, 2) < CLOSE
    assert twins.lanes._lanes == {1: 1, 2: 0}  # the last one moves up
    assert twins.step({1: 1, 2: 1, 4: 10}) < CLOSE
    assert twins.lanes._lanes == {1: 1, 2: 0, 4: 2}


def test_an_answer_that_becomes_too_long_for_its_lane_goes_home(twins: Twins) -> None:
    twins.step({0: LANE - MOST_GUESSES - 4, 1: 50, 2: 30, 3: 20})
    for n in range(LANE - MOST_GUESSES - 3, LANE - MOST_GUESSES + 6):
        assert twins.answer(0, 1, 2, 3) < CLOSE
        assert (0 in twins.slots) == (n <= LANE - MOST_GUESSES)  # guesses have room in any case
    assert sorted(twins.slots) == [1, 2, 3]


def test_guesses_in_lanes_are_computed_and_dropped(twins: Twins) -> None:
    twins.step({0: LANE - MOST_GUESSES - 2, 1: 50, 2: 30, 3: 20})
    twins.answer(0, 1, 2, 3)
    assert twins.step({0: 1, 1: 1, 2: 1, 3: 1}, n_guesses=MOST_GUESSES) < CLOSE
    assert len(twins.slots) == 4
    assert twins.answer(0, 1, 2, 3) < CLOSE


def test_what_was_said_in_a_lane_is_shared_and_saved_like_any_other(twins: Twins) -> None:
    twins.step({0: 40, 1: 50, 2: 30})
    for _ in range(5):
        twins.answer(0, 1, 2)
    twins.share(0, 3, 40)  # is at home
    assert twins.slots == [0, 1, 2]
    twins.share(1, 4, 53)
    assert twins.slots == [0, 2]
    assert twins.answer(3, 4, 0, 2) <= twins.rounding
    saved = twins.save(2, 0, 33)
    twins.load(5, saved, twins.tokens[2][:33])
    assert twins.answer(0, 1, 2, 3, 4, 5) <= twins.rounding


def test_any_order_of_calls_has_the_numbers_of_shared_cells(twins: Twins) -> None:
    dice = random.Random(11)
    most_lanes = 0
    for _ in range(250):
        held = [slot for slot in range(N_SLOTS) if twins.tokens[slot]]
        empty = [slot for slot in range(N_SLOTS) if not twins.tokens[slot]]
        choice = dice.random()
        if choice < 0.7 or not held:
            chosen = dice.sample(range(N_SLOTS), dice.randint(1, N_SLOTS))
            is_prompt = {slot: not twins.tokens[slot] or dice.random() < 0.1 for slot in chosen}
            numbers = {slot: dice.randint(2, 20) if is_prompt[slot] else 1 for slot in chosen}
            assert twins.step(numbers, dice.choice([0, 0, 0, 2])) < CLOSE
            most_lanes = max(most_lanes, len(twins.slots))
            continue
        slot = dice.choice(held)
        n_tokens = dice.randint(1, len(twins.tokens[slot]))
        if choice < 0.78:
            twins.truncate(slot, n_tokens)
        elif choice < 0.86 and empty:
            twins.share(slot, empty[0], n_tokens)
        elif choice < 0.94 and empty:
            twins.load(empty[0], twins.save(slot, 0, n_tokens), twins.tokens[slot][:n_tokens])
        else:
            twins.clear(slot)
        if sum(map(len, twins.tokens)) > N_CELLS - 200:
            twins.clear(max(held, key=lambda slot: len(twins.tokens[slot])))
    assert most_lanes >= 4


# what fails


def test_without_memory_for_lanes_all_share_their_cells(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(tiny, n_parallel=4, lane_tokens=LANE)
    monkeypatch.setattr(lib, "llama_init_from_model", lambda *_: None)
    assert open_lanes(engine).context is None
    assert "There is no memory for cells apart" in caplog.text
    prompts = {i: [1000 + i, 1001, 1002] for i in range(4)}
    assert all(len(said) == 20 for said in generate(engine, prompts, 20).values())
    engine.close()


def test_who_cannot_be_copied_into_a_lane_stays_at_home(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    twins.step({0: 40, 1: 50, 2: 30})
    twins.answer(0, 1, 2)
    monkeypatch.setattr("engine.backends.llama_lanes.write_state", lambda *_: False)
    twins.step({3: 10})
    assert twins.answer(0, 1, 2, 3) < CLOSE
    assert twins.slots == [0, 1, 2]
    assert "Cells cannot be copied" in caplog.text
    monkeypatch.undo()
    assert twins.answer(0, 1, 2, 3) < CLOSE
    assert twins.slots == []


@pytest.mark.parametrize("which", ["home", "lanes"])
def test_a_step_that_fails_in_one_place_leaves_the_rest_right(
    twins: Twins, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins.step({0: 40, 1: 40, 2: 40, 3: 250})
    twins.answer(0, 1, 2)
    decoder = twins.decoders[0]
    decode = lib.llama_decode
    failing = decoder._context if which == "home" else twins.lanes.context
    monkeypatch.setattr(lib, "llama_decode", lambda c, b: 1 if c is failing else decode(c, b))
    batch = Batch(n_held=1000)
    for slot in range(4):
        tokens = twins.tokens[slot]
        batch.add(Sequence(slot, tokens + array("i", [1]), slot=slot, n_past=len(tokens)), 1)
    # cells are missing at home alone, before anything is computed; elsewhere all of it fails
    with pytest.raises(CacheFull if which == "home" else Error):
        decoder.decode(batch)
    monkeypatch.undo()
    if which == "lanes":
        for slot in range(4):
            twins.clear(slot)
    assert twins.step({slot: 1 if twins.tokens[slot] else 30 for slot in range(4)}) < CLOSE
    assert twins.answer(0, 1, 2, 3) < CLOSE


def test_an_engine_closes_while_its_lanes_are_made(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny, n_parallel=4, lane_tokens=LANE)
    lanes_of(engine)._open()
    freed: list[Any] = []
    free = lib.llama_free

    def note(context: Any) -> None:
        freed.append(context)
        free(context)

    monkeypatch.setattr(lib, "llama_free", note)
    engine.close()
    assert len(set(freed)) == 2


def test_answers_that_are_to_be_the_same_every_time_have_their_cells_at_home(
    twins: Twins,
) -> None:
    twins.step({0: 40, 1: 40, 2: 40})
    twins.answer(0, 1, 2)
    assert twins.slots
    assert twins.step({0: 1, 1: 1, 2: 1}, reuses=False) < CLOSE
    assert not twins.slots


def test_cells_that_cannot_be_copied_home_fail_the_step_and_no_later_one(
    twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins.step({0: 40, 1: 40, 2: 40, 3: 250})
    twins.answer(0, 1, 2)
    twins.answer(0, 1, 2)
    monkeypatch.setattr("engine.backends.llama_memory.write_state", lambda *_: False)
    with pytest.raises(RuntimeError):
        twins.share(0, 4, 42)
    with pytest.raises(RuntimeError):
        twins.answer(1, 3)  # few beside one that is too long
    monkeypatch.undo()
    for slot in (0, 1, 3):
        twins.clear(slot)
    assert twins.step({0: 30, 1: 30, 2: 1}) < CLOSE
    assert twins.answer(0, 1, 2) < CLOSE
