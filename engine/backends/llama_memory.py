"""The KV cells of a context of llama.cpp whose sequences share them."""

import ctypes
from typing import Any, NamedTuple

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from engine.prefix import Saved

Bytes = npt.NDArray[np.uint8]
_UNCUT = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # recurrent states, cells behind a sliding window


class LlamaMemory:
    """Implements `engine.backends.base.Memory`. `scratch` is a sequence of the context that nobody
    else uses, for cells on their way out and in."""

    def __init__(
        self,
        context: Any,
        scratch: int,
        *,
        is_cells: bool,
        takes_back: bool,
        can_mark: bool,
        shares_cells: bool,
        block: int,
        window: "Window | None" = None,
    ) -> None:
        self.context = context
        self.takes_back = takes_back
        self.is_cells, self.can_mark, self.shares_cells = is_cells, can_mark, shares_cells
        self.block = block
        self._memory = lib.llama_get_memory(context)
        self._scratch = scratch
        self._window = window

    def truncate(self, slot: int, n_tokens: int) -> bool:
        return cut(self._memory, slot, n_tokens, self._window)

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        lib.llama_memory_seq_cp(self._memory, source, slot, 0, n_tokens)

    def save(self, slot: int, start: int, end: int) -> Saved | None:
        lib.llama_memory_seq_cp(self._memory, slot, self._scratch, start, end)
        try:
            return self._saved(self._scratch)
        finally:
            self.clear(self._scratch)

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        if not self.is_cells:
            return write_state(self.context, slot, saved)
        is_read = write_state(self.context, self._scratch, saved)
        if is_read:
            lib.llama_memory_seq_cp(self._memory, self._scratch, slot, start, end)
        self.clear(self._scratch)
        return is_read

    def mark(self, slot: int, max_bytes: int, *, is_whole: bool = False) -> Saved | None:
        flags = 0 if is_whole else _UNCUT
        is_larger = state_size(self.context, slot, flags) > max_bytes
        return None if is_larger else self._saved(slot, flags)

    def rewind(self, slot: int, saved: Any, n_tokens: int) -> bool:
        # with what was saved the window is whole
        return write_state(self.context, slot, saved, _UNCUT) and cut(self._memory, slot, n_tokens)

    def _saved(self, sequence: int, flags: int = 0) -> Bytes | None:
        try:
            saved = np.empty(state_size(self.context, sequence, flags), np.uint8)
        except MemoryError:
            return None
        return saved if read_state(self.context, sequence, saved, flags) else None

    def clear(self, slot: int) -> None:
        lib.llama_memory_seq_rm(self._memory, slot, -1, -1)


class Window(NamedTuple):
    """Where tokens do not see all that is before them."""

    n_tokens: int
    is_chunked: bool  # they see the others of their chunk; else so many, with themselves

    def begin(self, position: int) -> int:
        """The first position that a token at this one sees."""
        if self.is_chunked:
            return position // self.n_tokens * self.n_tokens
        return max(position + 1 - self.n_tokens, 0)


def cut(memory: Any, sequence: int, n_tokens: int, window: Window | None = None) -> bool:
    """Keep the first tokens of a sequence. False, and unchanged, where the memory has no longer
    what the next token sees of them, in states or through a window."""
    if not sees_all(memory, sequence, n_tokens, window):
        return False
    return bool(lib.llama_memory_seq_rm(memory, sequence, n_tokens, -1))


def sees_all(memory: Any, sequence: int, position: int, window: Window | None) -> bool:
    """What a token at this position sees of a sequence through a window is there."""
    # Cells that a step finds behind the window it uses again. From where it began they are not seen
    # either, unless llama.cpp has computed it in parts. From its first position on a sequence has
    # all there.
    return not window or (lib.llama_memory_seq_pos_min(memory, sequence) <= window.begin(position))


def state_size(context: Any, sequence: int, flags: int = 0) -> int:
    """Bytes of all cells of a sequence, as llama.cpp writes them."""
    return int(lib.llama_state_seq_get_size_ext(context, sequence, flags))


def read_state(context: Any, sequence: int, into: Bytes, flags: int = 0) -> bool:
    """Copy all cells of a sequence into as many bytes as they have. False where that fails."""
    n = lib.llama_state_seq_get_data_ext(context, _pointer(into), into.nbytes, sequence, flags)
    return bool(0 < n == into.nbytes)


def write_state(context: Any, sequence: int, state: Bytes, flags: int = 0) -> bool:
    """Put cells in the place of those of a sequence. False where that fails."""
    n = lib.llama_state_seq_set_data_ext(context, _pointer(state), state.nbytes, sequence, flags)
    return bool(0 < n == state.nbytes)


def _pointer(array: Bytes) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
