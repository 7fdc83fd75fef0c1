"""An engine out of the scheduler and a decoder: continuous batching for llama.cpp and the fake."""

import logging

from engine.backends.base import CacheFull, Decoder
from engine.scheduler import Scheduler
from engine.types import SamplingParams, Sequence, StepResult

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the decoder is taken to be broken


class BatchEngine:
    """Implements `engine.backends.base.Engine` over a `Decoder`."""

    def __init__(
        self, decoder: Decoder, *, n_ctx: int, n_parallel: int, n_cells: int, n_batch: int
    ) -> None:
        self.tokenizer = decoder.tokenizer
        self.n_ctx = n_ctx
        self.n_parallel = n_parallel
        self._decoder = decoder
        self._scheduler = Scheduler(decoder, n_slots=n_parallel, n_cells=n_cells, n_batch=n_batch)
        self._n_failed_steps = 0

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    def admit(self, id: int, prompt: list[int], sampling: SamplingParams) -> None:
        self._scheduler.add(Sequence(id, prompt, self._decoder.sampler(sampling, prompt)))

    def cancel(self, id: int) -> None:
        self._scheduler.cancel(id)

    def step(self) -> StepResult:
        batch, started = self._scheduler.plan()
        result = StepResult(started=[(s.id, s.n_cached) for s in started])
        if not batch.chunks:
            return result
        wanting = [chunk.sequence for chunk in batch.chunks if chunk.wants_logits]
        try:
            self._decoder.decode(batch)
            sampled = [self._decoder.sample(row, s) for row, s in enumerate(wanting)]
        except CacheFull as error:
            if not self._scheduler.forget_idle(1) and not self._scheduler.preempt_youngest():
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
        self._scheduler.commit(batch, sampled)
        result.tokens = [(s.id, token) for s, token in zip(wanting, sampled, strict=True)]
        return result

    def close(self) -> None:
        self._decoder.close()
