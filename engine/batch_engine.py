"""An engine out of the scheduler and a decoder: continuous batching for llama.cpp and the fake."""

import logging
import time
from array import array

from engine.backends.base import CacheFull, CellsLost, Constraint, Decoder
from engine.pace import Pace
from engine.prefix import PrefixTree
from engine.scheduler import MOST_SCORED, Scheduler
from engine.speculation import Speculation
from engine.types import MOST_GUESSES, Chunk, SamplingParams, Sequence, StepResult
from engine.wire import WorkerSpec

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the model is taken to be broken


class BatchEngine:
    """Implements `engine.backends.base.Engine` over a `Decoder`."""

    def __init__(
        self, decoder: Decoder, spec: WorkerSpec, *, n_ctx: int, n_cells: int, n_batch: int
    ) -> None:
        self.tokenizer = decoder.tokenizer
        self.n_ctx = n_ctx
        self.n_parallel = spec.n_parallel
        self._decoder = decoder
        self._scheduler = Scheduler(
            decoder.memory,
            n_slots=spec.n_parallel,
            n_ctx=n_ctx,
            n_cells=n_cells,
            n_batch=n_batch,
            pace=Pace(spec.max_stall_s, has_tiles=spec.flash_attention),
            tree=PrefixTree(spec.prefix_cache_bytes),
            speculation=Speculation(repeats=not decoder.memory.takes_back)
            if spec.speculates
            else None,
            # decoders have room for the rows of as many guesses, which there are none then
            n_scored=min(MOST_SCORED, spec.n_parallel * MOST_GUESSES),
        )
        self._right: list[tuple[int, Chunk]] = []  # rows after guesses that were right
        self._n_failed_steps = 0

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    def admit(
        self,
        id: int,
        prompt: list[int],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        *,
        reuses: bool = True,
        goes_on_from: int | None = None,
        rank: float = 0.0,
    ) -> None:
        sampler = self._decoder.sampler(sampling, prompt)
        sequence = Sequence(
            id,
            array("i", prompt),
            sampler,
            constraint,
            reuses=reuses,
            goes_on_from=goes_on_from,
            rank=rank,
            prompt_logprobs=sampling.prompt_logprobs,
        )
        self._scheduler.add(sequence)

    def cancel(self, id: int) -> None:
        self._scheduler.cancel(id)

    def step(self) -> StepResult:
        """Every step gives a sequence one token at most, so that whoever called hears of each
        before there is another, and may end the sequence. Where a guess was right the next step has
        nothing to compute."""
        rows = [(row, chunk) for row, chunk in self._right if chunk.sequence.slot is not None]
        self._right = []
        if rows:
            result = StepResult()
            for row, chunk in rows:
                self._sample(row, chunk, result)
            return result
        planned_at = time.perf_counter()
        batch, started = self._scheduler.plan()
        result = StepResult(started=[(s.id, s.n_cached) for s in started])
        if not batch.chunks:
            return result
        rows, n_rows = [], 0
        to_score: list[tuple[int, Sequence, int]] = []  # row, and the token that comes next
        for chunk in batch.chunks:
            if n_scored := chunk.n_scored:
                sequence = chunk.sequence
                ahead = range(sequence.n_scored + 1, sequence.n_scored + n_scored + 1)
                to_score += [(n_rows + n, sequence, at) for n, at in enumerate(ahead)]
                n_rows += n_scored
            if chunk.wants_logits:
                rows.append((n_rows, chunk))
                n_rows += 1 + len(chunk.guesses)
        started_at = time.perf_counter()
        try:
            self._decoder.decode(batch)
        except CacheFull as error:
            if not self._scheduler.lack_cells(batch):
                result.failed = [(s.id, error) for s in self._scheduler.fail(batch)]
            return result
        except CellsLost:
            self._scheduler.lose(batch)
            return result
        except Exception as error:
            self._n_failed_steps += 1
            if self._n_failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception("A step failed; its %d sequences end", len(batch.chunks))
            result.failed = [(s.id, error) for s in self._scheduler.fail(batch)]
            return result
        self._n_failed_steps = 0
        failed: dict[Sequence, Exception] = {}
        for row, sequence, at in to_score:
            n_top, token = sequence.prompt_logprobs or 0, sequence.tokens[at]
            try:
                result.scored.append((sequence.id, self._decoder.score(row, token, n_top)))
            except Exception as error:
                failed[sequence] = error
        if batch.n_guesses and not self._decoder.memory.takes_back:
            started_at = planned_at  # copies to come back to are a part of the price
        seconds = time.perf_counter() - started_at
        self._scheduler.commit(batch, seconds)
        result.failed += ((sequence.id, fault) for sequence, fault in failed.items())
        for sequence in failed:
            self._scheduler.cancel(sequence.id)
        result.guessed = [(c.sequence.id, len(c.guesses)) for c in batch.chunks if c.guesses]
        for row, chunk in rows:
            if chunk.sequence not in failed:
                self._sample(row, chunk, result)
        return result

    def _sample(self, row: int, chunk: Chunk, result: StepResult) -> None:
        sequence = chunk.sequence
        try:
            sampled = self._decoder.sample(row, sequence)
        except Exception as error:
            result.failed.append((sequence.id, error))
            self._scheduler.cancel(sequence.id)
        else:
            result.tokens.append((sequence.id, sampled))
            if self._scheduler.take(chunk, sampled.token):
                result.right.append(sequence.id)
                self._right.append((row + 1, chunk))

    def close(self) -> None:
        self._decoder.close()
