"""The worker: checks of a request, and its loop over a socket on the fake backend."""

import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import generation_jobs
import worker
from engine import wire
from engine.backends import fake
from engine.backends.base import Engine, ReportProgress, load_encoder, load_engine
from engine.batch_engine import MAX_FAILED_STEPS, BatchEngine
from engine.grammar import Compiler
from engine.types import SamplingParams, StepResult
from errors import BadRequest, ContextLengthExceeded, ModelLoadFailed
from settings import ROOT
from worker_requests import convert

WAIT_S = 20


def spec(model_path: str = "", **values: Any) -> wire.WorkerSpec:
    defaults: dict[str, Any] = {
        "name": "light",
        "backend": "fake",
        "n_ctx": 100,
        "n_parallel": 2,
        "kv_tokens": 200,
        "n_batch": 32,
        "n_threads": 1,
        "n_gpu_layers": 0,
        "log_level": "WARNING",
    }
    return wire.WorkerSpec(model_path=model_path, **defaults | values)


def prepare(request: wire.Generate, engine: Engine) -> generation_jobs.Job:
    return generation_jobs.prepare(request, engine, Compiler(engine.tokenizer))


def generate(
    prompt: str | list[wire.Segment | int] = "Hi", *, job: int = 1, **values: Any
) -> wire.Generate:
    if isinstance(prompt, str):
        prompt = [wire.Segment(prompt, True)]
    defaults: dict[str, Any] = {
        "add_bos": False,
        "sampling": SamplingParams(),
        "stop": [],
        "max_tokens": None,
    }
    return wire.Generate(prompt=prompt, job=job, **defaults | values)


# what is checked before a job starts


@pytest.fixture
def engine() -> Engine:
    return fake.load(spec(), lambda fraction: None)


class TokenizerWithBos(fake.FakeTokenizer):
    bos = 7

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        self.calls.append((text, continues))
        return super().tokenize(text, parse_special=parse_special, continues=continues)


def test_an_answer_without_a_limit_goes_to_the_end_of_the_context(engine: Engine) -> None:
    job = prepare(generate("abc"), engine)
    assert (job.prompt, job.max_tokens) == ([97, 98, 99], 97)


@pytest.mark.parametrize(("wanted", "given"), [(0, 0), (1, 1), (97, 97), (98, 97), (10**9, 97)])
def test_the_limit_of_an_answer_is_what_the_context_leaves(
    wanted: int, given: int, engine: Engine
) -> None:
    assert prepare(generate("abc", max_tokens=wanted), engine).max_tokens == given


@pytest.mark.parametrize("prompt", ["", [], [wire.Segment("", True), wire.Segment("", False)]])
def test_an_empty_prompt_is_refused(prompt: str | list[wire.Segment | int], engine: Engine) -> None:
    with pytest.raises(BadRequest, match="empty") as error:
        prepare(generate(prompt), engine)
    assert error.value.param == "prompt"


@pytest.mark.parametrize("token", [-1, fake.FakeTokenizer.n_vocab, 2**31, 2**63 - 1])
def test_token_ids_outside_the_vocabulary_are_refused(token: int, engine: Engine) -> None:
    with pytest.raises(BadRequest, match=f"0 to {fake.FakeTokenizer.n_vocab - 1}"):
        prepare(generate([0, token]), engine)


def test_every_token_id_of_the_vocabulary_is_taken(engine: Engine) -> None:
    ids: list[wire.Segment | int] = [0, 1, fake.FakeTokenizer.n_vocab - 1]
    assert prepare(generate(ids), engine).prompt == ids


def test_the_longest_prompt_leaves_one_token_for_the_answer(engine: Engine) -> None:
    assert prepare(generate("a" * 99), engine).max_tokens == 1


@pytest.mark.parametrize("n_tokens", [100, 101, 5000])
def test_a_prompt_as_long_as_the_context_is_refused_with_the_numbers(
    n_tokens: int, engine: Engine
) -> None:
    with pytest.raises(ContextLengthExceeded) as error:
        prepare(generate("a" * n_tokens, max_tokens=0), engine)
    assert error.value.code == "context_length_exceeded"
    assert error.value.numbers == {"n_prompt_tokens": n_tokens, "n_ctx": 100}
    assert f"{n_tokens:,} tokens" in error.value.message


def test_control_tokens_come_only_from_segments_that_may_have_them(engine: Engine) -> None:
    literal = fake.CONTROL_TOKENS[0]
    prompt = [wire.Segment(literal, True), wire.Segment(literal, False), wire.Segment("b", True)]
    ids = prepare(generate(prompt), engine).prompt
    assert ids == [256, *literal.encode(), ord("b")]


def test_a_bos_comes_before_a_text_that_wants_one_and_nowhere_else() -> None:
    tokenizer = TokenizerWithBos()
    engine = fake.load(spec(), lambda fraction: None)
    engine.tokenizer = tokenizer
    prompt: list[wire.Segment | int] = [wire.Segment("a", True), wire.Segment("b", False)]
    assert prepare(generate(prompt, add_bos=True), engine).prompt == [7, 97, 98]
    assert prepare(generate(prompt, add_bos=False), engine).prompt == [97, 98]
    # only the first segment may get the space that some vocabularies put before a text
    assert tokenizer.calls == [("a", False), ("b", True)] * 2


# texts and tokens


def test_a_text_becomes_tokens_with_their_pieces(engine: Engine) -> None:
    segments = [wire.Segment("é<|end|>", True), wire.Segment("<|end|>", False)]
    ids = [*"é".encode(), 256, *b"<|end|>"]
    pieces = [b"\xc3", b"\xa9", b"<|end|>", *(bytes([byte]) for byte in b"<|end|>")]
    request = wire.Tokenize(segments, add_bos=True, job=3)
    assert convert(request, engine.tokenizer) == wire.Tokens(3, ids, pieces)
    nothing = convert(wire.Tokenize([wire.Segment("", True)], True, 4), engine.tokenizer)
    assert nothing == wire.Tokens(4, [], [])


def test_a_text_begins_with_bos_only_where_that_is_asked_for() -> None:
    tokenizer = TokenizerWithBos()
    for add_bos, ids in ((True, [7, 97]), (False, [97])):
        request = wire.Tokenize([wire.Segment("a", True)], add_bos)
        answer = convert(request, tokenizer)
        assert isinstance(answer, wire.Tokens)
        assert answer.ids == ids


def test_tokens_become_text_with_control_tokens_by_name(engine: Engine) -> None:
    request = wire.Detokenize([*"Größe".encode(), 256, 0xC3], job=3)
    assert convert(request, engine.tokenizer) == wire.Text(3, "Größe<|end|>\ufffd")
    assert convert(wire.Detokenize([]), engine.tokenizer) == wire.Text(0, "")


@pytest.mark.parametrize("token", [-1, fake.FakeTokenizer.n_vocab, 2**63 - 1])
def test_an_id_outside_the_vocabulary_has_no_text(token: int, engine: Engine) -> None:
    with pytest.raises(BadRequest, match="0 to") as error:
        convert(wire.Detokenize([0, token]), engine.tokenizer)
    assert error.value.param == "tokens"


# its loop


class Served:
    """`worker.serve` in a thread, and the server's end of its socket."""

    def __init__(self, load: wire.ToWorker | None, on_disconnect: Callable[[], None]) -> None:
        self.sock, self._theirs = socket.socketpair()
        self.sock.settimeout(WAIT_S)
        self._file = self.sock.makefile("rb")
        self._decoder: msgspec.msgpack.Decoder[wire.FromWorker] = msgspec.msgpack.Decoder(
            wire.FromWorker
        )
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(on_disconnect,), daemon=True)
        self._thread.start()
        if load is not None:
            self.send(load)

    def _run(self, on_disconnect: Callable[[], None]) -> None:
        try:
            self.code = worker.serve(self._theirs, on_disconnect)
        finally:
            self._theirs.shutdown(socket.SHUT_RDWR)  # what the end of a process does

    def send(self, *messages: wire.Message) -> None:
        self.sock.sendall(b"".join(map(wire.frame, messages)))

    def read(self) -> wire.FromWorker | None:
        head = self._file.read(4)
        if len(head) < 4:
            return None
        return self._decoder.decode(self._file.read(int.from_bytes(head, "little")))

    def ready(self) -> wire.Ready:
        while isinstance(message := self.read(), wire.Progress):
            pass
        assert isinstance(message, wire.Ready)
        return message

    def answer(self, job: int) -> tuple[wire.Started, str, wire.Done]:
        """All that is said until the job is done; nothing else may be said meanwhile."""
        started = self.read()
        assert isinstance(started, wire.Started), started
        assert started.job == job
        text = ""
        while True:
            step = self.read()
            assert isinstance(step, wire.Step), step
            (out,) = step.outs
            assert out.job == job
            assert out.text or out.done, "nothing to say is not said"
            text += out.text
            if out.done:
                return started, text, out.done

    def ask(self, prompt: str = "Hi", *, job: int = 1, **values: Any) -> tuple[str, wire.Done]:
        self.send(generate(prompt, job=job, **values))
        _, text, done = self.answer(job)
        return text, done

    def hang_up(self) -> None:
        self._file.close()
        self.sock.close()

    def ended(self) -> int | None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the worker did not end"
        return self.code

    def close(self) -> None:
        self.hang_up()
        self.ended()
        self._theirs.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts workers whose fake model follows a script; ends them after the test."""
    everyone = []

    def start(
        *rules: dict[str, Any],
        script: dict[str, Any] | None = None,
        load: wire.ToWorker | None = None,
        on_disconnect: Callable[[], None] = lambda: None,
        is_ready: bool = True,
        **values: Any,
    ) -> Served:
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": rules} | (script or {})))
        served = Served(load or wire.Load(spec(str(path), **values)), on_disconnect)
        everyone.append(served)
        if is_ready:
            served.ready()
        return served

    yield start
    for served in everyone:
        served.close()


def test_a_load_reports_its_progress_and_then_what_was_loaded(serve: Serve) -> None:
    served = serve(is_ready=False)
    assert served.read() == wire.Progress(0.0)
    assert served.read() == wire.Progress(1.0)
    assert served.read() == wire.Ready(100, 2)


def test_an_answer_starts_with_started_and_ends_with_done(serve: Serve) -> None:
    served = serve({"match": "", "answer": "Grüße 🎉"})
    served.send(generate("Hello", job=7))
    started, text, done = served.answer(7)
    assert started == wire.Started(7, 5, 0)
    assert text == "Grüße 🎉"
    # the token that ends the answer was generated too
    assert done == wire.Done("stop", len("Grüße 🎉".encode()) + 1)


def test_an_answer_ends_before_its_stop_string(serve: Serve) -> None:
    served = serve({"answer": "one two three"})
    text, done = served.ask(stop=["three", "two"])
    assert text == "one "
    assert done == wire.Done("stop", len("one two"), stop="two")


def test_an_answer_ends_at_its_limit(serve: Serve) -> None:
    served = serve({"answer": "one two three"})
    text, done = served.ask(max_tokens=5)
    assert text == "one t"
    assert done == wire.Done("length", 5)


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(serve: Serve) -> None:
    served = serve({"answer": "one two"})
    assert served.ask(max_tokens=5, stop=["txt"])[0] == "one t"
    assert served.ask(stop=["two!"])[0] == "one two"


def test_a_limit_of_zero_decodes_the_prompt_and_generates_nothing(serve: Serve) -> None:
    served = serve()
    text, done = served.ask("abcde", max_tokens=0)
    assert (text, done) == ("", wire.Done("length", 0))
    served.send(generate("abcdef", job=2))
    assert served.answer(2)[0].cached_tokens == 5


def test_an_answer_ends_at_the_end_of_the_context(serve: Serve) -> None:
    served = serve({"answer": "x" * 500})
    text, done = served.ask("abc")
    assert text == "x" * 97
    assert done == wire.Done("length", 97)


def test_a_second_turn_counts_what_it_reused(serve: Serve) -> None:
    served = serve({"answer": "ok"})
    served.ask("hi", job=1)
    served.send(generate("hiok, go on", job=2))
    started, _, done = served.answer(2)
    assert started == wire.Started(2, 11, 4)
    assert done == wire.Done("stop", 3)


def test_jobs_are_answered_side_by_side_in_one_frame_a_step(serve: Serve) -> None:
    served = serve(n_parallel=3)
    served.send(*(generate(f"prompt {job}", job=job) for job in range(1, 6)))
    texts = dict.fromkeys(range(1, 6), "")
    started: list[int] = []
    done: list[int] = []
    n_shared = 0
    while len(done) < 5:
        message = served.read()
        if isinstance(message, wire.Started):
            started.append(message.job)
            continue
        assert isinstance(message, wire.Step)
        n_shared += len(message.outs) > 1
        for out in message.outs:
            assert out.job in started
            assert out.job not in done
            texts[out.job] += out.text
            if out.done:
                done.append(out.job)
    assert texts == {job: f"You said: prompt {job}" for job in range(1, 6)}
    assert started == [1, 2, 3, 4, 5]
    assert n_shared


def test_a_request_that_is_refused_never_starts_and_the_next_is_answered(serve: Serve) -> None:
    served = serve()
    served.send(generate("a" * 100, job=1), generate([300], job=2))
    failed = served.read()
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.code) == (1, "context_length_exceeded")
    assert failed.numbers == {"n_prompt_tokens": 100, "n_ctx": 100}
    failed = served.read()
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.code, failed.param) == (2, None, "prompt")
    assert served.ask("Hi", job=3)[0] == "You said: Hi"


def test_a_failing_step_is_told_and_the_next_job_works(serve: Serve) -> None:
    served = serve({"match": "poison", "fault": "step"})
    served.send(generate("poison", job=1))
    failed = served.read()  # and no Started, so that it can be an HTTP status
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.code) == (1, "internal_error")
    assert "told to fail" not in failed.message  # what went wrong inside is for the log
    assert served.ask("Hi", job=2)[0] == "You said: Hi"


def test_a_step_that_fails_in_the_middle_of_an_answer_ends_it(serve: Serve) -> None:
    served = serve({"match": "poison", "answer": "abcdef", "fault": "step", "after": 2})
    served.send(generate("poison", job=1))
    assert served.read() == wire.Started(1, 6, 0)
    assert served.read() == wire.Step([wire.TokenOut(1, "a", n_tokens=1)])
    assert served.read() == wire.Step([wire.TokenOut(1, "b", n_tokens=2)])
    assert isinstance(served.read(), wire.Failed)
    assert served.ask("Hi", job=2)[0] == "You said: Hi"


def test_steps_that_fail_in_a_row_end_the_worker_with_a_code(serve: Serve) -> None:
    served = serve({"match": "poison", "fault": "step"})
    for job in range(1, MAX_FAILED_STEPS):
        served.send(generate("poison", job=job))
        assert isinstance(served.read(), wire.Failed)
    served.send(generate("poison", job=9))
    assert served.read() is None
    assert served.ended() == worker.EXIT_ENGINE_FAILED


def test_ping_is_answered_by_pong(serve: Serve) -> None:
    served = serve()
    served.send(wire.Ping(), wire.Ping())
    assert [served.read(), served.read()] == [wire.Pong(), wire.Pong()]


WITHOUT_ROOM = """
import resource, socket
import threading
import psutil, worker
most = psutil.Process().memory_info().vms + (300 << 20)  # also what is not used
resource.setrlimit(resource.RLIMIT_AS, (most, most))
ours, theirs = socket.socketpair()
receiver = worker.Receiver(theirs, ours.close)
receiver.start()
ours.shutdown(socket.SHUT_WR)
print(type(receiver.inbox.get(timeout=20)).__name__, threading.stack_size())
"""


def test_where_there_is_no_room_for_a_deep_stack_a_worker_serves_all_the_same() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert said.stdout == "Shutdown 0\n", said.stderr


def test_cancelling_what_is_unknown_is_fine(serve: Serve) -> None:
    served = serve()
    served.send(wire.Cancel(7))
    assert served.ask("Hi")[0] == "You said: Hi"


# step by step


class Gated(BatchEngine):
    """Each step waits for a permit, and every call is told in the order of calls."""

    def __init__(self, n_parallel: int) -> None:
        decoder = fake.FakeDecoder(fake.Script(), n_slots=n_parallel, n_cells=200)
        super().__init__(decoder, spec(n_parallel=n_parallel), n_ctx=100, n_cells=200, n_batch=32)
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.permits = threading.Semaphore(0)

    def admit(
        self,
        id: int,
        prompt: list[int],
        sampling: SamplingParams,
        constraint: Any = None,
        **how: Any,
    ) -> None:
        self.calls.put(f"admit {id}")
        super().admit(id, prompt, sampling, constraint, **how)

    def cancel(self, id: int) -> None:
        self.calls.put(f"cancel {id}")
        super().cancel(id)

    def step(self) -> StepResult:
        self.calls.put("step")
        assert self.permits.acquire(timeout=WAIT_S)
        return super().step()

    def close(self) -> None:
        self.calls.put("close")
        super().close()

    def next_calls(self, n: int) -> list[str]:
        return [self.calls.get(timeout=WAIT_S) for _ in range(n)]


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    engine = Gated(n_parallel=1)
    monkeypatch.setattr(worker, "load_engine", lambda spec, progress: engine)
    yield engine
    engine.permits.release(1000)


class Inbox(queue.SimpleQueue[Any]):
    """Tells when something was put in."""

    arrived: queue.SimpleQueue[Any]

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self.arrived.put(item)


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> "queue.SimpleQueue[Any]":
    """What the receiver has put into the worker's inbox."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    init = worker.Receiver.__init__

    def with_telling_inbox(self: worker.Receiver, *args: Any) -> None:
        init(self, *args)
        self.inbox = Inbox()
        self.inbox.arrived = items

    monkeypatch.setattr(worker.Receiver, "__init__", with_telling_inbox)
    return items


def test_cancel_frees_the_sequence_before_the_next_step(
    serve: Serve, gated: Gated, arrived: "queue.SimpleQueue[Any]"
) -> None:
    served = serve()
    served.send(generate("first", job=1))
    assert gated.next_calls(2) == ["admit 1", "step"]
    served.send(wire.Cancel(1), generate("second", job=2))  # while the step computes
    for _ in range(3):
        arrived.get(timeout=WAIT_S)
    gated.permits.release()
    assert gated.next_calls(3) == ["cancel 1", "admit 2", "step"]
    assert served.read() == wire.Started(1, 5, 0)
    assert served.read() == wire.Step([wire.TokenOut(1, "Y", n_tokens=1)])
    gated.permits.release(1000)
    assert served.answer(2)[1] == "You said: second"


def test_a_job_that_is_cancelled_while_it_waits_never_starts(
    serve: Serve, gated: Gated, arrived: "queue.SimpleQueue[Any]"
) -> None:
    served = serve()
    served.send(generate("first", job=1), generate("second", job=2), wire.Cancel(2))
    for _ in range(3):
        arrived.get(timeout=WAIT_S)
    gated.permits.release(1000)
    assert served.answer(1)[1] == "You said: first"
    assert served.ask("third", job=3)[0] == "You said: third"


def test_a_ping_is_answered_between_the_steps_of_a_busy_worker(
    serve: Serve, gated: Gated, arrived: "queue.SimpleQueue[Any]"
) -> None:
    served = serve()
    served.send(generate("first", job=1))
    gated.next_calls(2)
    served.send(wire.Ping())
    for _ in range(2):
        arrived.get(timeout=WAIT_S)
    gated.permits.release()
    assert served.read() == wire.Started(1, 5, 0)
    assert served.read() == wire.Step([wire.TokenOut(1, "Y", n_tokens=1)])
    assert served.read() == wire.Pong()


def test_texts_and_tokens_need_no_free_sequence(
    serve: Serve, gated: Gated, arrived: "queue.SimpleQueue[Any]"
) -> None:
    served = serve()
    served.send(generate("first", job=1), generate("second", job=2))
    gated.next_calls(2)
    served.send(wire.Tokenize([wire.Segment("Hi", True)], True, 3), wire.Detokenize([72, 105], 4))
    served.send(wire.Detokenize([999], 5), wire.Cancel(5))
    for _ in range(6):
        arrived.get(timeout=WAIT_S)
    gated.permits.release()
    assert served.read() == wire.Started(1, 5, 0)
    assert served.read() == wire.Step([wire.TokenOut(1, "Y", n_tokens=1)])
    assert served.read() == wire.Tokens(3, [72, 105], [b"H", b"i"])
    assert served.read() == wire.Text(4, "Hi")
    failed = served.read()
    assert isinstance(failed, wire.Failed)
    assert (failed.job, failed.param) == (5, "tokens")


def test_a_finished_job_is_taken_out_of_the_engine(serve: Serve, gated: Gated) -> None:
    served = serve()
    gated.permits.release(1000)
    served.ask("Hi", max_tokens=1)
    assert gated.next_calls(3) == ["admit 1", "step", "cancel 1"]
    assert gated.idle


# how it ends


def test_shutdown_does_not_wait_for_jobs(
    serve: Serve, gated: Gated, arrived: "queue.SimpleQueue[Any]"
) -> None:
    served = serve()
    served.send(generate("first", job=1))
    assert gated.next_calls(2) == ["admit 1", "step"]
    served.send(wire.Shutdown())
    for _ in range(2):
        arrived.get(timeout=WAIT_S)
    gated.permits.release()
    assert served.ended() == worker.EXIT_OK
    assert gated.next_calls(1) == ["close"]


def test_a_server_that_goes_in_the_middle_of_a_job_ends_it(serve: Serve, gated: Gated) -> None:
    served = serve()
    served.send(generate("first", job=1))
    assert gated.next_calls(2) == ["admit 1", "step"]
    served.hang_up()
    gated.permits.release(1000)
    assert served.ended() == worker.EXIT_OK


def test_shutdown_ends_it(serve: Serve, gated: Gated) -> None:
    served = serve()
    served.send(wire.Shutdown())
    assert served.read() is None
    assert served.ended() == worker.EXIT_OK
    assert gated.next_calls(1) == ["close"]


def test_a_server_that_has_gone_ends_it_and_is_told_at_once(serve: Serve, gated: Gated) -> None:
    is_gone = threading.Event()
    served = serve(on_disconnect=is_gone.set)
    served.hang_up()
    assert is_gone.wait(WAIT_S)
    assert served.ended() == worker.EXIT_OK
    assert gated.next_calls(1) == ["close"]


def test_a_server_that_goes_while_the_model_loads_is_noticed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_gone, is_loading = threading.Event(), threading.Event()

    def load(spec: wire.WorkerSpec, progress: ReportProgress) -> Engine:
        is_loading.set()
        assert is_gone.wait(WAIT_S)
        progress(0.5)  # to nobody
        return fake.load(spec, progress)

    monkeypatch.setattr(worker, "load_engine", load)
    served = serve(on_disconnect=is_gone.set, is_ready=False)
    assert is_loading.wait(WAIT_S)
    served.hang_up()
    assert served.ended() == worker.EXIT_OK


def test_a_server_that_says_nothing_ends_it(serve: Serve) -> None:
    served = serve(load=wire.Ping(), is_ready=False)
    assert served.ended() == worker.EXIT_OK


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (wire.Load(spec(backend="abacus")), "Backend 'abacus' is not known."),
        (wire.Load(spec("/no/such/script.json")), "cannot read the script script.json"),
    ],
)
def test_a_load_that_fails_is_told_in_a_sentence(load: wire.Load, words: str, serve: Serve) -> None:
    served = serve(load=load, is_ready=False)
    failed = served.read()
    assert isinstance(failed, wire.LoadFailed)
    assert words in failed.reason
    assert served.read() is None
    assert served.ended() == worker.EXIT_OK


@pytest.mark.parametrize("encoder", [None, wire.EncoderSpec(kind="embedding", batch_tokens=512)])
def test_a_llama_that_cannot_be_loaded_is_told_with_what_to_do(
    encoder: wire.EncoderSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = f"{sys.prefix}/lib/libllama.so"
    (tmp_path / "llama_cpp.py").write_text(f"raise RuntimeError('{library}: no libcudart.so.12')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("engine.backends.llama")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    told = spec(backend="llamacpp", encoder=encoder)
    with pytest.raises(ModelLoadFailed) as caught:
        load_engine(told, print) if encoder is None else load_encoder(told, print)
    assert caught.value.message == (
        "llama.cpp cannot be loaded (lib/libllama.so: no libcudart.so.12): "
        "`rm -rf .venv; ./setup.sh` installs it anew."
    )


def test_a_load_that_is_told_to_fail_fails_after_its_progress(serve: Serve) -> None:
    served = serve(script={"fault": "load"}, is_ready=False)
    assert served.read() == wire.Progress(0.0)
    assert served.read() == wire.LoadFailed("The fake backend was told to fail.")


def test_too_little_memory_is_told_in_a_sentence(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(spec: wire.WorkerSpec, progress: ReportProgress) -> Engine:
        raise MemoryError

    monkeypatch.setattr(worker, "load_engine", load)
    assert serve(is_ready=False).read() == wire.LoadFailed(
        "There is not enough memory to load the model."
    )
