"""An engine out of the scheduler and a decoder: continuous batching for llama.cpp and the fake."""

import logging
import time
from array import array

from engine.backends.base import CacheFull, Constraint, Decoder
from engine.pace import Pace
from engine.prefix import PrefixTree
from engine.scheduler import Scheduler
from engine.types import SamplingParams, Sequence, StepResult
from engine.wire import WorkerSpec

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the decoder is taken to be broken


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
            decoder,
            n_slots=spec.n_parallel,
            n_cells=n_cells,
            n_batch=n_batch,
            pace=Pace(spec.max_stall_s),
            tree=PrefixTree(spec.prefix_cache_bytes),
        )
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
        rank: float = 0.0,
    ) -> None:
        sampler = self._decoder.sampler(sampling, prompt)
        sequence = Sequence(id, array("i", prompt), sampler, constraint, reuses=reuses, rank=rank)
        self._scheduler.add(sequence)

    def cancel(self, id: int) -> None:
        self._scheduler.cancel(id)

    def step(self) -> StepResult:
        batch, started = self._scheduler.plan()
        result = StepResult(started=[(s.id, s.n_cached) for s in started])
        if not batch.chunks:
            return result
        wanting = [chunk.sequence for chunk in batch.chunks if chunk.wants_logits]
        started_at = time.perf_counter()
        try:
            self._decoder.decode(batch)
        except CacheFull as error:
            if not self._scheduler.lack_cells():
                result.failed = [(s.id, error) for s in self._scheduler.fail(batch)]
            return result
        except Exception as error:
            self._n_failed_steps += 1
            if self._n_failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception("A step failed; its %d sequences end", len(batch.chunks))
            result.failed = [(s.id, error) for s in self._scheduler.fail(batch)]
            return result
        self._n_failed_steps = 0
        seconds = time.perf_counter() - started_at
        self._scheduler.commit(batch, seconds)
        for row, sequence in enumerate(wanting):
            self._sample(row, sequence, result)
        return result

    def _sample(self, row: int, sequence: Sequence, result: StepResult) -> None:
        try:
            sampled = self._decoder.sample(row, sequence)
        except Exception as error:
            result.failed.append((sequence.id, error))
            self._scheduler.cancel(sequence.id)
        else:
            sequence.tokens.append(sampled.token)
            result.tokens.append((sequence.id, sampled))

    def close(self) -> None:
        self._decoder.close()
