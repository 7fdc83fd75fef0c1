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
from engine.types import MOST_GUESSES, Batch, Chunk

logger = logging.getLogger("llama.cpp")

Place = tuple[int, int]  # a sequence of a context, and a position in it
HEAD = 12  # bytes of a state before its streams: a mark, the sequence, the number of streams
NO_CELLS = 4  # bytes of a stream in which the sequence has none: their number


class Lanes:
    """Implements `engine.backends.base.Memory` over a home of cells and a context with a lane
    for each of `n_lanes` sequences, which is made when it is first wanted."""

    def __init__(
        self,
        home: LlamaMemory,
        n_lanes: int,
        n_cells: int,
        new_context: Callable[[], Any | None],
        threads: ContextThreads,
        least: int,
    ) -> None:
        self.context: Any | None = None
        self.is_cells, self.can_mark, self.shares_cells = True, False, True
        self.takes_back = True
        self.block = home.block
        self.load, self.mark, self.rewind = home.load, home.mark, home.rewind
        self._least = least  # answers, and times more cells in use than each one's own
        self._home = home
        self._n_lanes = n_lanes
        self._n_cells = n_cells  # 0 when it is known that there are no lanes
        self._new_context = new_context
        self._threads = threads
        self._opener = ThreadPoolExecutor(1)
        self._opening: Future[Any | None] | None = None
        self._memory: Any = None
        self._lanes: dict[int, int] = {}  # by slot
        self._n_home: dict[int, int] = {}  # by slot in a lane: its first cells, which are at home
        self._buffer = np.empty(0, np.uint8)  # to copy through

    def close(self) -> None:
        if self._opening and (context := self._opening.result()):
            lib.llama_free(context)

    def choose(self, batch: Batch) -> dict[int, Chunk]:
        """What of a step is to be computed in lanes, by lane. The others have their cells at
        home."""
        if len(batch.chunks) < self._least and not self._lanes:  # the rule has nothing to weigh
            return {}
        chosen = self._worth_lanes(batch)
        if chosen and self.context is None:
            self._open()
        if self.context is None:
            return {}
        for chunk in batch.chunks:
            if chunk.slot in self._lanes and chunk.slot not in chosen:
                self._bring_home(chunk.slot)
        for slot, chunk in chosen.items():
            if slot not in self._lanes and self._n_cells:
                self._lift(slot, chunk.start)
        if chosen:
            self._close_gaps()
        by_lane = {
            self._lanes[slot]: chunk for slot, chunk in chosen.items() if slot in self._lanes
        }
        return dict(sorted(by_lane.items()))

    def _worth_lanes(self, batch: Batch) -> dict[int, Chunk]:
        """By slot, the chunks for lanes: all that fit, or none. When they open is a matter of time,
        and they change last digits."""
        if batch.is_steady:
            return {}
        fitting = {chunk.slot: chunk for chunk in batch.chunks if self._fits(chunk)}
        lengths = [chunk.start for chunk in fitting.values() if chunk.n_tokens == 1]
        n_looked_at = batch.n_held * len(lengths)  # if all are at home
        if len(lengths) >= self._least and n_looked_at >= self._least * sum(lengths):
            return fitting
        # or some are there and all can go on: at home a step for others would come on top
        can_go_on = len(fitting) == len(batch.chunks) and fitting.keys() & self._lanes.keys()
        return fitting if lengths and can_go_on else {}

    def _fits(self, chunk: Chunk) -> bool:
        return len(chunk.sequence.tokens) + MOST_GUESSES <= self._n_cells

    def spare(self, chunks: dict[int, Chunk]) -> list[Place]:
        """For rows that nobody wants in a step of these: only neighbours with as many tokens are
        computed together."""
        n = len(chunks)
        is_even = chunks.keys() == set(range(len(self._lanes)))
        is_even = is_even and all(len(chunk.tokens) == 1 for chunk in chunks.values())
        return [(lane, 0) for lane in range(n, self._n_lanes)] if is_even else []

    # a memory

    def truncate(self, slot: int, n_tokens: int) -> bool:
        if slot in self._lanes and n_tokens >= self._n_home[slot]:
            return bool(lib.llama_memory_seq_rm(self._memory, self._lanes[slot], n_tokens, -1))
        self._leave(slot)
        return self._home.truncate(slot, n_tokens)

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        self._want(source, n_tokens)
        self._home.share(source, slot, n_tokens)

    def save(self, slot: int, start: int, end: int) -> Saved | None:
        self._want(slot, end)
        return self._home.save(slot, start, end)

    def clear(self, slot: int) -> None:
        self._leave(slot)
        self._home.clear(slot)

    def _want(self, slot: int, n_tokens: int) -> None:
        """Somebody wants the first cells of a slot at home."""
        if slot in self._lanes and n_tokens > self._n_home[slot]:
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
        """Copy the cells of a slot into a free lane. It stays at home where that fails."""
        n, lane = state_size(self._home.context, slot), self._free_lane()
        try:
            state = self._room(n + NO_CELLS * (self._n_lanes - 1))
        except MemoryError:
            self._give_up("There is no memory to copy cells")
            return
        state[n:] = 0
        is_read = read_state(self._home.context, slot, state[:n])
        state[HEAD - 4 : HEAD].view(np.uint32)[0] = self._n_lanes
        if is_read and write_state(self.context, lane, state):
            self._lanes[slot], self._n_home[slot] = lane, n_tokens
        else:
            self._give_up("Cells cannot be copied")

    def _close_gaps(self) -> None:
        """Only neighbours are computed together. Of those that are not in a step some may lie
        between, until they are moved out."""
        while (free := self._free_lane()) < len(self._lanes):
            slot = max(self._lanes, key=self._lanes.__getitem__)
            lane = self._lanes[slot]
            state = self._room(state_size(self.context, lane))
            if not (
                read_state(self.context, lane, state) and write_state(self.context, free, state)
            ):
                self._give_up("Cells cannot be copied")
                return
            lib.llama_memory_seq_rm(self._memory, lane, -1, -1)
            self._lanes[slot] = free

    def _bring_home(self, slot: int) -> None:
        """Copy home what is there of a lane's sequence alone, and free the lane."""
        lane, n_home = self._lanes[slot], self._n_home[slot]
        end = lib.llama_memory_seq_pos_max(self._memory, lane) + 1
        if end > n_home:
            self._room(state_size(self.context, lane))  # or fail before anything is changed
            lib.llama_memory_seq_rm(self._memory, lane, 0, n_home)
            state = self._room(state_size(self.context, lane))
            is_read = read_state(self.context, lane, state)
            head, n_before = state[:HEAD].copy(), NO_CELLS * lane
            head[HEAD - 4 :].view(np.uint32)[0] = 1
            state = state[n_before : state.nbytes - NO_CELLS * (self._n_lanes - 1) + n_before]
            state[:HEAD] = head
            if not (is_read and self._home.load(slot, state, n_home, end)):
                raise RuntimeError("llama.cpp cannot copy cells out of a lane")
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        """Free the lane of a slot that has one."""
        if slot in self._lanes:
            lib.llama_memory_seq_rm(self._memory, self._lanes.pop(slot), -1, -1)
            del self._n_home[slot]

    def _free_lane(self) -> int:
        """The first; `n_lanes` where there is none."""
        in_use = set(self._lanes.values())
        return next(lane for lane in range(self._n_lanes + 1) if lane not in in_use)

    def _room(self, n_bytes: int) -> Bytes:
        if n_bytes > self._buffer.nbytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        return self._buffer[:n_bytes]
