"""An encoder without weights: deterministic, scripted, as slow and as faulty as you like.

A word is a token. Its row is drawn from its spelling, and the row of CLS is what its words have in
common, so texts with common words are similar in every kind of vector. A cross-encoder's score
grows with the share of the query's words that the document has.

Of the script that `fake.py` describes, `load_s`, `step_ms`, `token_us`, `fault` and the rules count
here, and `"heads": false` leaves only dense vectors. A rule is for texts that contain its `match`;
its `fault` is one of: `step` raises, `nan` makes no numbers of it, `nan_in_company` does so where
it is not alone, `crash` kills the process, `hang` never returns, `stall` only when told to stop.
"""

import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

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
from engine.backends.fake import N_EMBD, Script, begin_load
from engine.heads import Heads
from engine.types import Pooling, Scale
from engine.wire import WorkerSpec

N_CTX_TRAIN = 8192
N_VOCAB = 1 << 24  # so many that no two words of a test share an id
BEGIN, PAD, END, UNKNOWN = range(4)
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


class WordTokenizer:
    """Each word has the id that its spelling gives it. Texts of ids are remembered."""

    n_vocab = N_VOCAB
    bos: int | None = BEGIN

    def __init__(self) -> None:
        self._words = {i: word.encode() for i, word in enumerate(_SPECIALS)}

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        ids = []
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            data = word.encode()
            ids.append(len(_SPECIALS) + zlib.crc32(data) % (N_VOCAB - len(_SPECIALS)))
            self._words.setdefault(ids[-1], data)
        return ids

    def piece(self, token: int) -> bytes:
        return b"" if token < len(_SPECIALS) else b" " + self._words.get(token, b"?")

    def literal(self, token: int) -> bytes:
        return self.piece(token) or self._words[token]

    def ends_generation(self, token: int) -> bool:
        return token == END

    def text(self, ids: Ids) -> str:
        """What a script's rules look at."""
        return b"".join(self.piece(int(token)) for token in ids).decode()


class FakeEncoder:
    """Implements `engine.backends.base.Encoder`."""

    specials = Specials(BEGIN, END, (END, END), frozenset(range(len(_SPECIALS))))
    n_embd = N_EMBD
    n_sequences = MAX_SEQUENCES
    pooling: Pooling | None = "cls"
    default_pooling: Pooling = "cls"
    template: str | None = None

    def __init__(
        self,
        script: Script,
        *,
        n_ctx: int = N_CTX_TRAIN,
        n_tokens: int = N_CTX_TRAIN,
        scores: bool = False,
    ) -> None:
        self._words = WordTokenizer()
        self.tokenizer: Tokenizer = self._words
        self.n_ctx = n_ctx
        self.n_tokens = n_tokens
        self.scale: Scale | None = "logit" if scores else None
        self.heads: Heads | None = None
        self.missing_heads: tuple[str, ...] = () if script.heads else ("sparse_linear.pt",)
        if script.heads and not scores:
            first = np.eye(1, N_EMBD, dtype=np.float32)[0]
            no_bias = np.zeros(N_EMBD, np.float32)
            self.heads = Heads(first, 0.0, np.eye(N_EMBD, dtype=np.float32), no_bias)
        self.batches: list[list[int]] = []  # lengths of the sequences of each call, for tests
        self._script = script

    def encode(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        n_tokens = check_batch(batch, self)
        self.batches.append([len(ids) for ids in batch])
        faults = [self._script.rule(self._words.text(ids)).fault for ids in batch]
        self._maybe_fail(faults, go_on)
        time.sleep(self._script.step_ms / 1e3 + self._script.token_us / 1e6 * n_tokens)
        if not go_on():
            raise Interrupted
        bad = {"nan"} if len(batch) == 1 else {"nan", "nan_in_company"}
        if self.scale is not None:
            scores = [
                np.nan if fault in bad else _score(ids)
                for ids, fault in zip(batch, faults, strict=True)
            ]
            return np.array(scores, np.float32)
        rows = [
            _rows(ids) * (np.nan if fault in bad else 1)
            for ids, fault in zip(batch, faults, strict=True)
        ]
        return np.concatenate(rows, dtype=np.float32)

    def _maybe_fail(self, faults: Sequence[str | None], go_on: Callable[[], bool]) -> None:
        if "crash" in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in faults:
            threading.Event().wait()
        while "stall" in faults:
            time.sleep(1e-3)
            if not go_on():
                raise Interrupted
        if "step" in faults:
            raise RuntimeError("the fake backend was told to fail this step")

    def close(self) -> None:
        pass


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    assert spec.encoder is not None
    script = Script.read(spec.model_path)
    begin_load(script, progress)
    n_ctx = min(spec.n_ctx, N_CTX_TRAIN)
    return FakeEncoder(
        script,
        n_ctx=n_ctx,
        n_tokens=max(n_ctx, spec.encoder.batch_tokens),
        scores=spec.encoder.kind == "reranker",
    )


@lru_cache(maxsize=1 << 16)
def _row(token: int) -> Floats:
    row = np.random.default_rng(token).standard_normal(N_EMBD).astype(np.float32)
    row /= np.linalg.norm(row)
    row[0] = 0.5 + token % 100 / 200  # the weight of the word
    return row


def _rows(ids: Ids) -> Floats:
    rows = np.stack([_row(int(token)) for token in ids])
    rows[0] = rows[1 : max(len(ids) - 1, 2)].mean(axis=0)  # of the words
    return rows


def _score(ids: Ids) -> float:
    """A pair as `<s> query </s></s> document </s>`."""
    words = [int(token) for token in ids]
    border = next((i for i in range(len(words) - 1) if words[i] == words[i + 1] == END), 0)
    query, document = set(words[1:border]), set(words[border + 2 : -1])
    return 10 * len(query & document) / max(len(query), 1) - 5 - 0.01 * len(document - query)
