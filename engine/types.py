"""The values that the scheduler and the backends pass to each other."""

from array import array
from collections.abc import Sequence as Sequence_
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

Finish = Literal["stop", "length"]
Output = Literal["dense", "sparse", "colbert"]  # kinds of vectors of a text
Method = Literal["cross-encoder", "dense", "sparse", "colbert", "hybrid"]  # of scoring a pair
EQUAL_WEIGHTS = 1.0, 1.0, 1.0  # of dense, sparse and ColBERT in a hybrid score
Scale = Literal["logit", "probability", "similarity"]  # of scores
Pooling = Literal["cls", "mean", "last"]  # which rows of its tokens make the vector of a text
Truncate = Literal["none", "start", "end"]  # where a text that is too long is cut
Role = Literal["none", "query", "passage"]  # of a text, for models that want a prefix
MOST_GUESSES = 16  # of a sequence in one step
MIN_TEMPERATURE = 1e-4  # below it logits would overflow, and the likeliest token is certain


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Values that switch a rule off: see each line.

    `frequency_penalty` and `presence_penalty` count generated tokens only, as OpenAI defines them;
    `repeat_penalty` looks at the last `repeat_last_n` tokens of prompt and answer, as in llama.cpp.
    Mirostat takes the place of top_k, typical_p, top_p, min_p and XTC.
    """

    temperature: float = 0.8  # 0: greedy
    top_p: float = 0.95  # 1: off
    top_k: int = 40  # 0 or less: off
    min_p: float = 0.05  # 0: off
    typical_p: float = 1.0  # 1: off
    xtc_probability: float = 0.0  # of leaving out all likely tokens but the last; 0: off
    xtc_threshold: float = 0.1  # from which probability on a token is likely; over 0.5: off
    mirostat: int = 0  # version 1 or 2; 0: off
    mirostat_tau: float = 5.0  # the surprise that it aims at, in bits
    mirostat_eta: float = 0.1  # how fast it learns
    dry_multiplier: float = 0.0  # of the penalty for a longer and longer repetition; 0: off
    dry_base: float = 1.75  # its growth with each token beyond the allowed length
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # -1: all, 0: off
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # no repetition goes beyond them
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # -1: all, 0: off
    frequency_penalty: float = 0.0  # 0: off
    presence_penalty: float = 0.0  # 0: off
    seed: int = 0  # 32 bits; the server draws one where the client gave none
    min_tokens: int = 0  # before them the answer does not end by itself
    ignore_eos: bool = False  # nor ever
    logit_bias: dict[int, float] = {}  # added to the logits of these tokens
    # also the log probability of each token, and of so many likeliest ones; None: neither
    n_logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, which is computed anew

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or (self.top_k == 1 and not self.mirostat)


@dataclass(slots=True, eq=False)
class Admitted:
    """A sequence that an engine has taken: one prompt being answered."""

    id: int
    tokens: "array[int]"  # the prompt, then what was sampled
    _: KW_ONLY
    has_started: bool = False  # was given a place before
    reuses: bool = True  # begins with what others have computed, and so with their rounding
    goes_on_from: int | None = None  # or only with what this one has, the first of its job
    prompt_logprobs: int | None = None  # of each of its prompt's tokens, with so many likeliest
    rank: float = 0.0  # the least goes first, and puts off others where there is no place

    @property
    def first(self) -> int:
        """The first of its job, by which such are known that do not reuse."""
        return self.id if self.goes_on_from is None else self.goes_on_from


def order(sequence: Admitted) -> tuple[float, int]:
    """By rank, then by age: ids grow with arrival."""
    return sequence.rank, sequence.id


def is_one_steady_job(sequences: Sequence_[Admitted]) -> bool:
    """All are answers of one job, which is to have the same numbers every time."""
    return not sequences[0].reuses and len({sequence.first for sequence in sequences}) == 1


@dataclass(slots=True, eq=False)
class Sequence(Admitted):
    """`tokens[:n_past]` have KV cells in `slot`, the rest is pending."""

    sampler: Any = None  # the backend's own; survives preemption
    constraint: Any = None  # engine.backends.base.Constraint, or None
    slot: int | None = None
    n_past: int = 0
    n_cached: int = 0  # prompt tokens that needed no decoding
    n_scored: int = 0  # prompt tokens whose logits were wanted
    admitted_at: int = 0  # the plan in which it got its slot
    guesses: Any = None  # engine.speculation.Guesses, made when first wanted
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_past

    @property
    def is_decoding(self) -> bool:
        """It is past its prompt, and has but its last token to be computed; or a few more, of a
        step that is computed again."""
        return self.n_pending == 1 or (
            self.n_past >= self.n_prompt and self.n_pending <= MOST_GUESSES + 1
        )

    @property
    def n_to_score(self) -> int:
        """Prompt tokens whose logits are wanted still. Those of the last are the answer's."""
        return 0 if self.prompt_logprobs is None else self.n_prompt - 1 - self.n_scored


@dataclass(slots=True)
class Chunk:
    """`n_tokens` tokens of one sequence in a batch, from its position `start`, and guesses of what
    comes after them."""

    sequence: Sequence
    start: int
    n_tokens: int
    guesses: "array[int]" = field(default_factory=lambda: array("i"))

    @property
    def end(self) -> int:
        return self.start + self.n_tokens

    @property
    def wants_logits(self) -> bool:
        """The chunk reaches the end of what is known, so the next token is to be sampled."""
        return self.end == len(self.sequence.tokens)

    @property
    def n_scored(self) -> int:
        """Of its tokens before those, the last ones, whose logits say how likely the prompt is."""
        if not self.sequence.n_to_score:
            return 0
        return max(min(self.end, self.sequence.n_prompt - 1) - self.sequence.n_scored, 0)

    @property
    def n_wanted(self) -> int:
        """Its last tokens, whose logits are wanted; those of all guesses are too."""
        return self.n_scored + self.wants_logits

    @property
    def tokens(self) -> "array[int]":
        """All that is computed."""
        return self.sequence.tokens[self.start : self.end] + self.guesses

    @property
    def slot(self) -> int:
        assert self.sequence.slot is not None
        return self.sequence.slot


@dataclass(slots=True)
class Batch:
    """What one decode call computes: at most one chunk per sequence."""

    chunks: list[Chunk] = field(default_factory=list)
    n_tokens: int = 0  # with guesses
    n_decodes: int = 0  # chunks of sequences that are past their prompts
    n_again: int = 0  # tokens of these but the last, which a step before has computed already
    n_new: int = 0  # of these, that have said no more than one token
    n_guesses: int = 0
    n_held: int = 0  # cells in use before it, by whomever

    def add(self, sequence: Sequence, n_tokens: int) -> None:
        if sequence.is_decoding:
            self.n_decodes += 1
            self.n_again += n_tokens - 1
            self.n_new += len(sequence.tokens) <= sequence.n_prompt + 1
        self.chunks.append(Chunk(sequence, sequence.n_past, n_tokens))
        self.n_tokens += n_tokens

    @property
    def n_prefill(self) -> int:
        """Tokens of prompts."""
        return self.n_tokens - self.n_decodes - self.n_again - self.n_guesses

    @property
    def is_steady(self) -> bool:
        return is_one_steady_job([chunk.sequence for chunk in self.chunks])

    @property
    def is_beginning(self) -> bool:
        """No stream has a pace yet, if there are any."""
        return self.n_new == self.n_decodes

    def guess(self, chunk: Chunk, guesses: "array[int]") -> None:
        """Compute these too, behind a chunk that wants logits, and the logits after each."""
        chunk.guesses = guesses
        self.n_tokens += len(guesses)
        self.n_guesses += len(guesses)


class Sampled(NamedTuple):
    """A token; and where the sampling asks for them, log probabilities by the model alone: before
    grammar, bias, penalties and filters."""

    token: int
    logprob: float | None = None
    top: Sequence_[tuple[int, float]] = ()  # the likeliest tokens, best first


@dataclass(slots=True)
class StepResult:
    """What one step of an engine did, by sequence id."""

    started: list[tuple[int, int]] = field(default_factory=list)  # id, prompt tokens reused
    tokens: list[tuple[int, Sampled]] = field(default_factory=list)  # id, token sampled
    scored: list[tuple[int, Sampled]] = field(default_factory=list)  # id, next token of its prompt
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    guessed: list[tuple[int, int]] = field(default_factory=list)  # id, guesses computed
    right: list[int] = field(default_factory=list)  # ids whose token was guessed
