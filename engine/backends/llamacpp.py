"""llama.cpp through llama-cpp-python's low-level binding: many sequences in one step."""

import ctypes
import logging
import time
from array import array
from collections.abc import Sequence as Sequence_
from functools import lru_cache, partial
from typing import Any

import llama_cpp as lib
import msgspec
import numpy as np
import numpy.typing as npt

from engine.backends.base import CacheFull, CellsLost, Engine, Memory, ReportProgress, Tokenizer
from engine.backends.llama_lanes import Lanes, Place
from engine.backends.llama_memory import LlamaMemory, Window, cut, sees_all
from engine.backends.llama_model import (
    Error,
    LlamaLog,
    has_gpu,
    load_model,
    meta_text,
    name_of,
    pointer,
    reason_of,
)
from engine.backends.llama_sampling import LlamaSampler, Samplers
from engine.backends.llama_threads import ABORTED, ContextThreads
from engine.backends.llama_tokenizer import LlamaTokenizer
from engine.batch_engine import BatchEngine
from engine.drawing import RowSampler
from engine.llama_limits import LEAST_IN_LANES, LEAST_IN_PLAIN_LANES, PLAIN_TOKENS
from engine.rounding import Rounding
from engine.sampling import scored
from engine.types import MOST_GUESSES, Batch, Chunk, Sampled, SamplingParams, Sequence
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("llama.cpp")

NO_ROOM = 1  # what llama_decode returns without cells for a batch
GROUPS = 4, 8, 16  # rows that kernels take at once
BLOCK, MIN_BLOCK = 256, 16  # cells that are saved at once. Without flash attention values lie
PLAIN_VALUES = 400_000  # transposed, and each is copied by itself where streams ran together
Logits = npt.NDArray[np.float32]  # of a token, for each that may follow
Row = tuple[Any, int, Logits]  # a context, a token's index in its batch, and what came of it


def load(spec: WorkerSpec, progress: ReportProgress) -> Engine:
    decoder = LlamaDecoder(spec, progress)
    return BatchEngine(
        decoder,
        msgspec.structs.replace(spec, n_parallel=decoder.n_parallel),
        n_ctx=min(spec.n_ctx, decoder.n_cells, decoder.n_ctx_train),
        n_cells=decoder.n_cells,
        n_batch=decoder.n_batch,
    )


class LlamaDecoder:
    """Implements `engine.backends.base.Decoder`: a model, its contexts and one reused batch."""

    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        self._log = LlamaLog()
        self._model = load_model(spec, progress, self._log)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        self._has_gpu = has_gpu(spec)
        is_flash = spec.flash_attention or self._has_gpu
        if is_flash and not spec.flash_attention:
            key = f"{spec.name.upper()}_FLASH_ATTENTION"
            logger.warning("%s=false is for CPUs, and does nothing with a GPU", key)
        architecture = meta_text(self._model, "general.architecture")
        n_swa: int = lib.llama_model_n_swa(self._model)
        window = Window(n_swa, is_chunked=architecture == "llama4") if n_swa > 0 else None
        is_deepseek4 = architecture == "deepseek4"  # which has windows too, and does not tell
        has_states = is_deepseek4 or lib.llama_model_is_recurrent(self._model)
        has_states = has_states or lib.llama_model_is_hybrid(self._model)
        # Where llama.cpp computes a step in parts, behind a window the first of them may miss cells
        # that it has given to a later one. So there steps are no larger than a part, and with
        # states, which have tokens of several sequences in parts, they are one sequence's.
        if has_states and (is_deepseek4 or window):
            if spec.n_parallel > 1:
                logger.info("%s is computed for one request at a time", name_of(spec))
            n_ctx = min(spec.n_ctx, spec.kv_tokens)
            spec = msgspec.structs.replace(spec, n_parallel=1, kv_tokens=n_ctx)
        self.n_parallel = spec.n_parallel
        self._window = None if has_states else window  # that can be looked at
        has_parts = not (window or is_deepseek4)
        new_context = partial(
            _new_context, self._model, spec, is_flash=is_flash, has_parts=has_parts
        )
        # beyond the length it was trained on a model's answers are noise, and encoders abort
        n_ctx = max(min(spec.n_ctx, self.n_ctx_train), spec.kv_tokens)
        # the scratch sequence comes after those of the slots
        self._context = new_context(n_ctx=n_ctx, n_seq_max=spec.n_parallel + 1, is_unified=True)
        if not self._context:
            raise ModelLoadFailed(
                f"llama.cpp cannot make a context of {n_ctx} tokens for {name_of(spec)}:"
                f" {reason_of(spec, self._log)}."
            )
        if not lib.llama_get_memory(self._context):
            raise ModelLoadFailed(f"{name_of(spec)} is an encoder; it cannot generate text.")
        # behind a sliding window llama.cpp uses cells again, and does not tell; parts of a
        # recurrent memory it takes for cells: answers would be wrong
        is_cells = not (has_states or window)
        takes_back = self.can_round = not has_states
        # states cannot be taken back, and GPUs are not asked
        breaks_off = takes_back and not self._has_gpu
        self._threads = ContextThreads(self._context, spec.n_threads, breaks_off=breaks_off)
        self.n_cells: int = lib.llama_n_ctx(self._context)
        self.n_batch: int = lib.llama_n_batch(self._context)
        n_windows = n_swa * (spec.n_parallel + 1) + self.n_batch
        home = LlamaMemory(
            self._context,
            spec.n_parallel,
            is_cells=is_cells,
            takes_back=takes_back,
            # slots of DeepSeek V4 can only be copied whole, and in a step of their own
            can_mark=not (is_cells or is_deepseek4),
            shares_cells=n_swa == 0 or n_windows <= self.n_cells,
            block=BLOCK if is_flash else _plain_block(self._model),
            window=self._window,
        )
        self.memory: Memory = home
        self._lanes: Lanes | None = None
        if spec.lane_tokens and is_cells and not self._has_gpu:
            n_ctx = spec.n_parallel * spec.lane_tokens
            new_lanes = partial(
                new_context, n_ctx=n_ctx, n_seq_max=spec.n_parallel, is_unified=False
            )
            least = LEAST_IN_LANES if is_flash else LEAST_IN_PLAIN_LANES
            self.memory = self._lanes = Lanes(
                home, spec.n_parallel, spec.lane_tokens, new_lanes, self._threads, least
            )
        tokenizer = LlamaTokenizer(self._model)
        self.tokenizer: Tokenizer = tokenizer
        self._samplers = Samplers(self._model, tokenizer, self.n_cells)
        self._batch = _BatchArrays(self.n_batch)
        self._at_home, self._in_lanes = Rounding(*GROUPS), Rounding(*GROUPS)
        # with logits, at most
        self._n_rows = min(self.n_batch, spec.n_parallel * (MOST_GUESSES + 1))
        scratch = spec.n_parallel
        self._spare = [(scratch, at) for at in range(self._n_rows)]
        self._rows: list[Row] = []  # of the last batch

    def close(self) -> None:
        self._threads.close()
        if self._lanes:
            self._lanes.close()
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)

    def decode(self, batch: Batch) -> None:
        # flash attention adds up a long context in as many parts as there are threads, and some
        # kernels take rows in pairs, as they fall to the threads
        in_lanes = self._lanes.choose(batch) if self._lanes else {}
        slots = {chunk.slot for chunk in in_lanes.values()}
        at_home = {chunk.slot: chunk for chunk in batch.chunks if chunk.slot not in slots}
        rows: dict[int, list[Row]] = {}
        is_steady = batch.is_steady
        can_round = self.can_round and not is_steady
        depth = batch.n_held.bit_length()
        with self._threads.step(batch.n_tokens, batch.n_held, is_steady=is_steady):
            if at_home:  # first: only there may cells be missing, and then nothing is computed
                spare = self._spare if can_round and _are_alike(at_home) else ()
                rows |= self._compute(self._context, at_home, self._at_home, spare, depth)
            if self._lanes and in_lanes:
                spare = self._lanes.spare(in_lanes) if can_round else ()
                rows |= self._compute(self._lanes.context, in_lanes, self._in_lanes, spare, depth)
        self._rows = [row for chunk in batch.chunks for row in rows[chunk.slot]]

    def _compute(
        self,
        context: Any,
        chunks: dict[int, Chunk],
        rounding: Rounding,
        spare: Sequence_[Place],
        depth: int,
    ) -> dict[int, list[Row]]:
        """Compute chunks by sequence of a context, and as many of the spare places beside them as
        make it faster. Rows by slot."""
        wanted = self._batch.fill(chunks)
        n, n_threads = self._batch.batch.n_tokens, self._threads.n
        n_most = min(n + len(spare), self._n_rows)
        n_rows = rounding.n_rows(n, n_most, n_threads, depth) if spare else n
        started_at = time.perf_counter()
        status = self._run(context, chunks, spare[: n_rows - n])
        if status == NO_ROOM and context is self._context:
            raise CacheFull
        if status != 0:
            raise Error(f"llama_decode returned {status}")
        if self._has_gpu:  # or its work would be missing in the step's time
            lib.llama_synchronize(context)
        # not what was computed anew, without them or with fewer threads
        if spare and (self._batch.batch.n_tokens, self._threads.n) == (n_rows, n_threads):
            rounding.took(time.perf_counter() - started_at, n, n_rows, n_threads, depth)
        logits = iter(self._logits(context, sum(map(len, wanted))))
        return {
            chunk.slot: [(context, index, next(logits)) for index in indices]
            for chunk, indices in zip(chunks.values(), wanted, strict=True)
        }

    def _run(self, context: Any, chunks: dict[int, Chunk], spare: Sequence_[Place]) -> int:
        """Compute the batch and rows in spare places; where that fails it is computed without
        them. What llama_decode returned."""
        memory, batch = lib.llama_get_memory(context), self._batch.batch
        self._batch.add(spare)
        status: int = lib.llama_decode(context, batch)
        if spare:
            for sequence in dict(spare):
                lib.llama_memory_seq_rm(memory, sequence, -1, -1)
            if status != 0:
                batch.n_tokens -= len(spare)
            if status == NO_ROOM:
                status = lib.llama_decode(context, batch)
        while status == ABORTED:
            self._threads.fewer()
            logger.info("a step waits for a core that others use, and is computed anew")
            for sequence, chunk in chunks.items():  # what was computed of it
                if not cut(memory, sequence, chunk.start, self._window):
                    raise CellsLost
            status = lib.llama_decode(context, batch)
        if status == 0 and self._window:  # llama.cpp tries parts where cells are short
            for sequence, chunk in chunks.items():
                if not sees_all(memory, sequence, chunk.start, self._window):
                    raise CellsLost
        return status

    def _logits(self, context: Any, n_rows: int) -> Sequence_[Logits]:
        """All that the last batch wanted, in its order, until the next one is computed."""
        if not n_rows:
            return ()
        first = lib.llama_get_logits(context)
        return _rows_at(ctypes.addressof(first.contents), n_rows, self.tokenizer.n_vocab)

    def sampler(self, sampling: SamplingParams, prompt: list[int]) -> LlamaSampler | RowSampler:
        return self._samplers.new(sampling, prompt)

    def sample(self, row: int, sequence: Sequence) -> Sampled:
        context, index, logits = self._rows[row]
        sampler: LlamaSampler | RowSampler = sequence.sampler
        if isinstance(sampler, RowSampler):
            return sampler.choose(logits, sequence.constraint)
        return sampler.sample(context, index, logits, sequence.constraint)

    def score(self, row: int, token: int, n_top: int) -> Sampled:
        return scored(self._rows[row][2], token, n_top)


class _BatchArrays:
    """The arrays behind a llama_batch, allocated once and filled as slices."""

    def __init__(self, n_batch: int) -> None:
        token, pos, sequence = (np.zeros(n_batch, np.int32) for _ in range(3))
        wanted = np.zeros(n_batch, np.int8)
        # llama_batch.seq_id holds, for each token, the address of its list of sequences: one here
        self._seq_id = sequence.ctypes.data + sequence.itemsize * np.arange(n_batch, dtype=np.uintp)
        self._n_seq_id = np.ones(n_batch, dtype=np.int32)
        self.batch = lib.llama_batch(
            token=pointer(token, "token"),
            pos=pointer(pos, "pos"),
            n_seq_id=pointer(self._n_seq_id, "n_seq_id"),
            seq_id=pointer(self._seq_id, "seq_id"),
            logits=pointer(wanted, "logits"),
        )
        # numpy itself takes longer to set a few numbers
        self._token, self._pos, self._sequence = token.data, pos.data, sequence.data
        self._wanted = wanted.data

    def fill(self, chunks: dict[int, Chunk]) -> list[range]:
        """Chunks by the sequences they are for. The indices of each one's wanted logits."""
        wanted, at = [], 0
        for sequence, chunk in chunks.items():
            tokens = chunk.tokens
            n, end = len(tokens), at + len(tokens)
            n_wanted = chunk.n_wanted + n - chunk.n_tokens
            self._token[at:end] = tokens
            self._pos[at:end] = array("i", range(chunk.start, chunk.start + n))
            self._sequence[at:end] = array("i", [sequence]) * n
            self._wanted[at:end] = array("b", [0]) * (n - n_wanted) + array("b", [1]) * n_wanted
            wanted.append(range(end - n_wanted, end))
            at = end
        self.batch.n_tokens = at
        return wanted

    def add(self, spare: Sequence_[Place]) -> None:
        """Rows that nobody wants, behind all others. Their logits are computed, for the same
        reason."""
        for at, (sequence, position) in enumerate(spare, self.batch.n_tokens):
            self._token[at] = 0
            self._pos[at] = position
            self._sequence[at] = sequence
            self._wanted[at] = 1
        self.batch.n_tokens += len(spare)


def _are_alike(chunks: dict[int, Chunk]) -> bool:
    """None of them has a prompt, so other steps with as many tokens take as long."""
    return all(chunk.n_tokens == 1 for chunk in chunks.values())


@lru_cache(maxsize=64)  # most steps have as many as those before, at the same place
def _rows_at(address: int, n_rows: int, n_vocab: int) -> Sequence_[Logits]:
    """Rows of numbers in llama.cpp's memory."""
    numbers: Any = (ctypes.c_float * (n_rows * n_vocab)).from_address(address)
    return tuple(np.frombuffer(numbers, np.float32).reshape(n_rows, n_vocab))


def _plain_block(model: Any) -> int:
    n_head = max(lib.llama_model_n_head(model), 1)
    n_values: int = lib.llama_model_n_head_kv(model) * lib.llama_model_n_embd(model) // n_head
    n_values *= lib.llama_model_n_layer(model)
    return max(MIN_BLOCK, min(BLOCK, PLAIN_VALUES // max(n_values, 1)))


def _new_context(
    model: Any, spec: WorkerSpec, *, n_ctx: int, n_seq_max: int, is_flash: bool, is_unified: bool,
    has_parts: bool,
) -> Any | None:  # fmt: skip
    """A context, in which sequences share their cells if it is unified, and a batch may be computed
    in parts; None where that fails."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_seq_max, is_unified
    # a context aborts that has more sequences than a batch has tokens
    n_batch = max(min(spec.n_batch, n_ctx), spec.n_parallel + 1)
    params.n_batch = params.n_ubatch = n_batch
    params.swa_full = False  # behind a sliding window there are cells for the windows only
    if not is_flash:
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if not is_flash or not is_unified:
        # scores for all cells lie in memory, so of fewer tokens at once, which take no longer; and
        # what is no prompt has no more
        params.n_ubatch = min(n_batch, max(PLAIN_TOKENS, n_seq_max))
        if not has_parts:
            n_batch = params.n_batch = params.n_ubatch
    # rows of logits for which there is room, which else are as many as a batch has tokens; to want
    # more ends the process
    params.n_outputs_max = min(n_batch, n_seq_max + spec.n_parallel * MOST_GUESSES)
    params.n_threads = params.n_threads_batch = spec.n_threads
    return lib.llama_init_from_model(model, params) or None
