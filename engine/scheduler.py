"""Decides which tokens of which sequences the next decode call computes.

No thread, clock or I/O: `add`, `plan`, `commit`, `cancel` and `fail` are plain calls, and only the
memory that is passed in is touched. A plan is made so:

1. Waiting sequences get slots by rank and age, as long as their prompts fit beside those that run.
   For one of a lower rank than somebody who runs, that one is put off: it goes back to the queue
   with its tokens and its sampler, and its cells go to the prefix tree. A newcomer begins with the
   cells of the longest beginning that anybody has: one that runs, one that ended, or one in the
   prefix tree. It waits while another's prefill is about to make a longer one.
2. Cells of ended sequences move to the prefix tree, since every cell in use slows the steps: a
   block in each step, and beside prompts alone as many more as they have, a batch at most.
3. Every sequence that is past its prompt gets one token. Where cells are missing, those of ended
   sequences move out at once, least recently used first; then the last of those that run is put
   off, by rank and age.
4. Where there is no prompt to compute, sequences get guesses of their next tokens beside that one,
   as far as that pays.
5. Prompts share what the pace allows beside the running streams: the shortest first, and a prompt
   counts as shorter the longer it has been here, and the lower its rank is.
"""

from bisect import insort
from dataclasses import dataclass

from engine.backends.base import Memory
from engine.cells import Cells, view
from engine.marks import Kept
from engine.pace import Pace
from engine.prefix import Match, PrefixTree, Tokens, n_common
from engine.speculation import Guesses, Speculation
from engine.types import Batch, Chunk, Sequence, is_one_steady_job, order

WORTH_WAITING_FOR = 32  # tokens that another's prefill would save; fewer are faster computed
MOST_SCORED = 64  # tokens of prompts in a step whose logits are wanted, each a row to look at
OF_KEPT = 16  # parts of a slot that is kept, of which more than one must be of use
NOT_WORTH_RECALLING = 8  # tokens in the prefix tree: they are as fast computed
RANKING = 256  # tokens that a prompt counts as shorter for each rank (a second) that it is lower
AGEING = 32  # tokens that a prompt counts as shorter for each step since it got its slot


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one sequence at a time. Idle, it still holds the last one's cells."""

    index: int
    sequence: Sequence | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where the first `n_tokens` of a newcomer's prompt come from: a slot, the prefix tree, or a
    slot that is kept."""

    n_tokens: int = 0
    slot: Slot | None = None
    match: Match | None = None
    kept: Kept | None = None


class Scheduler:
    def __init__(
        self,
        memory: Memory,
        *,
        n_slots: int,
        n_ctx: int,
        n_cells: int,
        n_batch: int,
        pace: Pace,
        tree: PrefixTree,
        speculation: Speculation | None = None,
        n_scored: int = MOST_SCORED,
    ) -> None:
        has_guesses = speculation is not None
        self._cells = Cells(memory, tree, n_slots=n_slots, n_cells=n_cells, has_guesses=has_guesses)
        self._n_ctx = n_ctx
        self._n_batch = n_batch
        self._n_scored = n_scored
        self._pace = pace
        can_guess = self._cells.takes_back or self._cells.can_mark
        self._speculation = speculation if can_guess else None
        self._slots = [Slot(i) for i in range(n_slots)]
        self._ended: dict[int, Slot] = {}  # slots whose sequences ended, in that order
        self._waiting: list[Sequence] = []  # both by rank, then by age: ids grow with arrival
        self._running: list[Sequence] = []
        self._n_plans = 0
        self._is_full = False

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt must be shorter than the cells."""
        insort(self._waiting, sequence, key=order)

    def cancel(self, id: int) -> None:
        """Forget a sequence, wherever it is. Its slot keeps the cells for who comes next."""
        for sequence in self._waiting:
            if sequence.id == id:
                self._waiting.remove(sequence)
                return
        for sequence in self._running:
            if sequence.id == id:
                self._release(sequence)
                self._is_full = False
                return

    def plan(self) -> tuple[Batch, list[Sequence]]:
        """The next batch (empty only when idle) and the sequences that got their first slot."""
        self._n_plans += 1
        started = self._admit()
        self._move_out_some()
        while True:
            batch = Batch(n_held=self._cells.n_held)
            self._plan_decodes(batch)
            self._plan_guesses(batch)
            self._plan_prefills(batch)
            if batch.chunks or not self._running or not self._make_room():
                return batch, started

    def commit(self, batch: Batch, seconds: float) -> None:
        """The batch was computed in so many seconds. Each sequence whose chunk wanted logits must
        get a token by `take`, or be cancelled, before the next plan."""
        n_prefill = batch.n_prefill
        if not batch.n_guesses and not batch.n_again:
            self._pace.observe(batch.n_decodes, n_prefill, seconds, is_beginning=batch.is_beginning)
        if self._speculation and not n_prefill and not batch.n_again:
            self._speculation.observe(batch.n_tokens, seconds)
        for chunk in batch.chunks:
            mark = self._next_mark(chunk.sequence)
            chunk.sequence.n_scored += chunk.n_scored
            self._cells.extend(chunk.slot, chunk.tokens)
            chunk.sequence.n_past = chunk.end
            if chunk.end == mark:
                self._cells.mark(chunk.slot)

    def take(self, chunk: Chunk, token: int) -> bool:
        """A sequence gets its next token. True where that was guessed: then the logits after it
        are there too. Else the cells of what was guessed are dropped."""
        sequence = chunk.sequence
        sequence.tokens.append(token)
        n_right = len(sequence.tokens) - 1 - chunk.end
        if n_right < len(chunk.guesses) and chunk.guesses[n_right] == token:
            sequence.n_past += 1
            return True
        self._drop_guesses(sequence)
        return False

    def fail(self, batch: Batch) -> list[Sequence]:
        """The batch could not be computed: its sequences end and their cells are freed."""
        failed = [chunk.sequence for chunk in batch.chunks]
        for sequence in failed:
            self._cells.clear(self._release(sequence).index)
        self._is_full = False
        return failed

    def lose(self, batch: Batch) -> None:
        """The batch was not computed, and the cells of its sequences are lost: all that they have
        is computed anew."""
        for chunk in batch.chunks:
            self._cells.clear(chunk.slot)
            chunk.sequence.n_past = 0

    def lack_cells(self, batch: Batch) -> bool:
        """The memory had no room for a batch that should have fitted: its guesses are given up, or
        something else, and nobody joins until somebody ends. False if there is nothing."""
        self._is_full = True
        return batch.n_guesses > 0 or self._make_room()

    # 1. slots

    def _admit(self) -> list[Sequence]:
        started = []
        n_passed_over = 0
        for sequence in list(self._waiting):
            if (self._is_full and self._running) or n_passed_over == len(self._slots):
                break
            if len(self._running) == len(self._slots) and not self._outranks(sequence):
                break
            wanted = view(sequence.tokens)[:-1]  # the last is decoded for its logits
            reuses = sequence.reuses or sequence.has_started
            if sequence.n_to_score:
                wanted = wanted[: sequence.n_scored]
            if not reuses and sequence.goes_on_from is None:
                wanted = wanted[:0]
                if not self._running:
                    self._empty()  # also where cells lie in the memory changes last digits
            if self._is_coming(wanted) if reuses else self._waits_for_first(sequence, wanted):
                n_passed_over += 1
                continue
            source = self._source(wanted, recalls=reuses)
            lasting = [other for other in self._running if other.rank <= sequence.rank]
            if not self._fits(sequence, source, lasting):  # nobody is put off for nothing
                break
            if len(self._running) == len(self._slots):
                self._put_off_last()
                source = self._source(wanted, recalls=reuses)
            while not self._fits(sequence, source, self._running) and self._outranks(sequence):
                self._put_off_last()
                source = self._source(wanted, recalls=reuses)
            if not self._fits(sequence, source, self._running):
                break
            self._waiting.remove(sequence)
            self._occupy(sequence, source)
            if not sequence.has_started:
                sequence.has_started = True
                sequence.n_cached = sequence.n_past
                started.append(sequence)
        return started

    def _outranks(self, sequence: Sequence) -> bool:
        """Somebody who runs comes after it, and can be put off without loss."""
        return sequence.rank < self._running[-1].rank and self._cells.can_share

    def _put_off_last(self) -> None:
        last = self._running[-1]
        self._cells.move_out(self._release(last).index)
        self.add(last)

    def _source(self, wanted: Tokens, *, recalls: bool) -> Source:
        """The longest beginning that is there; of equal ones a slot's, and an idle slot's first.
        Only of a slot's, if nothing may be recalled."""
        best = Source()
        for slot in sorted(self._slots, key=lambda slot: slot.sequence is not None):
            n_tokens = self._cells.n_common(slot.index, wanted)
            is_usable = slot.sequence is None or self._cells.can_share or self._cells.can_mark
            if is_usable and n_tokens > best.n_tokens:
                best = Source(n_tokens, slot)
        if not recalls:
            return best
        match = self._cells.match(wanted)
        if match.n_tokens > max(best.n_tokens, NOT_WORTH_RECALLING):
            return Source(match.n_tokens, None, match)
        n_kept, kept = self._cells.match_kept(wanted)
        if kept is not None and self._is_worth_taking(kept, n_kept - best.n_tokens):
            return Source(n_kept, None, None, kept)
        return best

    def _is_worth_taking(self, kept: Kept, n_gained: int) -> bool:
        """All of it is loaded, whatever is of use, and has room beside those that run."""
        running = [slot.index for slot in self._slots if slot.sequence is not None]
        has_room = len(kept.tokens) <= self._n_room(running)
        return has_room and n_gained > max(NOT_WORTH_RECALLING, len(kept.tokens) // OF_KEPT)

    def _waits_for_first(self, sequence: Sequence, wanted: Tokens) -> bool:
        """The one that it goes on from has not come through its prompt. If that has ended by now
        its slot still has the prompt, and else it is computed anew."""
        for other in (*self._running, *self._waiting):
            if other.id == sequence.goes_on_from and not other.is_decoding:
                if other.slot is not None and not self._cells.can_share:
                    self._cells.want_mark(other.slot, len(wanted))
                return True
        return False

    def _is_coming(self, wanted: Tokens) -> bool:
        """Somebody's prefill is on its way to a beginning of `wanted` that is worth waiting for."""
        prefilling = [other for other in self._running if not other.is_decoding]
        coming = [
            (n_tokens, other)
            for other in prefilling
            if (n_tokens := n_common(view(other.tokens), wanted)) > other.n_past
            and (self._cells.can_share or self._can_mark(other))
        ]
        if not coming:
            return False
        settled = [
            self._cells.n_common(slot.index, wanted)
            for slot in self._slots
            if slot.sequence not in prefilling
        ]
        n_kept, _ = self._cells.match_kept(wanted)
        n_settled = max(self._cells.match(wanted).n_tokens, n_kept, *settled, 0)
        n_coming, other = max(coming, key=lambda of: of[0])
        if n_coming < n_settled + WORTH_WAITING_FOR:
            return False
        if not self._cells.can_share:
            assert other.slot is not None
            self._cells.want_mark(other.slot, n_coming)
        return True

    def _fits(self, sequence: Sequence, source: Source, beside: list[Sequence]) -> bool:
        """The prompt, and what is still to come of those beside it, fits into the cells that these
        do not hold. Cells that they hold too cost nothing."""
        if not beside:
            return True
        slots = [other.slot for other in beside if other.slot is not None]
        n_new = len(sequence.tokens) + 1
        if source.slot is not None and self._cells.shares_cells:
            n_new -= self._cells.n_also_in(source.slot.index, source.n_tokens, slots)
        n_pending = sum(other.n_pending for other in beside)
        return n_new + n_pending <= self._n_room(slots)

    def _n_room(self, slots: list[int]) -> int:
        """Cells that are free, or that only others than these slots hold."""
        others = [slot.index for slot in self._slots if slot.index not in slots]
        return self._cells.n_free + self._cells.n_only_in(others)

    def _occupy(self, sequence: Sequence, source: Source) -> None:
        """Give a slot to a newcomer, with the cells of its source.

        1. What an idle slot holds goes on in it, if that is all the beginning of the newcomer's
           prompt, or if no slot is empty; what it knows beyond moves out first. Where it cannot
           move out it is lost; so there it may be the last answer, or less than what the newcomer
           takes over, or no other slot or no cells may be left.
        2. Else an empty slot gets the cells; if there is none, the idle slot that was not used for
           longest moves out.
        """
        if source.match is not None:
            self._cells.touch(source.match)  # or it might be forgotten for what moves out now
        if source.kept is not None:
            self._cells.touch_kept(source.kept)
        slot = source.slot
        n_held = len(self._cells.tokens[slot.index]) if slot else 0
        empty = [s for s in self._slots if s.sequence is None and not self._cells.tokens[s.index]]
        target = empty[0] if empty else self._idle()[0]
        n_beyond = n_held - source.n_tokens
        if self._cells.can_share:
            is_left = n_beyond > 0 and bool(empty)
        else:
            is_left = self._is_worth_leaving(source, sequence) and (
                bool(empty) or (n_beyond > source.n_tokens and target is not slot)
            )
        if slot is None or slot.sequence is not None or is_left:
            self._cells.move_out(target.index)
            if slot is not None:
                if not self._cells.shares_cells:
                    self._make_room_for(len(sequence.tokens))
                self._cells.share(slot.index, target.index, source.n_tokens)
            elif source.match is not None:
                self._make_room_for(len(sequence.tokens))
                self._cells.recall(target.index, source.match)
            elif source.kept is not None:
                self._make_room_for(max(len(sequence.tokens), len(source.kept.tokens)))
                self._cells.take_back(target.index, source.kept, source.n_tokens)
            slot = target
        elif source.n_tokens < n_held:
            self._cells.remember(slot.index)
            self._cells.truncate(slot.index, source.n_tokens)
        self._ended.pop(slot.index, None)
        slot.sequence = sequence
        sequence.slot = slot.index
        sequence.n_past = len(self._cells.tokens[slot.index])
        sequence.admitted_at = self._n_plans
        insort(self._running, sequence, key=order)

    def _is_worth_leaving(self, source: Source, sequence: Sequence) -> bool:
        """An idle slot that cannot move out has more than is of use now, and another has room."""
        if source.slot is None or source.slot.sequence is not None:
            return False
        has_room = self._cells.shares_cells or self._cells.n_free >= len(sequence.tokens)
        return has_room and self._cells.has_mark_behind(source.slot.index, source.n_tokens)

    def _make_room_for(self, n_tokens: int) -> None:
        """Move idle slots out until so many have room."""
        for slot in self._idle():
            if self._cells.n_free >= n_tokens:
                break
            self._cells.move_out(slot.index)

    def _empty(self) -> None:
        """Move everything out of the cells."""
        for slot in self._idle():
            self._cells.move_out(slot.index)

    def _idle(self) -> list[Slot]:
        """Slots with the cells of an ended sequence, least recently used first."""
        for index in [index for index in self._ended if not self._cells.tokens[index]]:
            del self._ended[index]
        return list(self._ended.values())

    def _release(self, sequence: Sequence) -> Slot:
        assert sequence.slot is not None
        self._drop_guesses(sequence)
        slot = self._slots[sequence.slot]
        slot.sequence = None
        self._ended[slot.index] = slot
        sequence.slot = None
        sequence.n_past = 0
        self._running.remove(sequence)
        return slot

    # 2. ended sequences

    def _move_out_some(self) -> None:
        idle = self._idle()
        if not (self._running and idle):
            return
        is_alone = not any(sequence.is_decoding for sequence in self._running)  # nobody waits
        if not self._cells.can_share:
            if self._cells.can_mark and is_alone:  # whole, which takes too long beside streams
                any(self._cells.put_away(slot.index) for slot in idle)
            return
        if is_one_steady_job(self._running):  # whatever the tree knows of it already
            self._empty()
            return
        n_to_move = self._cells.block
        if is_alone:
            n_pending = sum(sequence.n_pending for sequence in self._running)
            n_to_move += min(n_pending, self._n_batch)
        for _ in range(n_to_move // self._cells.block):
            idle = self._idle()
            if not idle or not self._cells.move_out_block(idle[0].index):
                break

    # 3. one token for each sequence that is past its prompt

    def _plan_decodes(self, batch: Batch) -> None:
        while True:
            decoding = [s for s in self._running if s.is_decoding][: self._n_batch]
            n_pending = sum(sequence.n_pending for sequence in decoding)
            if self._cells.n_free >= n_pending or not self._make_room():
                break
        n_left = min(self._n_batch, self._cells.n_free)
        for n_before, sequence in enumerate(decoding[:n_left]):
            n_others = len(decoding) - n_before - 1  # whose token comes first
            n_tokens = min(sequence.n_pending, max(n_left - n_others, 1))
            batch.add(sequence, n_tokens)
            n_left -= n_tokens

    def _make_room(self) -> bool:
        """Free some cells; False when nothing is left to give up."""
        if idle := self._idle():
            self._cells.move_out(idle[0].index)
            return True
        if len(self._running) < 2:
            return False
        self._put_off_last()
        return True

    # 4. guesses

    def _plan_guesses(self, batch: Batch) -> None:
        if not self._speculation or self._is_full or len(batch.chunks) < len(self._running):
            return
        if batch.n_again:  # or more and more would be computed again
            return
        guessing = []
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if not sequence.reuses:  # has the same numbers only in the same batches
                continue
            sequence.guesses = sequence.guesses or Guesses()
            sequence.guesses.follow(sequence.tokens)
            if sequence.guesses.exist:
                guessing.append(chunk)
        n_room = min(self._n_batch, self._cells.n_free) - batch.n_tokens
        n_others = len(batch.chunks) - len(guessing)
        trusts = [chunk.sequence.guesses.trust for chunk in guessing]
        numbers = self._speculation.plan(trusts, n_others, n_room)
        for chunk, n in zip(guessing, numbers, strict=True):
            tokens = chunk.sequence.tokens
            n = min(n, self._n_ctx - len(tokens))  # a model may have no more positions
            if n > 0 and self._cells.can_drop(chunk.slot):
                batch.guess(chunk, chunk.sequence.guesses.next(tokens, n))

    def _drop_guesses(self, sequence: Sequence) -> None:
        """Cells hold no more than what was said."""
        assert sequence.slot is not None
        self._cells.drop(sequence.slot, sequence.n_past)
        sequence.n_past = len(self._cells.tokens[sequence.slot])

    # 5. prompts

    def _plan_prefills(self, batch: Batch) -> None:
        prefilling = [s for s in self._running if not s.is_decoding]
        if not prefilling:
            return
        prefilling.sort(key=self._length)
        lengths = [sequence.n_pending for sequence in prefilling]
        n_left = min(self._n_batch - batch.n_tokens, sum(lengths))
        if not is_one_steady_job(self._running):  # which has the same chunks every time
            burst = lengths if batch.is_beginning else ()
            n_left = self._pace.n_prefill(batch.n_decodes, n_left, burst)
        while self._cells.n_free - batch.n_tokens < n_left and self._idle():
            self._make_room()
        n_left = min(n_left, self._cells.n_free - batch.n_tokens)
        n_rows = self._n_scored
        for sequence in prefilling:
            n_tokens = min(sequence.n_pending, n_left)
            if sequence.n_to_score:
                n_tokens = min(n_tokens, max(sequence.n_scored - sequence.n_past, 0) + n_rows)
            if mark := self._next_mark(sequence):
                n_tokens = min(n_tokens, mark - sequence.n_past)
            if n_tokens <= 0:
                continue
            batch.add(sequence, n_tokens)
            n_rows -= batch.chunks[-1].n_scored
            n_left -= n_tokens

    def _next_mark(self, sequence: Sequence) -> int:
        """Where its prompt is to be marked next, so that a chunk must end there; 0: nowhere."""
        if not self._can_mark(sequence):
            return 0
        assert sequence.slot is not None
        return self._cells.next_mark(sequence.slot, sequence.n_prompt)

    def _can_mark(self, sequence: Sequence) -> bool:
        """Without reuse it is computed in the same chunks every time: it makes marks only if other
        answers of its job wait."""
        return self._cells.can_mark and (
            sequence.reuses or any(other.goes_on_from == sequence.id for other in self._waiting)
        )

    def _length(self, sequence: Sequence) -> float:
        """Of what is pending, as it counts."""
        n_plans = self._n_plans - sequence.admitted_at
        return sequence.n_pending - AGEING * n_plans + RANKING * sequence.rank
