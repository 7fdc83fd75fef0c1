"""The contracts between the worker, the scheduler and the libraries that run models."""

import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequence_
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.heads import Heads
from engine.prefix import Saved
from engine.types import Batch, Pooling, Sampled, SamplingParams, Scale, Sequence, StepResult
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

ReportProgress = Callable[[float], None]  # a fraction, 0…1
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# of libraries of Hugging Face, which look at it when they are imported
QUIET = {
    "HF_HUB_OFFLINE": "1",  # what is not in the directory is not fetched either
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MAX_SEQUENCES = 64  # of an encoder's batch; llama.cpp takes 256


class CacheFull(Exception):
    """The memory had no cells for a batch, which was not computed. The memory is unchanged."""


class CellsLost(Exception):
    """A batch was not computed, and its slots are to be cleared: they do not hold what they did."""


class Tokenizer(Protocol):
    """Text to token ids and back. Every method may be called from any thread."""

    n_vocab: int
    bos: int | None  # the id to put before a raw prompt, None where the model wants none

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        """Ids of `text`. Control tokens are recognised only with `parse_special`; with `continues`
        the ids decode to exactly `text`, as in the middle of a prompt (no added space)."""

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds to the text; none for control tokens."""

    def literal(self, token: int) -> bytes:
        """How `token` is written: its piece, or the name of a control token."""

    def ends_generation(self, token: int) -> bool: ...


class Constraint(Protocol):
    """What one answer may say next."""

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Leave only tokens that may come next, in place."""

    def accept(self, token: int) -> None:
        """The token was chosen."""


class Engine(Protocol):
    """Generates. One thread calls it, except for `tokenizer`."""

    tokenizer: Tokenizer
    n_ctx: int  # most tokens of one sequence, prompt and answer
    n_parallel: int

    @property
    def idle(self) -> bool:
        """Nothing is admitted, so `step` has nothing to do."""

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
        """Take a sequence of 1…n_ctx - 1 valid tokens. It starts in this or a later step; of those
        that wait the one with the least rank goes first, and of equal ones the lowest id; where
        there is no place for it one with a greater rank is put off. Unless it `reuses` what others
        have computed, its numbers are the same whenever it has no company but the answers of its
        job: of these the first computes the prompt, and the others, with the same prompt, say by
        its id what they go on from."""

    def cancel(self, id: int) -> None:
        """End a sequence before the next step. Unknown ids are fine: it may just have failed."""

    def step(self) -> StepResult:
        """One decode call for all. Faults of single sequences are in the result; an exception
        means that the engine cannot go on."""

    def close(self) -> None: ...


class Memory(Protocol):
    """The KV cells of a decoder, by slot."""

    is_cells: bool
    """False for memories that are no list of cells (recurrent, hybrid, behind a sliding window):
    they are never asked to save, load only whole slots, and are cut by `mark` and `rewind`, as are
    slots that share with another; cells are never asked for these."""
    takes_back: bool
    """What the last step computed for a slot can be dropped again by `truncate`; without a list of
    cells it is asked for nothing else."""
    can_mark: bool
    """Whether such a memory can; it shares too only where it can."""
    shares_cells: bool
    """Cells that several slots see are there once. Else each needs its own, as where windows are as
    large as all cells."""
    block: int
    """Tokens that are saved at once, at most; they come back together."""

    def truncate(self, slot: int, n_tokens: int) -> bool:
        """Keep the first `n_tokens` of a slot. False, and unchanged, where that fails."""

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        """Let an empty slot see the first `n_tokens` of another."""

    def save(self, slot: int, start: int, end: int) -> Saved | None:
        """Copy the cells of these positions out of the memory. None where that fails."""

    def load(self, slot: int, saved: Saved, start: int, end: int) -> bool:
        """Put saved cells behind those of a slot: of what was saved from `start`, the positions
        before `end`. There must be free cells for all that was saved. False where that fails."""

    def mark(self, slot: int, max_bytes: int, *, is_whole: bool = False) -> Saved | None:
        """Copy what cannot be cut of a slot, as it is now, or all of it for `load`. None where that
        fails, or is larger."""

    def rewind(self, slot: int, saved: Saved, n_tokens: int) -> bool:
        """Bring a slot back to its first `n_tokens`, at which it or that which it shares with was
        marked. Where that fails False, and the slot must be cleared."""

    def clear(self, slot: int) -> None: ...


class Decoder(Protocol):
    """What the batch engine needs of a library that computes logits."""

    tokenizer: Tokenizer
    memory: Memory

    def sampler(self, sampling: SamplingParams, prompt: list[int]) -> Any:
        """A new sampler for one sequence. It is dropped with the sequence."""

    def decode(self, batch: Batch) -> None:
        """Compute one batch. Raises CacheFull, CellsLost, or anything else when it failed."""

    def sample(self, row: int, sequence: Sequence) -> Sampled:
        """The next token of the sequence whose logits are the batch's `row`-th wanted ones; behind
        guesses only after those were right. An exception is the sequence's own fault."""

    def score(self, row: int, token: int, n_top: int) -> Sampled:
        """How likely a token of a prompt was by the wanted logits before it, in that order with
        those to sample from; with so many of the likeliest. An exception is its sequence's own
        fault."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Specials:
    """The tokens that an encoder wants around texts."""

    begin: int | None
    end: int | None
    between: tuple[int, ...] = ()  # a query and a document
    unused: frozenset[int] = frozenset()  # without weight in sparse vectors


class Interrupted(Exception):
    """A computation was given up, as `go_on` wanted."""


class Encoder(Protocol):
    """Computes rows of tokens, or scores of pairs. One thread calls it, except for `tokenizer`."""

    tokenizer: Tokenizer
    specials: Specials
    n_ctx: int  # most tokens of one sequence
    n_sequences: int  # most of one batch
    n_tokens: int  # most of one batch
    n_embd: int  # of a row
    pooling: Pooling | None  # what the model's file says, if it does and is asked
    default_pooling: Pooling  # where it does not say it
    heads: Heads | None
    missing_heads: tuple[str, ...]  # files that would have to be beside the model
    scale: Scale | None  # of its scores; None where it makes rows
    template: str | None  # of a pair as a prompt, where the model wants one

    def encode(self, batch: Sequence_[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        """Compute sequences at once: the rows of all their tokens [n_tokens, n_embd], or where it
        has a `scale` their scores [n_sequences].

        Rows are a view that the next call overwrites. `go_on` is asked now and then, where the
        library lets us: False ends the computation, which raises Interrupted. Raises ValueError
        for what would end the process: too many tokens or sequences, one that is too long or
        empty, ids outside the vocabulary; and anything else when the batch failed.
        """

    def close(self) -> None: ...


def check_batch(batch: Sequence_[Ids], encoder: Encoder) -> int:
    """The number of its tokens. Raises ValueError for a batch that `encode` does not take."""
    if not 0 < len(batch) <= encoder.n_sequences:
        raise ValueError(f"a batch of {len(batch)} sequences, not of 1 to {encoder.n_sequences}")
    if (n_tokens := sum(map(len, batch))) > encoder.n_tokens:
        raise ValueError(f"a batch of {n_tokens} tokens, more than {encoder.n_tokens}")
    for ids in batch:
        if not 0 < len(ids) <= encoder.n_ctx:
            raise ValueError(f"a sequence of {len(ids)} tokens, not of 1 to {encoder.n_ctx}")
    every = np.concatenate(batch)
    if every.min() < 0 or every.max() >= encoder.tokenizer.n_vocab:
        raise ValueError(f"token ids that are not from 0 to {encoder.tokenizer.n_vocab - 1}")
    return n_tokens


def load_encoder(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    """The loaded encoder of `spec.backend`; raises ModelLoadFailed with a sentence for the user."""
    if spec.backend == "llamacpp":
        with _importing_llama():
            from engine.backends.llama_encoder import load
    elif spec.backend == "mlx":
        from engine.backends.mlx_encoder import load
    elif spec.backend == "onnx":
        from engine.backends.onnx_encoder import load
    elif spec.backend == "flag":
        from engine.backends.flag_encoder import load
    elif spec.backend == "fake":
        from engine.backends.fake_encoder import load
    else:
        raise ModelLoadFailed(f"Backend '{spec.backend}' is not known.")
    return load(spec, progress)


def load_engine(spec: WorkerSpec, progress: ReportProgress) -> Engine:
    """The loaded engine of `spec.backend`; raises ModelLoadFailed with a sentence for the user."""
    if spec.backend == "llamacpp":
        with _importing_llama():
            from engine.backends.llamacpp import load
    elif spec.backend == "mlx":
        from engine.backends.mlx import load
    elif spec.backend == "fake":
        from engine.backends.fake import load
    else:
        raise ModelLoadFailed(f"Backend '{spec.backend}' is not known.")
    return load(spec, progress)


@contextmanager
def importing(backend: str, needed: str) -> Iterator[None]:
    """Raises ModelLoadFailed where a library that is an extra is not there, or is broken."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise ModelLoadFailed(
            f"The backend {backend} needs {needed} ({first_line(error)}): {install(backend)}."
        ) from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def install(backend: str) -> str:
    """What to do for a backend that is an extra."""
    return f"run `./setup.sh --{backend}`, or `pip install -r requirements-{backend}.txt`"


@contextmanager
def _importing_llama() -> Iterator[None]:
    """Another release of the system's libraries, or of Python, may end what was installed."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).replace(f"{sys.prefix}/", "")  # clients read it
        raise ModelLoadFailed(
            f"llama.cpp cannot be loaded ({reason}): `rm -rf .venv; ./setup.sh` installs it anew."
        ) from error
