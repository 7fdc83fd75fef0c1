"""One text at a time through llama.cpp's low-level API: what an encoder's file computes."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

FLASH_OFF = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
FLASH_ON = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
_MAX_TOKENS = 8192


class Encoder:
    """A model in llama.cpp's low-level API, one text at a time, as plain as it gets."""

    def __init__(self, path: Path, pooling: int = -1, flash: int = FLASH_OFF) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, path
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.embeddings, params.pooling_type, params.flash_attn_type = True, pooling, flash
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context
        self.pooling = llama_cpp.llama_pooling_type(self.context)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        raw = text.encode()
        out = (llama_cpp.llama_token * _MAX_TOKENS)()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, _MAX_TOKENS, special, False)
        assert n >= 0
        return out[:n]

    def pair(self, query: str, document: str, max_length: int = 512) -> list[int]:
        """Only the document is cut, but for a query of more than three quarters of the length."""
        q = self.ids(query, special=False)[: max_length * 3 // 4]
        d = self.ids(document, special=False)
        return [0, *q, 2, 2, *d[: max_length - len(q) - 4], 2]

    def run(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Rows of the last layer; or what the context pools them to."""
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i] = token, i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = 1
        memory = llama_cpp.llama_get_memory(self.context)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        if self.pooling == llama_cpp.LLAMA_POOLING_TYPE_NONE:
            rows = llama_cpp.llama_get_embeddings(self.context)
            return np.ctypeslib.as_array(rows, (len(ids), self.n_embd)).copy()
        n = 1 if self.pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK else self.n_embd
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_embeddings_seq(self.context, 0), (n,)
        ).copy()


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


@contextmanager
def loading() -> Iterator[Callable[..., Encoder]]:
    """Gives what makes encoders, and closes them."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    encoders: list[Encoder] = []

    def load(path: Path, pooling: int = -1, flash: int = FLASH_OFF) -> Encoder:
        encoders.append(Encoder(path, pooling, flash))
        return encoders[-1]

    yield load
    for encoder in encoders:
        encoder.close()


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
