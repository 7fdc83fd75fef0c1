"""Encoders and cross-encoders through llama.cpp's low-level binding: a call for many sequences.

llama.cpp ends the process where a batch has more tokens than a physical one, or a sequence more
than the model has positions; so everything is checked here before it is called.
"""

import ctypes
import logging
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from engine.backends.base import (
    MAX_SEQUENCES,
    Encoder,
    Floats,
    Ids,
    Interrupted,
    ReportProgress,
    Specials,
    Tokenizer,
    check_batch,
)
from engine.backends.llama_model import (
    Error,
    LlamaLog,
    has_gpu,
    load_model,
    name_of,
    pointer,
    reason_of,
)
from engine.backends.llama_threads import ContextThreads
from engine.backends.llama_tokenizer import LlamaTokenizer
from engine.heads import heads_of
from engine.llama_limits import DECODER_STEP
from engine.machine import available_bytes
from engine.model_file import ENCODERS, Header, open_header
from engine.rounding import Rounding
from engine.types import Pooling, Scale
from engine.wire import EncoderSpec, WorkerSpec
from errors import InsufficientMemory, ModelLoadFailed

logger = logging.getLogger("llama.cpp")

MAX_SPARE_BYTES = 1 << 29  # of room for outputs beyond what a batch needs
SPARE_TOKENS = 128  # the same where its pages cannot be given back
MAX_ROW_BYTES = 1 << 24  # then pages are given back
TILE, N_ALIKE = 64, 8  # tokens that flash attention takes at once; and that make no difference
OUT_OF_MEMORY = -2  # what llama_encode returns
_POOLINGS: dict[int, Pooling] = {
    lib.LLAMA_POOLING_TYPE_CLS: "cls",
    lib.LLAMA_POOLING_TYPE_MEAN: "mean",
    lib.LLAMA_POOLING_TYPE_LAST: "last",
}
ENCODER_TOKENIZERS = ("bert", "t5")
_KEEPS_SPACES = "tokenizer.ggml.remove_extra_whitespaces"
_LOWERS = "tokenizer.ggml.normalizer.lowercase"  # accents are stripped or kept as it says
N_CAPITALS = 10  # letters that are pieces: WordPiece has all that were in its texts
_SEES_ALL = ("llama-embed",)  # attends without a cache (llama_model_llama::graph), and says nothing
_PROBABILITIES = ("qwen3", "qwen3vl")  # llama.cpp makes a softmax of their yes and no


class OutOfMemory(Error):
    """llama.cpp could not allocate what it needed."""


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return LlamaEncoder(spec, progress)


class EncoderTokenizer(LlamaTokenizer):
    """In a BERT unknown words are a control token, and few encoders have bytes to spell with."""

    def __init__(self, model: Any, facts: "_Facts") -> None:
        super().__init__(model)
        self._facts = facts

    def _spell(self, data: bytes) -> list[int]:
        """For texts with control tokens in them, though these were not to be recognised: they are
        left out where they cannot be spelled."""
        if not self._facts.is_encoder:
            with suppress(ValueError):
                return super()._spell(data)
        return [
            token
            for token in self._call(data, parse_special=False)
            if token == self._facts.unknown or not self._is_control(token)
        ]


class LlamaEncoder:
    """Implements `engine.backends.base.Encoder`: a model, its context and one reused batch."""

    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        assert spec.encoder is not None
        self._log = LlamaLog()
        path = Path(spec.model_path)
        facts = _Facts(path)
        if spec.encoder.kind == "reranker" and not facts.has_head:
            raise ModelLoadFailed(
                f"{path.name} has no head that scores pairs (no cls.output in it); take another "
                "conversion of the model."
            )
        if spec.encoder.kind == "reranker" and facts.has_segments:
            raise ModelLoadFailed(
                f"{path.name} marks query and document by token types, which llama.cpp leaves out: "
                "its scores would be wrong. Serve the model's original folder with "
                f"{spec.name.upper()}_BACKEND=mlx, onnx or flag, or take another model, such as "
                "bge-reranker-v2-m3."
            )
        if spec.encoder.kind == "reranker" and facts.is_distilbert:
            raise ModelLoadFailed(
                f"{path.name} is a DistilBERT, whose head llama.cpp computes by another function "
                "(tanh for ReLU): its scores would be wrong. Take another model, such as "
                "bge-reranker-v2-m3."
            )
        if spec.encoder.kind == "reranker" and facts.n_classes > 1:
            raise ModelLoadFailed(
                f"{path.name} tells {facts.n_classes} classes apart, where a reranker gives one "
                "score; take another model."
            )
        self.heads, self.missing_heads = heads_of(path, facts.n_embd, spec.encoder)
        self._model = load_model(spec, progress, self._log, facts.overrides)
        self._context: Any = None
        try:
            self._open(spec, spec.encoder, facts)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: WorkerSpec, encoder: EncoderSpec, facts: "_Facts") -> None:
        ranks = encoder.kind == "reranker"
        self.n_ctx = min(spec.n_ctx, int(lib.llama_model_n_ctx_train(self._model)))
        self.n_tokens = max(self.n_ctx, encoder.batch_tokens)
        may_split = not facts.is_encoder and facts.is_causal
        self._step = min(self.n_tokens, DECODER_STEP) if may_split else self.n_tokens
        # a context that has more sequences than a batch has tokens ends the process, too
        self.n_sequences = min(MAX_SEQUENCES, self._step)
        self._context = self._new_context(spec, encoder, facts)
        self._threads = ContextThreads(self._context, spec.n_threads)
        self._rounding = Rounding(TILE, n_alike=N_ALIKE)
        self._memory = lib.llama_get_memory(self._context)
        # of cells nothing is seen that is not the text's own; a state goes on from what it was
        self._is_state = lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(
            self._model
        )
        self._can_round = not self._is_state and self.n_ctx >= TILE
        self._has_no_numbers = False  # in the memory: 0 times them is none either
        self.tokenizer: Tokenizer = EncoderTokenizer(self._model, facts)
        vocab = lib.llama_model_get_vocab(self._model)
        self.specials = _specials(vocab, facts)
        self.n_embd: int = lib.llama_model_n_embd_out(self._model)
        self.pooling: Pooling | None = facts.pooling
        self.default_pooling: Pooling = facts.default_pooling
        self.scale: Scale | None = None
        self.template: str | None = None
        if ranks:
            self.scale = "probability" if facts.architecture in _PROBABILITIES else "logit"
            template = lib.llama_model_chat_template(self._model, b"rerank")
            if template and b"{query}" in template and b"{document}" in template:
                self.template = template.decode(errors="replace")
            elif not facts.is_encoder:
                raise ModelLoadFailed(
                    f"{name_of(spec)} has no chat template 'rerank' with {{query}} and "
                    "{document}, so it is not known how to ask it about a pair; take a newer "
                    "conversion of the model."
                )
        self._room = self.n_sequences  # tokens for whose outputs llama.cpp has room
        # pages of logits that are never written; with a GPU the memory is its driver's
        self._gives_back = not self._memory and sys.platform == "linux" and not has_gpu(spec)
        self._room_step = encoder.batch_tokens if self._gives_back else SPARE_TOKENS
        self._row_bytes = 0  # of rows since pages were given back
        self._give_back()
        n = self.n_tokens
        self._token, self._pos, self._sequence = (np.zeros(n, np.int32) for _ in range(3))
        self._wanted, self._n_seq_id = np.ones(n, np.int8), np.ones(n, np.int32)
        # llama_batch.seq_id holds, for each token, the address of its list of sequences: one here
        addresses = self._sequence.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        self._seq_id = addresses.astype(np.uintp)
        self._batch = self._batch_from(0)
        self._go_on: Callable[[], bool] = lambda: True
        self._heard: BaseException | None = None
        self._is_interrupted = False
        # of the type that the binding declares; it must live as long as it is set
        self._abort_callback = lib.ggml_abort_callback(self._is_to_abort)
        lib.llama_set_abort_callback(self._context, self._abort_callback, None)

    def _new_context(self, spec: WorkerSpec, encoder: EncoderSpec, facts: "_Facts") -> Any:
        params = lib.llama_context_default_params()
        params.embeddings = True
        # rows of all tokens: whatever the file says, they are pooled outside
        params.pooling_type = (
            lib.LLAMA_POOLING_TYPE_RANK
            if encoder.kind == "reranker"
            else lib.LLAMA_POOLING_TYPE_NONE
        )
        if not facts.is_causal:
            params.attention_type = lib.LLAMA_ATTENTION_TYPE_NON_CAUSAL
        if not spec.flash_attention:
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_ctx = self.n_tokens
        params.n_batch = params.n_ubatch = self._step
        params.n_seq_max = self.n_sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = spec.n_threads
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ModelLoadFailed(
                f"llama.cpp cannot make a context of {self.n_tokens} tokens for {name_of(spec)}: "
                f"{reason_of(spec, self._log)}."
            )
        return context

    def encode(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        n_wanted = check_batch(batch, self)
        has_spare = self._can_round and len(batch) < self.n_sequences
        n_most = self._step if has_spare else n_wanted
        n_tokens = self._rounding.n_rows(n_wanted, n_most, self._threads.n)
        if self._memory:
            lib.llama_memory_clear(self._memory, self._is_state or self._has_no_numbers)
        elif min(n_tokens, self._step) > self._room:
            self._make_room(min(n_tokens, self._step))
        spare = np.zeros(n_tokens - n_wanted, np.int32)
        self._fill([*batch, spare] if n_tokens > n_wanted else batch)
        self._go_on = go_on
        self._has_no_numbers = bool(self._memory)  # unless it comes to its end, and has
        started_at = time.perf_counter()
        found = self._all_rows(n_tokens) if self.scale is None else self._scores(batch, n_tokens)
        seconds = time.perf_counter() - started_at
        self._rounding.took(seconds, n_wanted, n_tokens, self._threads.n)
        self._has_no_numbers = self._has_no_numbers and not np.isfinite(found).all()
        return found if self.scale is not None else found[:n_wanted]

    def _all_rows(self, n_tokens: int) -> Floats:
        if self._step >= n_tokens:
            if self._row_bytes > MAX_ROW_BYTES:
                self._give_back()
            self._call(0, n_tokens)
            return self._rows(n_tokens)
        rows = np.empty((n_tokens, self.n_embd), np.float32)
        for start in range(0, n_tokens, self._step):
            end = min(start + self._step, n_tokens)
            self._call(start, end)
            rows[start:end] = self._rows(end - start)
        return rows

    def _scores(self, batch: Sequence[Ids], n_tokens: int) -> Floats:
        """Each is read after the call that has the last token of its sequence."""
        ends = np.cumsum([len(ids) for ids in batch])
        scores = np.empty(len(batch), np.float32)
        for start in range(0, n_tokens, self._step):
            end = min(start + self._step, n_tokens)
            self._call(start, end)
            for i in np.flatnonzero((start < ends) & (ends <= end)).tolist():
                scores[i] = self._score(i)
        return scores

    def _batch_from(self, start: int) -> Any:
        return lib.llama_batch(
            token=pointer(self._token[start:], "token"),
            pos=pointer(self._pos[start:], "pos"),
            n_seq_id=pointer(self._n_seq_id, "n_seq_id"),
            seq_id=pointer(self._seq_id[start:], "seq_id"),
            logits=pointer(self._wanted, "logits"),
        )

    def _call(self, start: int, end: int) -> None:
        batch = self._batch if start == 0 else self._batch_from(start)
        batch.n_tokens = end - start
        self._heard, self._is_interrupted = None, False
        compute = lib.llama_decode if self._memory else lib.llama_encode
        with self._threads.step():
            status = compute(self._context, batch)
        self._log.is_muted = False
        if self._heard is not None:
            raise self._heard
        if self._is_interrupted:
            raise Interrupted
        if status != 0:
            kind = OutOfMemory if status == OUT_OF_MEMORY else Error
            raise kind(f"llama.cpp returned {status} for a batch of {end - start} tokens")

    # llama.cpp makes room for the logits of every token of a batch, and clears it, also where none
    # are computed (output_reserve in llama-context.cpp). Of a vocabulary of 250,000 that is 1 MB a
    # token, 8 GB for the longest text of BGE-M3. It never shrinks, and is made anew when a batch
    # has more tokens than any before, which takes 1 ms a token.

    def _make_room(self, n_tokens: int) -> None:
        """For as many as full batches have, where there is plenty of memory. Raises
        InsufficientMemory where the system would end the process instead."""
        full = -(-n_tokens // self._room_step) * self._room_step
        spare = MAX_SPARE_BYTES // self._logits_bytes(1)
        n_most = min(self._step, self.n_sequences * self.n_ctx)
        full = min(full, n_tokens + spare, n_most)
        available = available_bytes()
        if 2 * self._logits_bytes(full) <= available and self._reserve(full):
            return
        if self._logits_bytes(n_tokens) <= available and self._reserve(n_tokens):
            return
        needed = self._logits_bytes(n_tokens)
        raise InsufficientMemory(
            f"A batch of {n_tokens:,} tokens needs {needed:,} bytes for a moment, and "
            f"{available:,} are free. Send a shorter text, or lower N_CTX and BATCH_TOKENS.",
            needed_bytes=needed,
            available_bytes=available,
        )

    def _reserve(self, n_tokens: int) -> bool:
        """By the computation of any tokens, which on a CPU ends when it has begun."""
        self._room = 0
        starts = range(0, n_tokens, self.n_ctx)
        self._fill([np.zeros(min(self.n_ctx, n_tokens - at), np.int32) for at in starts])
        self._go_on = lambda: False
        try:
            self._call(0, n_tokens)
        except Interrupted:
            pass
        except OutOfMemory:
            return False
        self._room = n_tokens
        self._give_back()
        return True

    def _logits_bytes(self, n_tokens: int) -> int:
        return n_tokens * self.tokenizer.n_vocab * 4

    def _give_back(self) -> None:
        """An encoder writes no logits: their pages go back to the system, where that is possible.
        Between them there are rows, in another place for each number of tokens."""
        self._row_bytes = 0
        logits = lib.llama_get_logits(self._context) if self._gives_back else None
        if not logits:
            return
        start = ctypes.addressof(logits.contents)
        end = start + self._logits_bytes(self._room)
        first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
        if last > first:
            place = ctypes.c_void_p(first * mmap.PAGESIZE)
            n_bytes = ctypes.c_size_t((last - first) * mmap.PAGESIZE)
            ctypes.CDLL(None).madvise(place, n_bytes, mmap.MADV_DONTNEED)

    def _rows(self, n_tokens: int) -> Floats:
        rows = lib.llama_get_embeddings(self._context)
        if not rows:
            raise Error("llama.cpp has no rows after a batch")
        self._row_bytes += n_tokens * self.n_embd * 4
        return np.ctypeslib.as_array(rows, shape=(n_tokens, self.n_embd))

    def _fill(self, batch: Sequence[Ids]) -> None:
        at = 0
        for number, ids in enumerate(batch):
            end = at + len(ids)
            self._token[at:end] = ids
            self._pos[at:end] = np.arange(len(ids))
            self._sequence[at:end] = number
            at = end

    def _score(self, sequence: int) -> float:
        scores = lib.llama_get_embeddings_seq(self._context, sequence)
        if not scores:
            raise Error("llama.cpp has no score of a sequence")
        return float(scores[0])  # there may be nothing behind the first

    def _is_to_abort(self, _: Any) -> bool:
        """Between two nodes of the graph, on the CPU. Nothing may be raised into C."""
        try:
            self._is_interrupted = not self._go_on()
        except BaseException as error:
            self._heard = error
        self._log.is_muted = self._is_interrupted or self._heard is not None
        return self._log.is_muted

    def close(self) -> None:
        if self._context:
            lib.llama_free(self._context)
        lib.llama_model_free(self._model)


class _Facts:
    """What the header says about an encoder."""

    def __init__(self, path: Path) -> None:
        with open_header(path) as header:
            self.architecture = header.text("general.architecture")
            says_causal = header.value(f"{self.architecture}.attention.causal", True)
            self.is_causal = says_causal and self.architecture not in _SEES_ALL
            self.n_embd = header.number(f"{self.architecture}.embedding_length", 0)
            pooling = header.number(f"{self.architecture}.pooling_type", 0)
            self.pooling = _POOLINGS.get(pooling)
            self.has_head = not header.tensors.keys().isdisjoint(
                ("cls.output.weight", "cls.weight")
            )
            self.tokenizer_model = header.text("tokenizer.ggml.model")
            n_types = header.number("tokenizer.ggml.token_type_count", 1)
            self.has_segments = self.tokenizer_model == "bert" and n_types > 1
            # its converter writes this network as a BERT's, with a head of two layers
            self.is_distilbert = (
                self.architecture == self.tokenizer_model == "bert"
                and "token_types.weight" not in header.tensors
                and header.tensors.keys() >= {"cls.weight", "cls.output.weight"}
            )
            labels = header.array(f"{self.architecture}.classifier.output_labels")
            makes_one = self.architecture in _PROBABILITIES
            self.n_classes = 1 if makes_one or labels is None else labels.count
            if self.architecture == "gemma-embedding" and not (
                header.tensors.keys() >= {"dense_2.weight", "dense_3.weight"}
            ):
                logger.warning(
                    "%s lacks dense_2 and dense_3, EmbeddingGemma's last layers, so its vectors "
                    "are not those of the model; take another conversion", path.name
                )  # fmt: skip
            self.is_encoder = (
                self.architecture in ENCODERS or self.tokenizer_model in ENCODER_TOKENIZERS
            )
            # with causal attention the first row has seen nothing but the first token
            decoders: Pooling = "last" if self.is_causal else "mean"
            self.default_pooling: Pooling = "cls" if self.is_encoder else decoders
            # converters write of a BPE whether a text has a begin and an end; the older ones wrote
            # neither key, and of other vocabularies some wrote what is wrong
            self.says_ends = (
                self.tokenizer_model == "gpt2"
                and not header.metadata.keys().isdisjoint(
                    ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
                )
            )
            self.unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
            keeps_spaces = not header.value(_KEEPS_SPACES, False)
            is_cased = (
                self.tokenizer_model == "bert"
                and _LOWERS not in header.metadata
                and _n_capitals(header) >= N_CAPITALS
            )
        # transformers 5 makes converters write that XLM-R keeps runs of spaces, which it does not
        self.overrides: dict[str, bool] = {}
        if self.is_encoder and self.tokenizer_model == "t5" and keeps_spaces:
            self.overrides[_KEEPS_SPACES] = True
            logger.info("%s: runs of spaces count as one, as in XLM-R", path.name)
        # llama.cpp takes the older conversions, which say nothing, for models without capitals
        if is_cased:
            self.overrides[_LOWERS] = False
            logger.info("%s: capitals and accents are kept, as its vocabulary has them", path.name)


def _n_capitals(header: Header) -> int:
    """Capital letters that are pieces by themselves, at the beginning of a word or in it."""
    tokens = header.array("tokenizer.ggml.tokens")
    if tokens is None:
        return 0
    short = np.flatnonzero(np.diff(tokens.texts) <= 8 + len("▁Ж".encode()))  # 8: their length
    letters = {text.removeprefix("▁") for text in header.texts(tokens, short)}
    return sum(len(letter) == 1 and letter != letter.lower() for letter in letters)


def _specials(vocab: Any, facts: _Facts) -> Specials:
    """The tokens around texts. An encoder has them also where its file does not say so; between
    two texts there is one in any case."""

    def known(token: int) -> int | None:
        return token if token >= 0 else None

    bos, eos, sep, pad = (
        known(token(vocab))
        for token in (
            lib.llama_vocab_bos, lib.llama_vocab_eos, lib.llama_vocab_sep, lib.llama_vocab_pad,
        )
    )  # fmt: skip
    unknown = facts.unknown if isinstance(facts.unknown, int) else None
    begin = bos if lib.llama_vocab_get_add_bos(vocab) else None
    end = eos if lib.llama_vocab_get_add_eos(vocab) else None
    between = [] if end is None else [end, end]
    if facts.is_encoder:
        # BERT ends a text with what else stands between two, XLM-R and RoBERTa have both
        last = sep if facts.tokenizer_model == "bert" or eos is None else eos
        is_bert = facts.tokenizer_model == "bert" or _literal(vocab, bos) != b"<s>"
        between = [] if last is None else [last] if is_bert else [last, last]
        if not facts.says_ends:
            begin, end = bos, last
    unused = {begin, end, bos, eos, pad, unknown} - {None}
    return Specials(begin, end, tuple(between), frozenset(t for t in unused if t is not None))


def _literal(vocab: Any, token: int | None) -> bytes:
    if token is None:
        return b""
    text: bytes = lib.llama_vocab_get_text(vocab, token)
    return text
