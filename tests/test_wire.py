"""Frames between the server and a worker."""

import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from engine import wire
from engine.types import SamplingParams

SPEC = wire.WorkerSpec(
    name="light",
    backend="fake",
    model_path="/models/müsli.gguf",
    n_ctx=8192,
    n_parallel=8,
    kv_tokens=65536,
    n_batch=512,
    n_threads=2,
    n_gpu_layers=-1,
    log_level="DEBUG",
    encoder=wire.EncoderSpec(kind="embedding", pooling="mean", query_prefix="query: "),
)
TO_WORKER: list[wire.ToWorker] = [
    wire.Load(SPEC),
    wire.Generate(
        [wire.Segment("<|user|>", True), wire.Segment("über 世界 \0", False)],
        True,
        SamplingParams(temperature=0, seed=2**32 - 1),
        ["\n", "END"],
        None,
        wire.Grammar((wire.GrammarPart("json_schema", '{"type": "object"}', "response_format"),)),
        wire.Thinking("<think>", "</think>", False, 5, "</think>"),
        ["[TOOL_CALLS]"],
        wire.Calls(("[TOOL_CALLS]",), True, ("<function=",)),
        {"5": -100.0},
        False,
        2,
        7,
    ),
    wire.Generate([1, 2, 0], False, SamplingParams(), [], 0),
    wire.Tokenize([wire.Segment("über 世界 \0", False)], True, 7),
    wire.Detokenize([0, 1, 151935], 7),
    wire.Embed(["über 世界 \0", [1, 2]], ["dense", "sparse"], "start", "query", True, 7),
    wire.Score(["q"], ["a", "b"], [(0, 1), (0, 0)], "hybrid", (0.5, 0.25, 1), 512, "none", 7),
    wire.Cancel(7),
    wire.Ping(),
    wire.Shutdown(),
]
TOKEN = wire.TokenLogprob(b"\xe4", "", -0.5, [(b"a", -1.5)])
FROM_WORKER: list[wire.FromWorker] = [
    wire.Progress(0.25),
    wire.Ready(8192, 8),
    wire.LoadFailed("The file is no model."),
    wire.Started(7, 100, 99),
    wire.Step([]),
    wire.Step(
        [
            wire.TokenOut(7, "half"),
            wire.TokenOut(8, "", wire.Done("stop", 3)),
            wire.TokenOut(9, "世", wire.Done("length", 4, -0.5), 2, 4, [TOKEN]),
        ]
    ),
    wire.Failed(7, None, "A fault."),
    wire.Failed(8, "context_length_exceeded", "Too long.", "messages", {"n_ctx": 8192}),
    wire.Tokens(7, [5, 6], [b"\xe4", b"\xb8\x96"]),
    wire.Text(7, "世界"),
    wire.Ready(512, 256, wire.EncoderInfo(["dense"], ["dense"], 64)),
    wire.Vectors(
        7,
        [
            wire.Vector(
                3, 5, 1, b"\0\0\x80?", b"\x05\0\0\0", b"\0\0\x80?", b"", [1], [b"a"], None, 2.5
            ),
            wire.Vector(4, 5, fault=wire.Fault("internal_error", "A fault.")),
        ],
    ),
    wire.Scores(7, [wire.Scored(1, 9, 0, -1.5)], "cross-encoder", "logit"),
    wire.Pong(),
]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def read_all(data: bytes, size: int | None = None) -> list[wire.FromWorker]:
    """What the server hears when these bytes come, in pieces of this size."""
    frames = wire.Frames()
    pieces = [data[at : at + size] for at in range(0, len(data), size)] if size else [data]
    return [message for piece in pieces for message in frames.feed(piece)]


def test_every_message_is_in_these_tests() -> None:
    assert {type(message) for message in TO_WORKER} == set(wire.ToWorker.__args__)
    assert {type(message) for message in FROM_WORKER} == set(wire.FromWorker.__args__)


def test_a_worker_receives_what_was_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"".join(map(wire.frame, TO_WORKER)))
    assert [wire.receive(theirs) for _ in TO_WORKER] == TO_WORKER


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_the_server_hears_what_was_sent_however_it_is_cut(size: int | None) -> None:
    assert read_all(b"".join(map(wire.frame, FROM_WORKER)), size) == FROM_WORKER


def test_a_frame_that_comes_in_pieces_is_put_together(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    long = wire.Generate([wire.Segment("long " * 300_000, False)], False, SamplingParams(), [], 1)
    sender = threading.Thread(target=ours.sendall, args=(wire.frame(long),))
    sender.start()  # more than a socket's buffer holds
    assert wire.receive(theirs) == long
    sender.join()


def test_a_frame_is_a_length_and_a_message_with_its_name() -> None:
    data = wire.frame(wire.Started(7, 100, 99, ("tools",)))
    assert struct.unpack("<I", data[:4]) == (len(data) - 4,)
    assert msgspec.msgpack.decode(data[4:]) == ["Started", 7, 100, 99, ["tools"]]


@pytest.mark.parametrize("n_bytes", [0, 1, 3, 4, 5, -1])
def test_an_end_in_the_middle_of_a_frame_is_none(
    n_bytes: int, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    ours.sendall(wire.frame(wire.Cancel(7))[:n_bytes])
    ours.shutdown(socket.SHUT_WR)
    assert wire.receive(theirs) is None
    assert read_all(wire.frame(wire.Started(7, 1, 0))[:n_bytes]) == []


def test_a_closed_socket_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.close()
    assert wire.receive(theirs) is None
    theirs.close()
    assert wire.receive(theirs) is None


@pytest.mark.parametrize("length", [wire.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_over_the_limit_is_an_error_and_takes_no_memory(
    length: int, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    head = struct.pack("<I", length)
    ours.sendall(head)
    with pytest.raises(ValueError, match=f"{length} bytes"):
        wire.receive(theirs)
    with pytest.raises(ValueError, match=f"{length} bytes"):
        read_all(head)


def test_a_message_of_the_other_direction_is_an_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    ours.sendall(wire.frame(wire.Pong()))
    with pytest.raises(msgspec.ValidationError):
        wire.receive(theirs)
    with pytest.raises(msgspec.ValidationError):
        read_all(wire.frame(wire.Ping()))


def test_a_message_with_a_wrong_type_in_it_is_an_error() -> None:
    body = msgspec.msgpack.encode(["Started", "seven", 1, 0])
    with pytest.raises(msgspec.ValidationError):
        read_all(struct.pack("<I", len(body)) + body)
