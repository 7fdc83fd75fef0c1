"""The batch engine when its decoder fails or is full, and the fake decoder under it."""

import logging

import pytest

from engine.backends.base import CacheFull, CellsLost
from engine.backends.fake import FakeDecoder, Script
from engine.batch_engine import MAX_FAILED_STEPS, BatchEngine
from engine.types import Batch, Sampled, SamplingParams, Sequence
from engine.wire import WorkerSpec


class Decoder(FakeDecoder):
    """Fails where it is told to, once for each entry."""

    def __init__(self, *, n_cells: int, n_slots: int) -> None:
        super().__init__(Script(), n_slots=n_slots, n_cells=n_cells, sleep=lambda seconds: None)
        self.decode_errors: list[Exception] = []
        self.sample_errors: list[Exception] = []
        self.score_errors: list[Exception] = []
        self._rows: list[Sequence] = []

    def decode(self, batch: Batch) -> None:
        if self.decode_errors:
            raise self.decode_errors.pop()
        super().decode(batch)
        self._rows = [chunk.sequence for chunk in batch.chunks if chunk.wants_logits]

    def sample(self, row: int, sequence: Sequence) -> Sampled:
        if self.sample_errors:
            raise self.sample_errors.pop()
        assert self._rows[row] is sequence
        return super().sample(row, sequence)

    def score(self, row: int, token: int, n_top: int) -> Sampled:
        if self.score_errors:
            raise self.score_errors.pop()
        return super().score(row, token, n_top)


class Answers:
    """Steps an engine and collects what it says."""

    def __init__(
        self,
        *,
        n_parallel: int = 4,
        n_cells: int = 200,
        n_cells_decoder: int | None = None,
        n_batch: int = 64,
    ) -> None:
        self.decoder = Decoder(n_cells=n_cells_decoder or n_cells, n_slots=n_parallel)
        spec = WorkerSpec(
            name="light", backend="fake", model_path="", n_ctx=n_cells, n_parallel=n_parallel,
            kv_tokens=n_cells, n_batch=n_batch, n_threads=1, n_gpu_layers=0,
        )  # fmt: skip
        self.engine = BatchEngine(
            self.decoder, spec, n_ctx=n_cells, n_cells=n_cells, n_batch=n_batch
        )
        self.texts: dict[int, bytes] = {}
        self.cached: dict[int, int] = {}
        self.failed: dict[int, Exception] = {}

    def add(self, id: int, prompt: str) -> None:
        self.engine.admit(id, list(prompt.encode()), SamplingParams())

    def step(self) -> None:
        result = self.engine.step()
        self.cached.update(result.started)
        self.failed.update(result.failed)
        for id, (token, *_) in result.tokens:
            self.texts[id] = self.texts.get(id, b"") + self.engine.tokenizer.piece(token)
            if self.engine.tokenizer.ends_generation(token):
                self.engine.cancel(id)

    def run(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if self.engine.idle:
                return
            self.step()
        pytest.fail("it does not end")


def test_everybody_is_answered_to_the_end() -> None:
    answers = Answers(n_parallel=2)
    for id in range(5):
        answers.add(id, f"prompt {id}")
    answers.run()
    assert answers.texts == {id: b"You said: prompt %d" % id for id in range(5)}
    assert answers.failed == {}


def test_the_first_step_tells_who_started_and_how_much_was_reused() -> None:
    answers = Answers(n_parallel=1)
    answers.add(1, "abcdef")
    answers.run()
    answers.add(2, "abcdef")
    result = answers.engine.step()
    assert result.started == [(2, 5)]


def test_a_step_with_nothing_to_do_says_nothing() -> None:
    result = Answers().engine.step()
    assert (result.started, result.tokens, result.failed) == ([], [], [])


def test_a_failing_step_fails_only_its_sequences_and_the_next_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers = Answers(n_parallel=2)
    error = RuntimeError("no such kernel")
    for id in (1, 2, 3):
        answers.add(id, f"prompt {id}")
    answers.step()
    answers.decoder.decode_errors = [error]
    answers.step()
    assert answers.failed == {1: error, 2: error}
    assert answers.decoder.cells == [[], []]
    answers.run()
    assert answers.texts[3] == b"You said: prompt 3"
    (record,) = caplog.records
    assert (record.levelno, record.exc_info is not None) == (logging.ERROR, True)


def test_a_sampler_that_fails_is_a_failed_step() -> None:
    answers = Answers()
    answers.add(1, "first")
    answers.decoder.sample_errors = [ValueError("not a number")]
    answers.step()
    assert [str(error) for error in answers.failed.values()] == ["not a number"]
    answers.add(2, "second")
    answers.run()
    assert answers.texts == {2: b"You said: second"}
    assert answers.cached[2] == 0


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    answers = Answers()
    answers.add(1, "first")
    answers.engine.admit(2, list(b"second"), SamplingParams(prompt_logprobs=0))
    answers.decoder.score_errors = [ValueError("not a number")]
    answers.run()
    assert {id: str(error) for id, error in answers.failed.items()} == {2: "not a number"}
    assert answers.texts == {1: b"You said: first"}


def test_steps_that_fail_in_a_row_mean_that_the_engine_cannot_go_on() -> None:
    answers = Answers()
    answers.decoder.decode_errors = [RuntimeError("broken")] * MAX_FAILED_STEPS
    for id in range(1, MAX_FAILED_STEPS):
        answers.add(id, "prompt")
        answers.step()
        assert id in answers.failed
    answers.add(0, "prompt")
    with pytest.raises(RuntimeError, match="broken"):
        answers.step()


def test_a_step_that_succeeds_starts_the_count_again() -> None:
    answers = Answers()
    for id in range(3 * MAX_FAILED_STEPS):
        answers.add(id, "prompt")
        if id % 2:
            answers.decoder.decode_errors = [RuntimeError("now and then")]
        answers.run()
    assert sorted(answers.failed) == list(range(1, 3 * MAX_FAILED_STEPS, 2))


def test_a_full_cache_forgets_what_is_idle_and_nothing_fails() -> None:
    answers = Answers(n_parallel=3, n_cells=100, n_cells_decoder=50)
    for id in (1, 2, 3):
        answers.add(id, f"prompt {id}")
        answers.run()
    assert answers.texts == {id: b"You said: prompt %d" % id for id in (1, 2, 3)}
    assert answers.failed == {}


def test_a_full_cache_preempts_the_youngest_and_nothing_fails() -> None:
    answers = Answers()
    answers.add(1, "old")
    answers.add(2, "young")
    answers.step()
    answers.decoder.decode_errors = [CacheFull()]
    answers.step()
    assert [bytes(answers.decoder.tokens(slot)) for slot in (0, 1)] == [b"old", b""]
    answers.run()
    assert answers.texts == {1: b"You said: old", 2: b"You said: young"}
    assert answers.failed == {}


def test_what_lost_its_cells_is_computed_anew_and_nothing_fails() -> None:
    answers = Answers()
    answers.add(1, "first")
    answers.step()
    answers.step()
    answers.add(2, "second")
    answers.decoder.decode_errors = [CellsLost()] * (MAX_FAILED_STEPS + 1)
    answers.step()
    assert not any(answers.decoder.cells)
    answers.run()
    assert answers.texts == {1: b"You said: first", 2: b"You said: second"}
    assert answers.failed == {}


def test_a_memory_smaller_than_it_said_holds_nobody_up() -> None:
    answers = Answers(n_parallel=3, n_cells=100, n_cells_decoder=60)
    prompts = {id: "abcdefg"[: id + 1] * 4 for id in range(7)}
    for id, prompt in prompts.items():
        answers.add(id, prompt)
        answers.step()
    answers.run()
    texts = {id: b"You said: " + prompt.encode() for id, prompt in prompts.items()}
    assert {id: text for id, text in answers.texts.items() if id not in answers.failed} == {
        id: text for id, text in texts.items() if id not in answers.failed
    }
    assert set(answers.failed) == {6}  # 28 + 38 tokens do not fit even alone
    assert isinstance(answers.failed[6], CacheFull)


def test_full_caches_are_no_failed_steps() -> None:
    answers = Answers(n_parallel=MAX_FAILED_STEPS + 2)
    for id in range(MAX_FAILED_STEPS + 2):
        answers.add(id, f"prompt {id}")
    answers.decoder.decode_errors = [CacheFull() for _ in range(MAX_FAILED_STEPS + 1)]
    answers.run()
    assert answers.failed == {}
    assert len(answers.texts) == MAX_FAILED_STEPS + 2


def test_a_cancelled_sequence_says_no_more() -> None:
    answers = Answers()
    answers.add(1, "first")
    answers.add(2, "second")
    answers.step()
    answers.engine.cancel(1)
    answers.run()
    assert answers.texts == {1: b"Y", 2: b"You said: second"}


def test_preempted_answers_are_those_of_an_engine_with_room() -> None:
    """The fake reads its answers back from the cells, so a wrong cell would be heard."""
    answers = Answers(n_parallel=4, n_cells=60, n_batch=7)
    prompts = {id: "abcdefgh"[id:] * 2 for id in range(8)}
    for id, prompt in prompts.items():
        answers.add(id, prompt)
    answers.run()
    assert answers.texts == {id: f"You said: {prompt}".encode() for id, prompt in prompts.items()}
    assert answers.failed == {}
