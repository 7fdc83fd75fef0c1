"""Cells apart for the sequences of a step, where llama.cpp looks through those of all.

In a context whose sequences share their cells, attention of a token on a CPU looks at every cell in
use, for each layer and head, to find that most are another sequence's. With a small model and many
sequences that takes longer than all else. So where several are past their prompts, their cells are
copied into lanes: a second context of the model, in which each sequence has cells of its own.

Beginnings are shared in the first context, the home, and prompts that stand alone are computed
there. A sequence in a lane keeps what cells it has at home; those that came after them are brought
there when somebody wants them.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llama_cpp as lib
import numpy as np

from engine.backends.llama_memory import Bytes, LlamaMemory, read_state, state_size, write_state
from engine.backends.llama_threads import ContextThreads
from engine.prefix import Saved
from engine.speculation import MOST
from engine.types import Batch, Chunk

logger = logging.getLogger("llama.cpp")

# Answers that gain by lanes, where as many times more cells are in use than each one's own. Without
# flash attention attention is computed for all of them.
LEAST, LEAST_PLAIN = 3, 2
HEAD = 12  # bytes of a state before its streams: a mark, the sequence, the number of streams
NO_CELLS = 4  # bytes of a stream in which the sequence has none: their number


class Lanes:
    """Implements `engine.backends.base.Memory` over a home and a context with a lane for each of
    `n_lanes` sequences, which is made when it is first wanted. The lanes in use are the first."""

    def __init__(
        self,
        home: LlamaMemory,
        n_lanes: int,
        n_cells: int,
        new_context: Callable[[], Any | None],
        threads: ContextThreads,
        *,
        is_flash: bool,
    ) -> None:
        self.context: Any | None = None
        self.is_cells, self.block = home.is_cells, home.block
        self._least = LEAST if is_flash else LEAST_PLAIN
        self._home = home
        self._n_lanes = n_lanes
        self._n_cells = n_cells  # 0 when it is known that there are no lanes
        self._new_context = new_context
        self._threads = threads
        self._opener = ThreadPoolExecutor(1)
        self._opening: Future[Any | None] | None = None
        self._memory: Any = None
        self._slots: list[int] = []  # whose sequence a lane has
        self._n_home: dict[int, int] = {}  # by slot in a lane: its first cells, which are at home
        self._buffer = np.empty(0, np.uint8)  # to copy through
        self._is_broken = False

    def close(self) -> None:
        if self._opening and (context := self._opening.result()):
            lib.llama_free(context)

    def choose(self, batch: Batch) -> dict[int, Chunk]:
        """What of a step is to be computed in lanes, by lane. The others have their cells at
        home."""
        if self._is_broken:
            raise RuntimeError("cells were lost")
        chosen = self._worth_lanes(batch)
        if chosen and self.context is None:
            self._open()
        if self.context is None:
            return {}
        for chunk in batch.chunks:
            if chunk.slot in self._n_home and chunk.slot not in chosen:
                self._bring_home(chunk.slot)
        for slot, chunk in chosen.items():
            if slot not in self._n_home:
                self._lift(slot, chunk.start)
        # what lies between them, of who has ended, costs one more pass until it is moved out
        return {lane: chosen[slot] for lane, slot in enumerate(self._slots) if slot in chosen}

    def _worth_lanes(self, batch: Batch) -> dict[int, Chunk]:
        """By slot, the chunks for lanes: all that fit, or none."""
        fitting = {chunk.slot: chunk for chunk in batch.chunks if self._fits(chunk)}
        lengths = [chunk.start for chunk in fitting.values() if chunk.n_tokens == 1]
        n_looked_at = batch.n_held * len(lengths)  # if all are at home
        if len(lengths) >= self._least and n_looked_at >= self._least * sum(lengths):
            return fitting
        # or they are there and can go on: at home a step for others would come on top
        is_there = any(slot in self._n_home for slot in fitting)
        return fitting if is_there and len(fitting) == len(batch.chunks) else {}

    def _fits(self, chunk: Chunk) -> bool:
        return len(chunk.sequence.tokens) + MOST <= self._n_cells

    # a memory

    def truncate(self, slot: int, n_tokens: int) -> bool:
        if slot in self._n_home and n_tokens >= self._n_home[slot]:
            lane = self._slots.index(slot)
            return bool(lib.llama_memory_seq_rm(self._memory, lane, n_tokens, -1))
        self._leave(slot)
        return self._home.truncate(slot, n_tokens)

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        self._want(source, n_tokens)
        self._home.share(source, slot, n_tokens)

    def save(self, slot: int, start: int, end: int) -> Saved | None:
        self._want(slot, end)
        return self._home.save(slot, start, end)

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        return self._home.load(slot, saved, start, end)

    def clear(self, slot: int) -> None:
        self._leave(slot)
        self._home.clear(slot)

    def _want(self, slot: int, n_tokens: int) -> None:
        """Somebody wants the first cells of a slot at home."""
        if slot in self._n_home and n_tokens > self._n_home[slot]:
            self._bring_home(slot)

    # between home and lanes

    def _open(self) -> None:
        """Have the context made, in a thread: to clear its cells takes a while."""
        if self._opening is None:
            self._opening = self._opener.submit(self._new_context)
        elif self._opening.done():
            self.context = self._opening.result()
            if self.context is None:
                self._give_up("There is no memory for cells apart")
                return
            self._memory = lib.llama_get_memory(self.context)
            self._threads.add(self.context)

    def _give_up(self, reason: str) -> None:
        logger.warning("%s, so from now on all sequences share theirs.", reason)
        self._n_cells = 0

    def _lift(self, slot: int, n_tokens: int) -> None:
        """Copy the cells of a slot into the next lane. It stays at home where that fails."""
        n = state_size(self._home.context, slot)
        try:
            state = self._room(n + NO_CELLS * (self._n_lanes - 1))
        except MemoryError:
            self._give_up("There is no memory to copy cells")
            return
        state[n:] = 0
        is_read = read_state(self._home.context, slot, state[:n])
        state[HEAD - 4 : HEAD].view(np.uint32)[0] = self._n_lanes
        if is_read and write_state(self.context, len(self._slots), state):
            self._slots.append(slot)
            self._n_home[slot] = n_tokens
        else:
            self._give_up("Cells cannot be copied")

    def _bring_home(self, slot: int) -> None:
        """Copy home what is there of a lane's sequence alone, and free the lane."""
        lane, n_home = self._slots.index(slot), self._n_home[slot]
        end = lib.llama_memory_seq_pos_max(self._memory, lane) + 1
        if end > n_home:
            self._room(state_size(self.context, lane))  # or fail before anything is changed
            lib.llama_memory_seq_rm(self._memory, lane, 0, n_home)
            state = self._state(lane)
            head, n_before = state[:HEAD].copy(), NO_CELLS * lane
            head[HEAD - 4 :].view(np.uint32)[0] = 1
            state = state[n_before : state.nbytes - NO_CELLS * (self._n_lanes - 1) + n_before]
            state[:HEAD] = head
            self._must(self._home.load(slot, state, n_home, end))
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        """Free the lane of a slot that has one. The last lane moves to it: only neighbours are
        computed together."""
        if slot not in self._n_home:
            return
        lane, last = self._slots.index(slot), len(self._slots) - 1
        if lane != last:
            state = self._state(last)
            lib.llama_memory_seq_rm(self._memory, lane, -1, -1)  # a state without cells does not
            self._must(write_state(self.context, lane, state))
            self._slots[lane] = self._slots[last]
        lib.llama_memory_seq_rm(self._memory, last, -1, -1)
        del self._slots[last], self._n_home[slot]

    def _state(self, lane: int) -> Bytes:
        state = self._room(state_size(self.context, lane))
        self._must(read_state(self.context, lane, state))
        return state

    def _must(self, is_done: bool) -> None:
        """A copy has not failed, after which nobody would know who has which cells."""
        if not is_done:
            self._is_broken = True
            raise RuntimeError("llama.cpp cannot copy cells")

    def _room(self, n_bytes: int) -> Bytes:
        if n_bytes > self._buffer.nbytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        return self._buffer[:n_bytes]
