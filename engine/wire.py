"""The messages between the server process and a worker, and how they are framed.

A frame is a 4-byte little-endian length and that many bytes of msgpack: one message. The first
frame to a worker is Load. Its answer is Ready or LoadFailed, with Progress before it.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Literal, Union

import msgspec

from engine.types import (
    Finish,
    Method,
    Output,
    Pooling,
    Role,
    SamplingParams,
    Scale,
    Truncate,
)

MAX_FRAME_BYTES = 1 << 30
MAX_GRAMMAR_BYTES = 256 << 10
_LENGTH = struct.Struct("<I")


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a worker one that embeds or scores."""

    kind: Literal["embedding", "reranker"]
    batch_tokens: int = 512  # of one call; a longer text travels alone
    pooling: Pooling | None = None  # None: as the file says
    query_prefix: str = ""
    passage_prefix: str = ""
    sparse_head_path: str = ""  # empty: beside the model
    colbert_head_path: str = ""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker needs to know. It never reads settings or the environment's `.env`."""

    name: str  # the tier's, for logs
    backend: str
    model_path: str
    n_ctx: int  # most tokens of one request, prompt and answer
    n_parallel: int  # sequences at once
    kv_tokens: int  # cells that all sequences share
    lane_tokens: int = 0  # cells apart for each sequence beside others; 0: they only share
    n_batch: int
    n_threads: int
    n_gpu_layers: int  # negative: all
    max_stall_s: float | None = (
        None  # that a prompt may hold up running streams; None: by their pace
    )
    prefix_cache_bytes: int = 0  # for cells of ended sequences, in memory of the host
    speculates: bool = False  # guesses tokens from what was said before, where that pays
    flash_attention: bool = True  # where llama.cpp has it for this model
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    encoder: EncoderSpec | None = None  # None: it generates


class Segment(msgspec.Struct, frozen=True):
    """A piece of a prompt's text. Control tokens are recognised only where `parse_special`."""

    text: str
    parse_special: bool


class GrammarPart(msgspec.Struct, frozen=True):
    """A JSON schema as JSON text, or a grammar as Lark or GBNF."""

    kind: Literal["json_schema", "grammar"]
    text: str
    param: str  # the client's field, for faults
    is_lenient: bool = False  # what of a schema cannot be enforced is read over, not refused


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like: Lark in which `@p0` is the first part, and so on.

    In it `«x»` stands for the text x, or for the control token of that name where the model has
    one, `«spaced x»` for the same behind spaces or none. `«»` stands for any text, `«until x»` for
    any that ends with the first x, and `«unlike P»` and `«unlike P until x»` for such whose
    beginning does not fit the regular expression P. None of these texts has a control token in it,
    nor one of the frame's spelt in letters, but for those of `«inside until x»`: only x may not be
    spelt in them. `«inside {2,5} until x»` says how many characters come before x.
    """

    parts: tuple[GrammarPart, ...]
    frame: str = "start: @p0"

    @property
    def param(self) -> str:
        """The client's field, for faults that are not of one part. Only tools are without any."""
        params = [part.param for part in self.parts]
        return params[0] if params and not params[-1].startswith("tools") else "tools"


class Thinking(msgspec.Struct, frozen=True):
    """A model's thoughts: what comes before the first `close`, if the prompt ends inside them or
    the answer begins with `open`. Stop strings count after them. With `again` another `open`
    anywhere begins more of them.

    An answer that is several messages has `heads`, what those of messages begin with, and `body`,
    which ends each head. Then every message ends with `close`, those with `open` in their heads are
    thoughts, the first with `call` in its head is a call and the rest of the answer, and stop
    strings count in the others' bodies."""

    open: str
    close: str
    is_open: bool
    budget: int | None  # tokens, after which `ending` is put into the model's mouth
    ending: str
    heads: tuple[str, ...] = ()
    body: str = ""
    call: str = ""
    again: bool = False


class Calls(msgspec.Struct, frozen=True):
    """What tool calls begin with. The grammar lets nothing else be, so with the first of them the
    text is over, and stop strings count no more."""

    openers: tuple[str, ...]
    only_first: bool = False  # behind other text they are text too
    line_openers: tuple[str, ...] = ()  # which count only at the beginning of a line


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of every message: a msgpack array that begins with the class's name."""


# to the worker


class Load(Message, frozen=True):
    spec: WorkerSpec


class Generate(Message, frozen=True):
    prompt: list[Segment | int]  # text in segments, or token ids
    add_bos: bool  # begin a text prompt with the vocabulary's BOS, if it wants one
    sampling: SamplingParams
    stop: list[str]
    max_tokens: int | None  # None: to the end of the context
    grammar: Grammar | None = None
    thinking: Thinking | None = None
    visible: list[str] = []  # control tokens that the answer's text shows; the others are no text
    calls: Calls | None = None  # that may come; of an answer in messages `thinking` tells them
    logit_bias: dict[str, float] = {}  # by token id in decimal, or by text: for each of its tokens
    reuse: bool = True  # of what other requests have computed
    n: int = 1  # answers to the one prompt; the i-th is sampled with seed + i
    rank: float = 0.0  # the least is served first, and puts off others where there is no place
    job: int = 0  # given by the tier


class Tokenize(Message, frozen=True):
    """Answered by Tokens. Needs no sequence, so it never waits for one."""

    segments: list[Segment]
    add_bos: bool
    job: int = 0  # given by the tier


class Detokenize(Message, frozen=True):
    """Answered by Text, in the same way."""

    tokens: list[int]
    job: int = 0  # given by the tier


class Embed(Message, frozen=True):
    """Answered by Vectors until there is one for each input, in any order."""

    inputs: list[str | list[int]]  # texts, or token ids of this model
    outputs: list[Output]
    truncate: Truncate = "none"  # none: a text that is too long fails the request
    role: Role = "none"
    return_tokens: bool = False
    max_colbert: int | None = None  # numbers of all ColBERT vectors; more fail the request
    job: int = 0  # given by the tier


class Score(Message, frozen=True):
    """Answered by Scores until there is one for each pair, in any order."""

    queries: list[str]
    documents: list[str]
    pairs: list[tuple[int, int]]  # a query and a document, by their indices
    method: Method | None = None  # None: the model's own
    weights: tuple[float, float, float] | None = None  # hybrid: dense, sparse, colbert; None: alike
    max_tokens: int | None = None  # of a document; what goes beyond is always cut
    truncate: Truncate = "end"  # a document, where it does not fit; none: the request fails
    job: int = 0  # given by the tier


class Cancel(Message, frozen=True):
    job: int


class Ping(Message, frozen=True):
    """Answered by Pong from the step loop, so a Pong proves that the loop turns."""


class Shutdown(Message, frozen=True):
    pass


# from the worker


class Progress(Message, frozen=True):
    fraction: float  # 0…1 of the load


class EncoderInfo(msgspec.Struct, frozen=True, array_like=True):
    """What an encoder can do."""

    outputs: list[Output]  # empty: it makes no vectors
    methods: list[Method]  # of scoring; the first is its own
    n_embd: int  # length of a dense vector
    n_colbert: int = 0  # length of a ColBERT row


class Ready(Message, frozen=True):
    n_ctx: int
    n_parallel: int  # jobs that it takes at once
    encoder: EncoderInfo | None = None


class LoadFailed(Message, frozen=True):
    reason: str


class Started(Message, frozen=True):
    """The job passed every check and has its place. Nothing before this reaches the client."""

    job: int
    prompt_tokens: int
    cached_tokens: int
    unenforced: tuple[str, ...] = ()  # params of schemas of which no more than a type can be used


class Done(msgspec.Struct, frozen=True, array_like=True):
    finish: Finish
    n_tokens: int
    mean_logprob: float | None = None  # of its tokens, where the sampling asked for it
    is_valid: bool | None = None  # the answer is a whole one by its grammar, where it has one
    stop: str | None = None  # the stop string that ended it
    n_guessed: int = 0  # tokens that were computed before they were chosen
    n_right: int = 0  # of these: that were chosen


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: bytes
    text: str  # the characters that it ends, also if they began before it
    logprob: float | None  # None: the first of a prompt, before which there is nothing
    top: list[tuple[bytes, float]]


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """Text that one step added to one answer; `done` with the last. Text held back comes later, and
    its log probabilities with it."""

    job: int
    text: str
    done: Done | None = None
    index: int = 0  # of the answer
    n_tokens: int = 0  # of the answer up to here
    logprobs: list[TokenLogprob] = []
    prompt: list[TokenLogprob] = []  # where asked for, in parts before what is said, without that


class Step(Message, frozen=True):
    """One frame for all sequences of a step."""

    outs: list[TokenOut]


class Failed(Message, frozen=True):
    """The job ended without an answer; `code` names a class of errors.py by its code."""

    job: int
    code: str | None
    message: str
    param: str | None = None
    numbers: dict[str, int] = {}


class Tokens(Message, frozen=True):
    job: int
    ids: list[int]
    pieces: list[bytes]  # how each is written; a character may be spread over several


class Text(Message, frozen=True):
    job: int
    text: str


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """Why one item of a request has no answer, as in Failed."""

    code: str | None
    message: str


class Vector(msgspec.Struct, frozen=True, array_like=True):
    """What was asked for of one input. Floats are little-endian float32, ids little-endian int32;
    rows of ColBERT stand one after the other, EncoderInfo.n_colbert floats each."""

    index: int  # of the input
    n_tokens: int  # that were computed, with those that the model adds
    n_cut: int = 0  # that were left out
    dense: bytes | None = None  # of length 1
    sparse_ids: bytes | None = None  # token ids, ascending
    sparse_weights: bytes | None = None
    colbert: bytes | None = None  # each row of length 1
    tokens: list[int] | None = None  # that were computed
    pieces: list[bytes] | None = None  # how each is written
    fault: Fault | None = None  # then there are no vectors
    norm: float | None = None  # length of the dense one as it was pooled


class Vectors(Message, frozen=True):
    job: int
    items: list[Vector]


class Scored(msgspec.Struct, frozen=True, array_like=True):
    index: int  # of the pair
    n_tokens: int  # of query and document, with those that the model adds
    n_cut: int = 0  # of the document
    score: float = 0.0
    fault: Fault | None = None  # then the score means nothing
    n_cut_query: int = 0
    # tokens of query and document where each is read once for all its pairs
    n_query: int = 0
    n_document: int = 0


class Scores(Message, frozen=True):
    job: int
    items: list[Scored]
    method: Method
    scale: Scale


class Pong(Message, frozen=True):
    pass


Request = Generate | Tokenize | Detokenize | Embed | Score  # what a worker is asked
# what it says about one of them
OfJob = Started | TokenOut | Failed | Tokens | Text | Vectors | Scores
ToWorker = Union[Load, Request, Cancel, Ping, Shutdown]  # noqa: UP007 (a runtime type)
FromWorker = Union[  # noqa: UP007
    Progress, Ready, LoadFailed, Started, Step, Failed, Tokens, Text, Vectors, Scores, Pong
]

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def receive(sock: socket.socket) -> ToWorker | None:
    """The next message of the server, or None when it has gone. Blocks."""
    head = _receive_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    body = _receive_exactly(sock, _length(head))
    return None if body is None else _to_worker.decode(body)


class Frames:
    """Cuts what a worker sends into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[FromWorker]:
        """The messages that are complete with these bytes; all must be taken. Raises ValueError or
        MsgspecError for what is none."""
        self._rest += data
        at = 0
        with memoryview(self._rest) as rest:
            while len(rest) - at >= _LENGTH.size:
                begin = at + _LENGTH.size
                end = begin + _length(rest[at:begin])
                if end > len(rest):
                    break
                yield _from_worker.decode(rest[begin:end])
                at = end
        del self._rest[:at]


def _length(head: bytes | memoryview) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return int(length)


def _receive_exactly(sock: socket.socket, n_bytes: int) -> memoryview | None:
    buffer = memoryview(bytearray(n_bytes))
    filled = 0
    while filled < n_bytes:
        try:
            n = sock.recv_into(buffer[filled:])
        except OSError:  # reset by the other side, or closed by ours
            return None
        if n == 0:
            return None
        filled += n
    return buffer
