"""llama.cpp through llama-cpp-python's low-level binding: many sequences in one step."""

import ctypes
import logging
from array import array
from collections.abc import Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from engine.backends.base import CacheFull, Constraint, Engine, ReportProgress, Tokenizer
from engine.backends.llama_lanes import Lanes
from engine.backends.llama_memory import LlamaMemory
from engine.backends.llama_threads import ContextThreads
from engine.batch_engine import BatchEngine
from engine.prefix import Saved
from engine.sampling import Rules, logprobs
from engine.types import Batch, Chunk, Sampled, SamplingParams, Sequence
from engine.wire import LEAST_IN_LANES, LEAST_IN_PLAIN_LANES, PLAIN_TOKENS, WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("llama.cpp")

BLOCK, MIN_BLOCK = 256, 16  # cells that are saved at once. Without flash attention values lie
PLAIN_VALUES = 400_000  # transposed, and each is copied by itself where streams ran together
Row = tuple[Any, int]  # of logits that are wanted: a context, and the token's index in its batch
MIROSTAT_M = 100  # likeliest tokens that version 1 estimates from, as in the paper and llama.cpp


class Error(Exception):
    """A call into llama.cpp failed."""


def load(spec: WorkerSpec, progress: ReportProgress) -> Engine:
    decoder = LlamaDecoder(spec, progress)
    return BatchEngine(
        decoder,
        spec,
        n_ctx=min(spec.n_ctx, decoder.n_cells, decoder.n_ctx_train),
        n_cells=decoder.n_cells,
        n_batch=decoder.n_batch,
    )


class LlamaTokenizer:
    """A GGUF's vocabulary. llama.cpp's tokenizer may be called from any thread (llama.h)."""

    def __init__(self, model: Any) -> None:
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        wants_bos = lib.llama_vocab_get_add_bos(self._vocab)
        self.bos: int | None = lib.llama_vocab_bos(self._vocab) if wants_bos else None
        self._pieces: dict[int, bytes] = {}
        # SPM vocabularies put a space before a text
        first = self._call(b"a", parse_special=False)[:1]
        self._adds_space = any(self.piece(token)[:1] == b" " for token in first)

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        data = text.encode()
        ids = self._call(data, parse_special)
        if not parse_special and any(lib.llama_vocab_is_control(self._vocab, i) for i in ids):
            return self._spell(data)  # merges have put one together
        if continues and self._adds_space and ids and self.piece(ids[0])[:1] == b" ":
            ids[:1] = self._spell(self.piece(ids[0])[1:])
        return ids

    def piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, with_control=False)
        return piece

    def literal(self, token: int) -> bytes:
        return self.piece(token) or self._read_piece(token, with_control=True)

    def ends_generation(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def ends(self) -> list[int]:
        """Every token that ends a generation."""
        return [token for token in range(self.n_vocab) if self.ends_generation(token)]

    def _call(self, data: bytes, parse_special: bool) -> list[int]:
        n_room = len(data) + 16
        while True:
            ids = (lib.llama_token * n_room)()
            n = lib.llama_tokenize(self._vocab, data, len(data), ids, n_room, False, parse_special)
            if n >= 0:
                return list(ids[:n])
            n_room = -n  # a character can be many tokens: llama.cpp says how many

    @cached_property
    def _ordinary(self) -> dict[bytes, int]:
        """Ids of ordinary tokens by piece. Those of single bytes are the last resort."""
        ids: dict[bytes, int] = {}
        for mask in (lib.LLAMA_TOKEN_ATTR_NORMAL, lib.LLAMA_TOKEN_ATTR_BYTE):
            for token in range(self.n_vocab):
                if lib.llama_vocab_get_attr(self._vocab, token) & mask:
                    ids.setdefault(self.piece(token), token)
        return ids

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ordinary))

    def _spell(self, data: bytes) -> list[int]:
        """Ids of ordinary tokens whose pieces join to exactly `data`, longest first."""
        ids, at = [], 0
        while at < len(data):
            ends = range(min(at + self._longest, len(data)), at, -1)
            end = next((end for end in ends if data[at:end] in self._ordinary), at)
            if end == at:
                raise Error(f"the vocabulary has no token for {data[at : at + 1]!r}")
            ids.append(self._ordinary[data[at:end]])
            at = end
        return ids

    def _read_piece(self, token: int, *, with_control: bool) -> bytes:
        n_room = 64
        while True:
            buffer = ctypes.create_string_buffer(n_room)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, n_room, 0, with_control)
            if n >= 0:
                return buffer.raw[:n]
            n_room = -n


class LlamaDecoder:
    """Implements `engine.backends.base.Decoder`: a model, its contexts and one reused batch."""

    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        self._log = LlamaLog()
        self._model = load_model(spec, progress, self._log)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        is_flash = spec.flash_attention or has_gpu(spec)
        if is_flash and not spec.flash_attention:
            key = f"{spec.name.upper()}_FLASH_ATTENTION"
            logger.warning("%s=false is for CPUs, and does nothing with a GPU", key)
        new_context = partial(_new_context, self._model, spec, is_flash=is_flash)
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
        is_cells = not (
            lib.llama_model_is_recurrent(self._model)
            or lib.llama_model_is_hybrid(self._model)
            or lib.llama_model_n_swa(self._model) > 0
        )
        block = BLOCK if is_flash else _plain_block(self._model)
        self._threads = ContextThreads(self._context, spec.n_threads)
        home = LlamaMemory(self._context, spec.n_parallel, is_cells=is_cells, block=block)
        self._memory: LlamaMemory | Lanes = home
        self._lanes: Lanes | None = None
        if spec.lane_tokens and is_cells and not has_gpu(spec):
            n_ctx = spec.n_parallel * spec.lane_tokens
            new_lanes = partial(
                new_context, n_ctx=n_ctx, n_seq_max=spec.n_parallel, is_unified=False
            )
            least = LEAST_IN_LANES if is_flash else LEAST_IN_PLAIN_LANES
            self._memory = self._lanes = Lanes(
                home, spec.n_parallel, spec.lane_tokens, new_lanes, self._threads, least
            )
        self.is_cells, self.block = is_cells, block
        self.n_cells: int = lib.llama_n_ctx(self._context)
        self.n_batch: int = lib.llama_n_batch(self._context)
        self._llama_tokenizer = LlamaTokenizer(self._model)
        self.tokenizer: Tokenizer = self._llama_tokenizer
        vocab = lib.llama_model_get_vocab(self._model)
        self._dry = lru_cache(maxsize=8)(partial(_Dry, vocab))
        self._batch = _BatchArrays(self.n_batch)
        self._rows: list[Row] = []  # of the last batch
        self._row: Any = ctypes.c_float * self.tokenizer.n_vocab  # of logits

    def close(self) -> None:
        if self._lanes:
            self._lanes.close()
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)

    # memory

    def truncate(self, slot: int, n_tokens: int) -> bool:
        return self._memory.truncate(slot, n_tokens)

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        self._memory.share(source, slot, n_tokens)

    def save(self, slot: int, start: int, end: int) -> Saved | None:
        return self._memory.save(slot, start, end)

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        return self._memory.load(slot, saved, start, end)

    def clear(self, slot: int) -> None:
        self._memory.clear(slot)

    # decoding

    def decode(self, batch: Batch) -> None:
        # flash attention adds up a long context in as many parts as there are threads, and some
        # kernels take rows in pairs, as they fall to the threads
        is_alone = len(batch.chunks) == 1
        is_steady = is_alone and not batch.chunks[0].sequence.reuses
        in_lanes = self._lanes.choose(batch) if self._lanes else {}
        slots = {chunk.slot for chunk in in_lanes.values()}
        at_home = {chunk.slot: chunk for chunk in batch.chunks if chunk.slot not in slots}
        rows: dict[int, list[Row]] = {}
        with self._threads.step(is_steady=is_steady):
            if at_home:  # first: only there may cells be missing, and then nothing is computed
                rows |= self._compute(self._context, at_home)
            if self._lanes and in_lanes:
                rows |= self._compute(self._lanes.context, in_lanes)
        self._rows = [row for chunk in batch.chunks for row in rows[chunk.slot]]

    def _compute(self, context: Any, chunks: dict[int, Chunk]) -> dict[int, list[Row]]:
        """Compute chunks by sequence of a context. Rows by slot."""
        wanted = self._batch.fill(chunks)
        status = lib.llama_decode(context, self._batch.batch)
        if status == 1 and context is self._context:
            raise CacheFull
        if status != 0:
            raise Error(f"llama_decode returned {status}")
        # or a GPU's work would be missing in the step's time
        lib.llama_synchronize(context)
        return {
            chunk.slot: [(context, index) for index in indices]
            for chunk, indices in zip(chunks.values(), wanted, strict=True)
        }

    def sampler(self, sampling: SamplingParams, prompt: list[int]) -> "LlamaSampler":
        ends = self._llama_tokenizer.ends if sampling.ignore_eos or sampling.min_tokens else []
        return LlamaSampler(sampling, prompt, ends, self._new_chain(sampling, prompt))

    def _new_chain(self, sampling: SamplingParams, prompt: list[int]) -> Any:
        """llama.cpp's samplers in the order of its server; None where the likeliest token is all
        that is wanted."""
        has_dry = sampling.dry_multiplier > 0 and sampling.dry_penalty_last_n != 0
        if sampling.is_greedy and not has_dry and sampling.xtc_probability == 0:
            return None
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        add = partial(lib.llama_sampler_chain_add, chain)
        # llama.cpp draws its own seed for 0xFFFFFFFF
        seed = sampling.seed if sampling.seed != 0xFFFFFFFF else 0x9E3779B9
        if has_dry:
            add(self._new_dry(sampling, prompt))
        if sampling.mirostat and not sampling.is_greedy:
            tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
            add(lib.llama_sampler_init_temp(sampling.temperature))
            if sampling.mirostat == 1:
                n_vocab = self.tokenizer.n_vocab
                add(lib.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, MIROSTAT_M))
            else:
                add(lib.llama_sampler_init_mirostat_v2(seed, tau, eta))
            return chain
        if sampling.top_k > 0:
            add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            add(lib.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.xtc_probability > 0:
            probability, threshold = sampling.xtc_probability, sampling.xtc_threshold
            add(lib.llama_sampler_init_xtc(probability, threshold, 1, seed))
        if sampling.is_greedy:
            add(lib.llama_sampler_init_greedy())
        else:
            add(lib.llama_sampler_init_temp(sampling.temperature))
            add(lib.llama_sampler_init_dist(seed))
        return chain

    def _new_dry(self, sampling: SamplingParams, prompt: list[int]) -> Any:
        asked = sampling.dry_penalty_last_n
        last_n = self.n_cells if asked < 0 else min(asked, self.n_cells)
        sampler = self._dry(
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            last_n,
            sampling.dry_sequence_breakers,
        ).copy()
        for token in prompt[-last_n:]:
            lib.llama_sampler_accept(sampler, token)
        return sampler

    def sample(self, row: int, sequence: Sequence) -> Sampled:
        context, index = self._rows[row]
        logits = lib.llama_get_logits_ith(context, index)
        view = np.frombuffer(self._row.from_address(ctypes.addressof(logits.contents)), np.float32)
        sampler: LlamaSampler = sequence.sampler
        return sampler.sample(context, index, view, sequence.constraint)


class LlamaSampler:
    """How one sequence chooses: penalties, then argmax or a chain of llama.cpp's samplers, which
    it owns."""

    def __init__(
        self, sampling: SamplingParams, prompt: list[int], ends: list[int], chain: Any
    ) -> None:
        self._chain = chain
        self._n_logprobs = sampling.n_logprobs
        self._rules = Rules(sampling, prompt, ends)

    def sample(
        self,
        context: Any,
        index: int,
        logits: npt.NDArray[np.float32],
        constraint: Constraint | None,
    ) -> Sampled:
        raw = logits
        if self._n_logprobs is not None and self._rules.change(constraint):
            raw = logits.copy()
        self._rules.apply(logits, constraint)
        if self._chain is None:
            token = int(logits.argmax())
        else:
            token = lib.llama_sampler_sample(self._chain, context, index)
            if logits[token] == -np.inf:  # XTC and DRY may leave only what is forbidden
                token = int(logits.argmax())
        self._rules.accept(token, constraint)
        if self._n_logprobs is None:
            return Sampled(token)
        return Sampled(token, *logprobs(raw, token, self._n_logprobs))

    def __del__(self) -> None:
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)


class _Dry:
    """A DRY sampler to be copied. Making one searches the vocabulary for what holds a breaker, and
    takes 10 ms for 50,000 tokens."""

    def __init__(
        self,
        vocab: Any,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: tuple[str, ...],
    ) -> None:
        texts = (ctypes.c_char_p * len(breakers))(*(text.encode() for text in breakers))
        self._sampler = lib.llama_sampler_init_dry(
            vocab, multiplier, base, allowed_length, last_n, texts, len(breakers)
        )

    def copy(self) -> Any:
        return lib.llama_sampler_clone(self._sampler)

    def __del__(self) -> None:
        lib.llama_sampler_free(self._sampler)


class _BatchArrays:
    """The arrays behind a llama_batch, allocated once and filled as slices."""

    def __init__(self, n_batch: int) -> None:
        self._token = np.zeros(n_batch, dtype=np.int32)
        self._pos = np.zeros(n_batch, dtype=np.int32)
        self._sequence = np.zeros(n_batch, dtype=np.int32)
        self._wanted = np.zeros(n_batch, dtype=np.int8)
        self._n_seq_id = np.ones(n_batch, dtype=np.int32)
        # llama_batch.seq_id holds, for each token, the address of its list of sequences: one here
        self._seq_id = self._sequence.ctypes.data + self._sequence.itemsize * np.arange(
            n_batch, dtype=np.uintp
        )
        self.batch = lib.llama_batch(
            token=pointer(self._token, "token"),
            pos=pointer(self._pos, "pos"),
            n_seq_id=pointer(self._n_seq_id, "n_seq_id"),
            seq_id=pointer(self._seq_id, "seq_id"),
            logits=pointer(self._wanted, "logits"),
        )

    def fill(self, chunks: dict[int, Chunk]) -> list[range]:
        """Chunks by the sequences they are for. The indices of each one's wanted logits."""
        wanted = []
        tokens, positions, sequences = array("i"), array("i"), array("i")
        for sequence, chunk in chunks.items():
            at = len(tokens)
            tokens += chunk.tokens
            n = len(tokens) - at
            positions.extend(range(chunk.start, chunk.start + n))
            sequences += array("i", [sequence]) * n
            wanted.append(range(at + chunk.n_tokens - 1 if chunk.wants_logits else at + n, at + n))
        n = len(tokens)
        self._token[:n], self._pos[:n], self._sequence[:n] = tokens, positions, sequences
        self._wanted[:n] = 0
        for indices in wanted:
            self._wanted[indices.start : indices.stop] = 1
        self.batch.n_tokens = n
        return wanted


def pointer(array: "npt.NDArray[Any]", field: str) -> Any:
    return array.ctypes.data_as(dict(lib.llama_batch._fields_)[field])


def load_model(
    spec: WorkerSpec, progress: ReportProgress, log: "LlamaLog", metadata: Mapping[str, bool] = {}
) -> Any:
    """A model; `metadata` is read in place of what the file says."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = spec.n_gpu_layers
    overrides = (lib.llama_model_kv_override * (len(metadata) + 1))()  # an empty key ends it
    for override, (key, value) in zip(overrides, metadata.items(), strict=False):
        override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
        override.key = key.encode()
        override.value.val_bool = value
    if metadata:
        params.kv_overrides = overrides

    @lib.llama_progress_callback  # type: ignore[untyped-decorator]
    def go_on(fraction: float, _: Any) -> bool:
        progress(fraction)
        return True

    params.progress_callback = go_on
    model = lib.llama_model_load_from_file(spec.model_path.encode(), params)
    if not model:
        raise ModelLoadFailed(f"llama.cpp cannot load {name_of(spec)}: {reason_of(spec, log)}.")
    return model


def has_gpu(spec: WorkerSpec) -> bool:
    return spec.n_gpu_layers != 0 and lib.llama_supports_gpu_offload()


def _plain_block(model: Any) -> int:
    n_head = max(lib.llama_model_n_head(model), 1)
    n_values: int = lib.llama_model_n_head_kv(model) * lib.llama_model_n_embd(model) // n_head
    n_values *= lib.llama_model_n_layer(model)
    return max(MIN_BLOCK, min(BLOCK, PLAIN_VALUES // max(n_values, 1)))


def _new_context(
    model: Any, spec: WorkerSpec, *, n_ctx: int, n_seq_max: int, is_flash: bool, is_unified: bool
) -> Any | None:
    """A context, in which sequences share their cells if it is unified; None where that fails."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, n_seq_max, is_unified
    # a context aborts that has more sequences than a batch has tokens
    n_batch = max(min(spec.n_batch, n_ctx), spec.n_parallel + 1)
    params.n_batch = params.n_ubatch = n_batch
    if not is_flash:
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if not is_flash or not is_unified:
        # scores for all cells lie in memory, so of fewer tokens at once, which take no longer; and
        # what is no prompt has no more
        params.n_ubatch = min(n_batch, max(PLAIN_TOKENS, n_seq_max))
    params.n_threads = params.n_threads_batch = spec.n_threads
    return lib.llama_init_from_model(model, params) or None


def name_of(spec: WorkerSpec) -> str:
    return Path(spec.model_path).name


def reason_of(spec: WorkerSpec, log: "LlamaLog") -> str:
    """Why llama.cpp failed, without the folder of the file: clients read it."""
    return (log.reason or "it gives no reason").replace(spec.model_path, name_of(spec))


class LlamaLog:
    """Sends llama.cpp's log to `logging`, and remembers the reason of a failure."""

    # ggml.h: 1 debug, 2 info, 3 warning, 4 error, 5 goes on with the line before
    LEVELS: ClassVar = {3: logging.WARNING, 4: logging.ERROR}  # its info is chatter: DEBUG
    KNOWN = (
        "possible training context overflow",  # cells are for all; we bound each one's length
        "model default pooling_type is",  # we pool ourselves
        "model vocab missing newline token",  # encoders need none
    )

    _in_use: ClassVar[Any] = None  # of the process: llama.cpp may call it at any time from now on

    def __init__(self) -> None:
        self.is_muted = False  # while what it says is of our doing
        self.reason: str | None = None  # the first error; the later ones only say that it failed
        LlamaLog._in_use = lib.llama_log_callback(self._write)
        lib.llama_log_set(LlamaLog._in_use, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").rstrip()
        if not line.strip("."):
            return
        if self.is_muted or any(known in line for known in self.KNOWN):
            level = 2
        logger.log(self.LEVELS.get(level, logging.DEBUG), line)
        if level == 4 and self.reason is None:
            self.reason = line.rpartition("error loading model: ")[2]
