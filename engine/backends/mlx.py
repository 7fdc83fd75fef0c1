"""A model on MLX: requests join and leave the batch that mlx-lm computes.

All of mlx happens in the thread that loads the model and steps the engine: its arrays and streams
belong to a thread, and a process whose threads leave some behind aborts at its end.
"""

import gc
import logging
import os
import threading
import time
from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.backends.base import QUIET, Constraint, Engine, ReportProgress, Tokenizer, install
from engine.backends.mlx_ahead import can_guess, can_take_back
from engine.backends.mlx_prompts import Cache, new_prompts
from engine.backends.mlx_rows import Rows, ScoredPrompt, new_rows
from engine.backends.mlx_sampling import Chooser, new_chooser
from engine.backends.mlx_tokenizer import MlxTokenizer
from engine.batch_engine import MAX_FAILED_STEPS
from engine.cells import view
from engine.chat_folder import read_chat_folder, suppressed_tokens
from engine.model_file import ModelFile
from engine.pace import MIN_BESIDE, MIN_TOKENS, Pace
from engine.prefix import Tokens, n_common
from engine.scheduler import MOST_SCORED, WORTH_WAITING_FOR
from engine.speculation import Guesses, Speculation
from engine.types import Admitted, SamplingParams, StepResult, is_one_steady_job, order
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("worker.mlx")

CPU_PREFILL = 64  # prompt tokens of a step whose pace is not measured, or it may take minutes
N_LOADS = 16  # parts in which weights are read, to tell how far it is


def load(spec: WorkerSpec, progress: ReportProgress) -> Engine:
    facts = read_chat_folder(Path(spec.model_path))
    progress(0.0)
    mx = import_mlx(spec)
    check_room(mx, facts)
    return MlxEngine(spec, facts, _loaded(mx, facts, progress), MlxTokenizer(facts))


def import_mlx(spec: WorkerSpec) -> Any:
    """mlx.core, with the device chosen. Raises ModelLoadFailed where it is not installed."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        mx = import_module("mlx.core")
        if spec.n_gpu_layers == 0:
            mx.set_default_device(mx.cpu)  # before mlx-lm makes its stream
        import_module("mlx_lm.generate")
    except ImportError as error:
        raise ModelLoadFailed(
            f"The backend mlx is not installed ({error}): {install('mlx')}."
        ) from None
    if is_on_cpu(mx):
        mx.disable_compile()  # it would compile C++ at the first use, if there is a compiler
    return mx


def check_room(mx: Any, facts: ModelFile) -> None:
    """Weights beyond what the system lets a GPU keep resident can stop a Mac altogether. Raises
    ModelLoadFailed. Up to there all is kept resident, for as long as the process lives: mlx-lm
    does so for a batch, and takes it back when that is dropped."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit is None:  # the CPU, or a GPU with memory of its own
        return
    if facts.size_bytes > limit:
        raise ModelLoadFailed(
            f"{facts.name} has {facts.size_bytes / 1e9:.1f} GB of weights, and the GPU may hold "
            f"{limit / 1e9:.1f} GB; take a smaller or a quantised one."
        )
    mx.set_wired_limit(limit)


def is_on_cpu(mx: Any) -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _loaded(mx: Any, facts: ModelFile, progress: ReportProgress) -> Any:
    try:
        model, _ = import_module("mlx_lm.utils").load_model(facts.path, lazy=True)
        if is_on_cpu(mx):
            # halves are up to 50 times slower there, and weights stay quantised
            model.set_dtype(mx.float32)
        parameters = [
            weights for _, weights in import_module("mlx.utils").tree_flatten(model.parameters())
        ]
        size = max(len(parameters) // N_LOADS, 1)
        for start in range(0, len(parameters), size):
            mx.eval(parameters[start : start + size])
            progress(start / len(parameters))
    except MemoryError:
        raise
    except Exception as error:  # each model of mlx-lm trips in its way over what it did not expect
        reason = str(error).replace(str(facts.path), facts.name).partition("\n")[0]
        raise ModelLoadFailed(f"mlx-lm cannot load {facts.name}: {reason}") from error
    return model


@dataclass(slots=True, eq=False)
class Live(Admitted):
    chooser: Chooser  # survives being put off
    n_joined: int = 0  # tokens with which it joined the rows
    scored: ScoredPrompt | None = None  # what it is before it joins them, if that is asked for
    guesses: Guesses = field(default_factory=Guesses)

    @property
    def is_decoding(self) -> bool:
        """Its prompt is computed: a token came after it."""
        return len(self.tokens) > self.n_joined


class MlxEngine:
    """Implements `engine.backends.base.Engine` over a model of mlx-lm."""

    def __init__(
        self, spec: WorkerSpec, facts: ModelFile, model: Any, tokenizer: MlxTokenizer
    ) -> None:
        self.tokenizer: Tokenizer = tokenizer
        self.n_ctx = min(spec.n_ctx, facts.n_ctx_train)
        self._ends = [token for token in tokenizer.ends if token < facts.n_vocab]
        self._suppressed = [t for t in suppressed_tokens(facts.path) if t < facts.n_vocab]
        self._model: Any = model
        self._spec = spec
        self._mx = import_module("mlx.core")
        self._n_alone = min(spec.n_batch, CPU_PREFILL) if is_on_cpu(self._mx) else spec.n_batch
        cache = import_module("mlx_lm.models.cache").make_prompt_cache(model)
        self._prompts = new_prompts(cache, spec.prefix_cache_bytes)
        can_speculate = spec.speculates and can_guess(model)
        repeats = not can_take_back(cache)
        self._speculation = Speculation(repeats=repeats) if can_speculate else None
        self._met: set[int] = set()  # sizes of passes; the first of one may have made its kernels
        self._said: deque[tuple[int, bool]] = deque()  # by the only row, not told yet; if guessed
        self._has_guessed = False  # in the last step, so nothing is computed ahead of the next
        self._rows = self._new_rows()
        self.n_parallel = spec.n_parallel
        self._cell_bytes = facts.kv_bytes_per_token
        self._pace = Pace(spec.max_stall_s, has_tiles=False)
        # a prompt has a pass of its own in every step, which has a price
        self._n_least = MIN_TOKENS if spec.max_stall_s is None else MIN_BESIDE
        self._waiting: list[Live] = []  # both by rank, then by age: ids grow with arrival
        self._running: list[Live] = []
        self._n_failed_steps = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

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
        chooser = new_chooser(
            sampling, prompt, constraint, self._ends, self._suppressed, self.tokenizer.piece
        )
        live = Live(
            id,
            array("i", prompt),
            chooser,
            reuses=reuses,
            goes_on_from=goes_on_from,
            rank=rank,
            prompt_logprobs=sampling.prompt_logprobs,
        )
        insort(self._waiting, live, key=order)

    def cancel(self, id: int) -> None:
        for live in self._waiting:
            if live.id == id:
                self._waiting.remove(live)
                return
        for live in self._running:
            if live.id == id:
                self._leave(live)
                return

    def step(self) -> StepResult:
        result = StepResult()
        if self._said:
            self._tell(result)
            return result
        self._make_room(result)
        self._join(result)
        if not self._running:
            return result
        self._share_cells()
        n_decodes = sum(live.is_decoding for live in self._running)
        n_prefill = self._n_alone
        if not is_one_steady_job(self._running):  # which has the same chunks every time
            n_allowed = self._pace.n_prefill(n_decodes, self._spec.n_batch)
            n_prefill = min(max(self._n_least, n_allowed), self._spec.n_batch)
        started_at = time.perf_counter()
        try:
            if guesses := self._next_guesses():
                self._guess(guesses, result)
                return result
            n_scored = self._score(min(n_prefill, MOST_SCORED), result)
            told: list[tuple[int, int]] = []
            n_prefilled = 0
            if any(live.scored is None for live in self._running):
                told, n_prefilled = self._rows.step(max(n_prefill - n_scored, 1))
        except Exception as error:
            self._fail(result, error)
            return result
        self._n_failed_steps = 0
        self._observe(n_decodes, n_scored + n_prefilled, time.perf_counter() - started_at)
        by_id = {live.id: live for live in self._running}
        for number, token in told:
            self._take(by_id[number], token, result)
        return result

    def _observe(self, n_decodes: int, n_prefilled: int, seconds: float) -> None:
        if self._has_guessed and n_prefilled == 0:  # it only sent for a token
            self._has_guessed = False
            return
        if not self._rows.was_cut or n_prefilled >= MIN_TOKENS:  # few cost more each
            self._pace.observe(n_decodes, n_prefilled, seconds)
        if self._speculation and n_decodes == 1 and n_prefilled == 0:
            self._speculation.observe(1, seconds)

    def _next_guesses(self) -> list[int]:
        """What the only row may say next, where computing that ahead pays: there what is chosen of
        it already is waited for."""
        live = self._running[0]
        if self._speculation is None or len(self._running) > 1:
            return []
        if not live.is_decoding or not live.reuses:  # without reuse it has the same steps each time
            return []
        tokens = live.tokens
        live.guesses.follow(tokens)
        if self._n_paying(live.guesses, tokens) == 0:
            return []
        tokens = tokens + array("i", self._rows.untold(live.id))
        live.guesses.follow(tokens)
        return live.guesses.next(tokens, self._n_paying(live.guesses, tokens)).tolist()

    def _n_paying(self, guesses: Guesses, tokens: "array[int]") -> int:
        n_room = self.n_ctx - len(tokens)
        if self._speculation is None or not guesses.exist or n_room <= 0:
            return 0
        return self._speculation.plan([guesses.trust], 0, n_room)[0]

    def _guess(self, guesses: list[int], result: StepResult) -> None:
        """Compute guesses. What is right is told by this step and, a token each, by the next."""
        assert self._speculation is not None
        live = self._running[0]
        n_untold = len(self._rows.untold(live.id))
        said, ahead = self._rows.guess(live.id, guesses)
        n_tokens = 1 + len(guesses)
        if n_tokens in self._met:
            self._speculation.observe(n_tokens, ahead.seconds)
        self._met.add(n_tokens)
        self._has_guessed = True
        self._n_failed_steps = 0
        result.guessed.append((live.id, len(guesses)))
        self._said += ((token, 0 <= n - n_untold < ahead.n_right) for n, token in enumerate(said))
        self._tell(result)

    def _tell(self, result: StepResult) -> None:
        live = self._running[0]
        token, is_guessed = self._said.popleft()
        if is_guessed:
            result.right.append(live.id)
        self._take(live, token, result)

    def _score(self, n_tokens: int, result: StepResult) -> int:
        """Compute so many tokens at most of a prompt that is scored, of that which has the fewest
        left. It joins the rows when that is done."""
        scored = [(live.scored.n_left, live) for live in self._running if live.scored]
        if not scored:
            return 0
        _, live = min(scored, key=lambda of: of[0])
        assert live.scored is not None
        try:
            n_tokens = live.scored.step(n_tokens)
        except Exception as error:  # no row has to do with it
            result.failed.append((live.id, error))
            self._leave(live)
            return 0
        if live.scored.n_left == 0:
            tokens = live.tokens.tolist()
            result.scored += [(live.id, sampled) for sampled in live.scored.scored]
            n_past = len(tokens) - 1
            cache = live.scored.cache
            self._rows.add(live.id, tokens, cache, n_past, live.chooser, is_marked=False)
            live.scored = live.prompt_logprobs = None
        return n_tokens

    def _take(self, live: Live, token: int, result: StepResult) -> None:
        try:
            sampled = live.chooser.taken(token)
        except Exception as error:
            result.failed.append((live.id, error))
            self._leave(live)
        else:
            live.tokens.append(sampled.token)
            result.tokens.append((live.id, sampled))

    def _fail(self, result: StepResult, error: Exception) -> None:
        """The step failed, and with it all rows. Those that wait go on in new ones."""
        self._n_failed_steps += 1
        if self._n_failed_steps >= MAX_FAILED_STEPS:
            raise error
        logger.error("A step failed; its %d sequences end", len(self._running), exc_info=error)
        result.failed += [(live.id, error) for live in self._running]
        for live in self._running:
            self._prompts.forget(live.id)
        self._running.clear()
        self._said.clear()
        self._rows = self._new_rows()
        self._mx.clear_cache()

    def close(self) -> None:
        """Nothing of mlx may be left when the thread ends."""
        self._waiting.clear()
        self._running.clear()
        self._prompts.clear()
        del self._rows, self._model
        gc.collect()
        self._mx.clear_cache()
        if threading.current_thread() is not threading.main_thread():
            self._mx.clear_streams()  # a thread that ends with some aborts the process at its end

    # who is in the batch

    def _join(self, result: StepResult) -> None:
        """Those that wait join by rank and age, while there is room. One waits on while another's
        prefill is about to make its beginning; one of a lower rank puts off the last."""
        n_passed_over = 0
        for live in list(self._waiting):
            is_full = len(self._running) >= self._rows.n_most
            if (is_full and not self._outranks(live)) or n_passed_over == self.n_parallel:
                break
            first = None if live.reuses or live.has_started else self._first_of(live)
            is_anew = first is live or live.prompt_logprobs is not None
            wanted = view(live.tokens)[: 0 if is_anew else len(live.tokens) - 1]
            if self._is_coming(wanted) if first is None else not self._is_through(first, live):
                n_passed_over += 1
                continue
            lasting = [other for other in self._running if other.rank <= live.rank]
            if not self._fits(live, lasting):  # nobody is put off for nothing
                break
            if is_full:
                self._put_off_last(result)
            while not self._fits(live, self._running) and self._outranks(live):
                self._put_off_last(result)
            if not self._fits(live, self._running):
                break
            self._waiting.remove(live)
            self._enter(live, wanted, first, result)

    def _enter(self, live: Live, wanted: Tokens, first: Live | None, result: StepResult) -> None:
        n_cached, tokens = 0, live.tokens.tolist()
        if live.prompt_logprobs is not None and len(tokens) > 1:
            live.scored = ScoredPrompt(self._model, tokens, live.prompt_logprobs)
        else:
            live.prompt_logprobs = None
            n_cached, cached = self._beginning(live, wanted, first)
            self._rows.add(live.id, tokens, cached, n_cached, live.chooser, is_marked=live.reuses)
        live.n_joined = len(live.tokens)
        insort(self._running, live, key=order)
        if not live.has_started:
            live.has_started = True
            result.started.append((live.id, n_cached))

    def _first_of(self, live: Live) -> Live:
        """The first answer of its job that is still there, perhaps itself: the others go on from
        that."""
        job = [other for other in (*self._running, *self._waiting) if other.first == live.first]
        return min(job, key=order)

    def _is_through(self, first: Live, live: Live) -> bool:
        """The prompt is there for who goes on from it."""
        return first is live or (first in self._running and first.is_decoding)

    def _beginning(
        self, live: Live, wanted: Tokens, first: Live | None
    ) -> tuple[int, Cache | None]:
        """None, where it cannot be had."""
        try:
            return self._longest_beginning(live, wanted, first)
        except Exception as error:
            self._forget_all(error)
            return 0, None

    def _longest_beginning(
        self, live: Live, wanted: Tokens, first: Live | None
    ) -> tuple[int, Cache | None]:
        """The longest beginning of a prompt that is computed, of one that runs or that ended, or
        only of the first of its job. Never all of the prompt: the last token is computed for what
        follows it."""
        n_known = 0 if first else self._prompts.n_known(wanted)
        decoding = [first] if first else [other for other in self._running if other.is_decoding]
        source = max(decoding, key=lambda other: self._n_held(other, wanted), default=None)
        if source and self._n_held(source, wanted) > n_known:
            tokens, cache = self._rows.cache_of(source.id)
            n, begun = self._prompts.begin(live.id, source.id, tokens, cache, wanted)
            if n > n_known:
                return n, begun
        recalled = None if first else self._prompts.recall(live.id, wanted)
        return recalled or (0, None)

    def _n_held(self, live: Live, wanted: Tokens) -> int:
        return self._prompts.n_held(live.id, view(live.tokens), wanted)

    def _is_coming(self, wanted: Tokens) -> bool:
        """Somebody's prefill is on its way to a beginning of `wanted` that is worth waiting for."""
        prefilling = [live for live in self._running if not (live.is_decoding or live.scored)]
        coming = [(self._n_coming(live, wanted), live) for live in prefilling]
        n_coming, other = max(coming, key=lambda of: of[0], default=(0, None))
        if other is None or n_coming < WORTH_WAITING_FOR:
            return False
        settled = [self._n_held(live, wanted) for live in self._running if live.is_decoding]
        if n_coming < max(self._prompts.n_known(wanted), *settled, 0) + WORTH_WAITING_FOR:
            return False
        self._prompts.want(other.id, n_coming)
        return True

    def _n_coming(self, live: Live, wanted: Tokens) -> int:
        # the last token of a prompt is computed with what comes after it
        n = min(n_common(view(live.tokens), wanted), len(live.tokens) - 1)
        # without reuse there are no marks
        n_past = self._rows.n_past(live.id) if live.reuses else n
        return self._prompts.n_coming(live.id, n, n_past, len(live.tokens))

    def _fits(self, live: Live, beside: list[Live]) -> bool:
        """Each row of a batch takes as much memory as the longest one."""
        lengths = [len(other.tokens) for other in beside]
        n_most = max([*lengths, len(live.tokens)]) + 1
        return not beside or (len(lengths) + 1) * n_most <= self._spec.kv_tokens

    def _make_room(self, result: StepResult) -> None:
        """Put off the last of those that run, while the rows have grown too long."""
        while len(self._running) > 1:
            longest = max(len(live.tokens) for live in self._running)
            if len(self._running) * (longest + 1) <= self._spec.kv_tokens:
                break
            self._put_off_last(result)

    def _share_cells(self) -> None:
        """Those that no row takes are for prompts too: memory is set aside for them, and a long
        conversation may be more than all of the prompt cache."""
        if not self._prompts.is_off:
            longest = max((len(live.tokens) for live in self._running), default=0)
            n_free = max(self._spec.kv_tokens - len(self._running) * (longest + 1), 0)
            self._prompts.resize(self._spec.prefix_cache_bytes + n_free * self._cell_bytes)

    def _outranks(self, live: Live) -> bool:
        """Somebody who runs comes after it, and is put off without loss."""
        return bool(self._running) and live.rank < self._running[-1].rank

    def _put_off_last(self, result: StepResult) -> None:
        """Back to the queue, with its tokens. What mlx has chosen ahead is told now, since its
        chooser has gone on."""
        last = self._running[-1]
        try:
            untold = [] if last.scored else self._rows.untold(last.id)
        except Exception as error:
            result.failed.append((last.id, error))
            self._leave(last)
            return
        for token in untold:
            self._take(last, token, result)
        if last in self._running:
            self._leave(last)
            insort(self._waiting, last, key=order)

    def _leave(self, live: Live) -> None:
        """What is computed of it is remembered, as far as it is told."""
        self._running.remove(live)
        self._share_cells()
        if live.scored is not None:
            live.scored = None
        else:
            self._leave_rows(live)
        if not self._running:
            self._mx.clear_cache()

    def _leave_rows(self, live: Live) -> None:
        if not self._prompts.is_off:
            try:
                if self._said:
                    self._rows.retract(live.id, len(self._said))
                self._prompts.remember(live.id, *self._rows.cache_of(live.id))
            except Exception as error:
                self._forget_all(error)
        self._said.clear()
        self._rows.remove(live.id)

    def _forget_all(self, error: Exception) -> None:
        """Copying a row failed, mostly for want of memory. It would only have saved time."""
        logger.error("A row cannot be copied; all prompts are forgotten", exc_info=error)
        self._prompts.clear()
        self._mx.clear_cache()

    def _new_rows(self) -> Rows:
        return new_rows(self._model, self._spec.n_parallel, self._spec.n_batch, self._prompts)
