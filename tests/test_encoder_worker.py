"""A worker that embeds or scores, over its socket, on the fake encoder."""

import json
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import worker
from embedders import Embedded
from encoder_jobs import MAX_FAILURES, TOKENS_AT_ONCE, WORTH_GIVING_UP, EncoderJobs
from encoder_requests import SimilarityJob
from engine import wire
from engine.apart import Apart
from engine.backends.fake_encoder import BEGIN, END, N_EMBD, N_VOCAB, FakeEncoder
from engine.types import SamplingParams
from tests.test_worker import Served, spec

Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts workers whose fake encoder follows a script; ends them after the test."""
    everyone = []

    def start(
        *rules: dict[str, Any],
        kind: Any = "embedding",
        script: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        **values: Any,
    ) -> Served:
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": rules} | (script or {})))
        of = wire.EncoderSpec(kind=kind, **(encoder or {}))
        served = Served(wire.Load(spec(str(path), encoder=of, **values)), lambda: None)
        everyone.append(served)
        return served

    yield start
    for served in everyone:
        served.close()


def embed(*inputs: str | list[int], job: int = 1, **values: Any) -> wire.Embed:
    return wire.Embed([*inputs], values.pop("outputs", ["dense"]), job=job, **values)


def score(query: str, *documents: str, job: int = 1, **values: Any) -> wire.Score:
    pairs = [(0, i) for i in range(len(documents))]
    return wire.Score([query], [*documents], pairs, job=job, **values)


def vectors(served: Served, request: wire.Embed) -> list[wire.Vector]:
    """Every answer to a request, in the order of its inputs."""
    served.send(request)
    found: dict[int, wire.Vector] = {}
    while len(found) < len(request.inputs):
        message = served.read()
        assert isinstance(message, wire.Vectors), message
        assert message.job == request.job
        found |= {item.index: item for item in message.items}
    return [found[i] for i in range(len(request.inputs))]


def scores(served: Served, request: wire.Score) -> tuple[list[wire.Scored], wire.Scores]:
    served.send(request)
    found: dict[int, wire.Scored] = {}
    while len(found) < len(request.pairs):
        message = served.read()
        assert isinstance(message, wire.Scores), message
        found |= {item.index: item for item in message.items}
    return [found[i] for i in range(len(request.pairs))], message


def floats(data: bytes | None) -> Any:
    assert data is not None
    return np.frombuffer(data, "<f4")


def failed(served: Served, request: wire.Message) -> wire.Failed:
    served.send(request)
    message = served.read()
    assert isinstance(message, wire.Failed), message
    return message


# embeddings


def test_it_says_what_the_model_can(serve: Serve) -> None:
    assert serve().ready() == wire.Ready(
        100,
        worker.ENCODER_SEATS,
        wire.EncoderInfo(
            ["colbert", "dense", "sparse"],
            ["hybrid", "dense", "sparse", "colbert"],
            N_EMBD,
            N_EMBD,
        ),
    )
    ready = serve(script={"heads": False}).ready()
    assert ready.encoder == wire.EncoderInfo(["dense"], ["dense"], N_EMBD)
    ready = serve(kind="reranker").ready()
    assert ready.encoder == wire.EncoderInfo([], ["cross-encoder"], N_EMBD)


def test_a_text_becomes_a_vector_of_length_one(serve: Serve) -> None:
    served = serve()
    served.ready()
    (vector,) = vectors(served, embed("hello world"))
    assert (vector.n_tokens, vector.n_cut, vector.fault) == (4, 0, None)
    assert floats(vector.dense).shape == (N_EMBD,)
    assert np.linalg.norm(floats(vector.dense)) == pytest.approx(1, abs=1e-6)
    assert vector.sparse_ids is vector.colbert is vector.tokens is None


def test_similar_texts_have_similar_vectors_whoever_is_beside_them(serve: Serve) -> None:
    served = serve()
    served.ready()
    texts = [f"the weather in city number {i}" for i in range(40)]
    a, *_, b = vectors(served, embed("the rain in Spain", *texts, "falls the rain in Spain"))
    assert floats(a.dense) @ floats(b.dense) > 0.9
    (alone,) = vectors(served, embed("the rain in Spain", job=2))
    assert alone.dense == a.dense


def test_the_three_kinds_come_together(serve: Serve) -> None:
    served = serve()
    served.ready()
    outputs = ["dense", "sparse", "colbert"]
    (vector,) = vectors(served, embed("b a b", outputs=outputs, return_tokens=True))
    assert vector.tokens is not None
    assert vector.pieces == [b"<s>", b" b", b" a", b" b", b"</s>"]
    ids = np.frombuffer(vector.sparse_ids or b"", "<i4").tolist()
    assert ids == sorted(set(vector.tokens[1:-1])), "each word once, and no special token"
    assert (floats(vector.sparse_weights) > 0).all()
    rows = floats(vector.colbert).reshape(-1, N_EMBD)
    assert len(rows) == 4, "one for each token but <s>"
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)


def test_requests_of_different_kinds_share_a_batch(serve: Serve) -> None:
    served = serve()
    served.ready()
    served.send(embed("a b", job=1), embed("a b", job=2, outputs=["colbert"]))
    served.send(embed("a b", "c", job=3, outputs=["sparse"]))
    found = {}
    while len(found) < 4:
        message = served.read()
        assert isinstance(message, wire.Vectors)
        found |= {(message.job, item.index): item for item in message.items}
    assert found[1, 0].dense
    assert not found[1, 0].sparse_ids
    assert not found[2, 0].dense
    assert len(floats(found[2, 0].colbert)) == 3 * N_EMBD
    assert not found[3, 1].dense
    assert len(floats(found[3, 1].sparse_weights)) == 1


def test_token_ids_are_taken_with_the_tokens_around_them_only_once(serve: Serve) -> None:
    served = serve()
    served.ready()
    (text,) = vectors(served, embed("hello world", return_tokens=True))
    assert text.tokens is not None
    bare, whole = vectors(served, embed(text.tokens[1:-1], text.tokens, job=2))
    assert bare.n_tokens == whole.n_tokens == 4
    assert bare.dense == whole.dense == text.dense


def test_a_role_puts_its_prefix_before_the_text(serve: Serve) -> None:
    served = serve(encoder={"query_prefix": "query: ", "passage_prefix": "passage: "})
    served.ready()
    by_hand, passage = vectors(served, embed("query: hi", "passage: hi"))
    (query,) = vectors(served, embed("hi", role="query", job=2))
    (other,) = vectors(served, embed("hi", role="passage", job=3))
    assert (query.dense, other.dense) == (by_hand.dense, passage.dense)


def test_one_big_request_does_not_keep_a_small_one_waiting(serve: Serve) -> None:
    served = serve(encoder={"batch_tokens": 40})
    served.ready()
    served.send(embed(*[f"big {i} of them" for i in range(500)], job=1), embed("small", job=2))
    n_before = 0
    while True:
        message = served.read()
        assert isinstance(message, wire.Vectors)
        if message.job == 2:
            break
        n_before += len(message.items)
    assert n_before < 50


def test_a_large_batch_gives_way_to_a_small_request(serve: Serve) -> None:
    # it has no room for the small one, which may come before it begins
    room = {"batch_tokens": WORTH_GIVING_UP}
    served = serve({"match": "stall", "fault": "stall"}, n_ctx=512, encoder=room)
    served.ready()
    served.send(embed("stall " * WORTH_GIVING_UP, job=1), wire.Ping())
    assert served.read() == wire.Pong(), "it is being computed"
    served.send(embed("small", job=2))
    message = served.read()
    assert isinstance(message, wire.Vectors)
    assert message.job == 2


def computed(jobs: EncoderJobs, *coming: wire.Embed | wire.Score) -> list[int]:
    """Whose texts one batch answers, while these come."""
    waiting = [*coming]

    def go_on() -> bool:
        while waiting:
            jobs.admit(waiting.pop())
        return jobs.goes_on

    jobs.tokenize()
    return [message.job for message in jobs.compute(go_on)]  # type: ignore[union-attr]


def encoder_jobs(tmp_path: Path, **script: Any) -> EncoderJobs:
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    of = wire.EncoderSpec(kind="embedding")
    model = worker.load_model(spec(str(path), encoder=of, n_ctx=512), lambda _: None)
    return EncoderJobs(model, tier="embedding", batch_tokens=512)


LONG = "long " * 200


def test_what_gave_way_is_computed_next(tmp_path: Path) -> None:
    jobs = encoder_jobs(tmp_path)
    jobs.admit(embed(LONG, f"{LONG} too", job=1))
    assert computed(jobs, embed("small", job=2)) == []
    assert computed(jobs) == [2]
    assert computed(jobs, embed("small", job=3)) == [1]
    assert computed(jobs) == [3]
    assert jobs.idle


def test_a_ranking_counts_as_long_as_its_texts_which_are_read_once(tmp_path: Path) -> None:
    ranking = score("q" * 40, *(f"{n}" * 20 for n in range(4)), job=2)
    assert sum(len(ranking.queries[q] + ranking.documents[d]) for q, d in ranking.pairs) > 202
    jobs = encoder_jobs(tmp_path)
    jobs.admit(embed(LONG, job=1))
    assert computed(jobs, ranking) == [], "it gave way"
    assert computed(jobs) == [2]
    assert computed(jobs) == [1]


def test_a_query_is_tokenised_once_and_all_of_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text("{}")
    of = wire.EncoderSpec(kind="reranker")
    model = worker.load_model(spec(str(path), encoder=of), lambda _: None)
    jobs = EncoderJobs(model, tier="reranker", batch_tokens=512)
    tokenizer = model.encoder.tokenizer
    tokenize, seen = tokenizer.tokenize, list[str]()

    def watched(text: str, *, parse_special: bool, continues: bool) -> list[int]:
        seen.append(text)
        return tokenize(text, parse_special=parse_special, continues=continues)

    tokenizer.tokenize = watched  # type: ignore[method-assign]
    query = "what " * TOKENS_AT_ONCE
    jobs.admit(score(query, *"abc", truncate="end"))
    assert jobs.tokenize() == []
    assert seen == [query, "a"], "others may come between"
    assert jobs.tokenize() == []
    assert seen == [query, "a", "b", "c"]


LATE = dict[str, Any](method="colbert")


def test_who_comes_or_leaves_while_vectors_are_compared_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rerankers.PRODUCTS_AT_ONCE", 5)
    jobs = encoder_jobs(tmp_path)
    embed_, n_asked = jobs._model.embed, -(10**6)  # type: ignore[union-attr]

    def then_compared(*args: Any) -> Any:
        nonlocal n_asked
        found = embed_(*args)
        n_asked = 0
        return found

    def go_on() -> bool:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 4:
            jobs.admit(embed("small", job=2))
            jobs.cancel(1)
        return n_asked < 0  # then as for one to whom it would give way

    monkeypatch.setattr(jobs._model, "embed", then_compared)
    jobs.admit(score("one two three four", "five six", "seven", **LATE, job=1))
    jobs.tokenize()
    assert jobs.compute(go_on) == []
    assert n_asked == 4, "no more slices for whom has left"
    assert computed(jobs) == [2]
    assert jobs.idle


def test_who_hears_shutdown_in_a_batch_forgets_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = encoder_jobs(tmp_path)
    jobs.admit(score("one two three four", "five six", "seven", **LATE, job=1))
    jobs.admit(embed("small", job=2))
    jobs.tokenize()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sent: list[wire.Message] = []
    compute = jobs.compute

    def computing(go_on: Callable[[], bool]) -> list[wire.Message]:
        inbox.put(wire.Shutdown())
        return compute(go_on)

    monkeypatch.setattr(jobs, "compute", computing)
    assert worker._encoder_loop(jobs, Apart(), inbox, lambda *m: sent.extend(m)) == worker.EXIT_OK
    assert sent == []
    assert jobs.idle


def test_the_queries_that_are_compared_at_once_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_two = 2 * N_EMBD * len("<s> a b </s>".split())
    monkeypatch.setattr("encoder_requests.MAX_QUERY_NUMBERS", of_two)
    jobs = encoder_jobs(tmp_path)

    def refused(*queries: str, method: Any) -> list[wire.Message]:
        pairs = [(query, 0) for query in range(len(queries))]
        jobs.admit(wire.Score([*queries], ["c"], pairs, method=method, job=1))
        messages = jobs.tokenize()
        jobs.cancel(1)
        return messages

    for method in ("colbert", "hybrid"):
        assert refused("a b", "b a", method=method) == []
        (failed,) = refused("a b", "b a", "a", method=method)
        assert isinstance(failed, wire.Failed)
        assert (failed.param, failed.numbers) == ("query", {"index": 2})
        assert "Send fewer or shorter ones" in failed.message
    assert refused("a b", "b a", "a", method="dense") == []


def test_the_vectors_of_a_query_go_with_its_last_pair(tmp_path: Path) -> None:
    jobs = encoder_jobs(tmp_path)
    pairs = [(0, 0), (1, 0), (0, 1)]
    jobs.admit(wire.Score(["a", "b"], ["c", "d"], pairs, **LATE, job=1))
    (job,) = jobs._jobs.values()
    assert isinstance(job, SimilarityJob)
    jobs.tokenize()
    result = Embedded(colbert=np.ones((1, N_EMBD), np.float32))
    kept = []
    for index in range(4):
        job.take(index, result, lambda: True)
        kept.append([*job._queries])
    assert kept == [[0], [0, 1], [0], []]


def test_who_has_left_meanwhile_is_not_computed_again(tmp_path: Path) -> None:
    jobs = encoder_jobs(tmp_path)
    jobs.admit(embed(LONG, job=1))
    jobs.admit(embed(LONG, job=2))
    assert computed(jobs, embed("small", job=3)) == []
    jobs.cancel(1)
    assert computed(jobs) == [3]
    assert computed(jobs) == [2]
    assert jobs.idle


@pytest.mark.parametrize(
    ("large", "coming"), [(LONG, LONG), (LONG, "x" * 300), ("not so long " * 20, "small")]
)
def test_a_batch_does_not_give_way_where_that_gains_little(
    large: str, coming: str, tmp_path: Path
) -> None:
    jobs = encoder_jobs(tmp_path)
    jobs.admit(embed(large, job=1))
    assert computed(jobs, embed(coming, job=2)) == [1]


def test_batches_do_not_give_way_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is a part of what is gained. Asked at the end of each batch: the worst case."""
    now = 0.0

    def compute(for_s: float) -> None:
        nonlocal now
        now += for_s

    monkeypatch.setattr("encoder_jobs.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("engine.backends.fake_encoder.time", SimpleNamespace(sleep=compute))
    jobs = encoder_jobs(tmp_path, token_us=50)
    jobs._may_repeat_s = 0.0
    jobs.admit(embed(*[f"{LONG}{n}" for n in range(40)], job=1))
    answered = []
    while not jobs.idle:
        answered.append(computed(jobs, embed("small", job=len(answered) + 2)))
        answered.append(computed(jobs))
    n_given_up = answered.count([])
    n_large = sum(1 in jobs_ for jobs_ in answered)
    assert n_large == 20
    assert 2 <= n_given_up <= 0.25 * n_large + 1


# what is too long, empty or unknown


def test_a_text_that_is_too_long_fails_its_request_with_the_numbers(serve: Serve) -> None:
    served = serve(n_ctx=16)
    served.ready()
    failure = failed(served, embed("short", "a " * 15))
    assert (failure.code, failure.param) == ("context_length_exceeded", "input")
    assert failure.numbers == {"n_prompt_tokens": 17, "n_ctx": 16, "index": 1}
    assert failure.message.startswith(  # by which clients know it
        "input[1] is too long: this model's maximum context length is 16 tokens, it has 17 "
        "(LIGHT_N_CTX)."
    )
    assert failure.message.endswith(
        " Shorten it, or send `truncate` to have it cut (or set LIGHT_TRUNCATE=end for all "
        "requests)."
    )
    assert vectors(served, embed("a " * 14, job=2))[0].n_tokens == 16, "the longest that fits"


@pytest.mark.parametrize(("truncate", "kept"), [("end", "0 1 2"), ("start", "3 4 5")])
def test_a_text_is_cut_where_that_is_asked_for(truncate: Any, kept: str, serve: Serve) -> None:
    served = serve(n_ctx=16, encoder={"passage_prefix": "zero one two three four five six seven "})
    served.ready()
    asked = embed("0 1 2 3 4 5", truncate=truncate, role="passage", return_tokens=True)
    (vector,) = vectors(served, asked)
    (short,) = vectors(served, embed(kept, role="passage", return_tokens=True, job=2))
    assert (vector.n_tokens, vector.n_cut, short.n_cut) == (16, 0, 0)
    served = serve(n_ctx=13, encoder={"passage_prefix": "zero one two three four five six seven "})
    served.ready()
    (vector,) = vectors(served, asked)
    assert (vector.n_tokens, vector.n_cut) == (13, 3)
    assert vector.tokens == short.tokens, "prefix and special tokens stay"
    assert vector.tokens is not None
    assert (vector.tokens[0], vector.tokens[-1]) == (BEGIN, END)


@pytest.mark.parametrize("template", [None, "{query}? {document}"])
def test_it_is_said_where_a_cut_would_help(
    template: str | None, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pair in a template the query is never cut."""
    served = serve(kind="reranker", n_ctx=32)
    served.ready()
    monkeypatch.setattr(FakeEncoder, "template", template)
    long = "a " * 40
    for query, document, param, can_be_cut in (
        ("a", long, "documents", True), (long, "a", "query", template is None),
    ):  # fmt: skip
        failure = failed(served, score(query, document, truncate="none"))
        assert (failure.code, failure.param) == ("context_length_exceeded", param)
        assert ("send `truncate`" in failure.message) == can_be_cut
        assert failure.message.endswith("cut." if can_be_cut else "Shorten it.")
    if template:
        assert failed(served, score(long, "a", truncate="end")).message.endswith("Shorten it.")


@pytest.mark.parametrize("text", ["", []])
def test_an_empty_text_fails_its_request(text: Any, serve: Serve) -> None:
    served = serve()
    served.ready()
    failure = failed(served, embed("a", text))
    assert (failure.param, failure.numbers) == ("input", {"index": 1})
    assert "input[1] is empty" in failure.message


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**40])
def test_token_ids_outside_the_vocabulary_are_refused(token: int, serve: Serve) -> None:
    served = serve()
    served.ready()
    failure = failed(served, embed([5, token]))
    assert failure.param == "input"
    assert f"0 to {N_VOCAB - 1}" in failure.message


def test_vectors_that_the_model_does_not_make_are_refused(serve: Serve) -> None:
    served = serve(script={"heads": False})
    served.ready()
    failure = failed(served, embed("a", outputs=["dense", "sparse"]))
    assert failure.param == "return_sparse"
    assert "no sparse vectors: there is no sparse_linear.pt beside its file" in failure.message


def test_a_worker_does_only_what_its_model_can(serve: Serve) -> None:
    served = serve()
    served.ready()
    text = [wire.Segment("Hi", True)]
    failure = failed(served, wire.Generate(text, True, SamplingParams(), [], None, job=1))
    assert failure.param == "model"
    assert failed(served, score("q", "d", method="cross-encoder")).param == "method"
    served = serve(kind="reranker")
    served.ready()
    assert failed(served, embed("a")).param == "model"
    assert failed(served, score("q", "d", method="dense")).param == "method"


def test_texts_and_tokens_are_converted_by_an_encoder_too(serve: Serve) -> None:
    served = serve()
    served.ready()
    served.send(wire.Tokenize([wire.Segment("a b", False)], True, 3))
    tokens = served.read()
    assert isinstance(tokens, wire.Tokens)
    assert tokens.pieces == [b"<s>", b" a", b" b"]


# faults of one text


def test_a_text_that_makes_its_batch_fail_is_an_error_and_the_others_are_not(
    serve: Serve,
) -> None:
    served = serve({"match": "poison", "fault": "step"})
    served.ready()
    served.send(embed("fine", "poison", job=1), embed("also fine", job=2))
    found = {}
    while len(found) < 3:
        message = served.read()
        assert isinstance(message, wire.Vectors)
        found |= {(message.job, item.index): item for item in message.items}
    assert found[1, 0].dense
    assert found[2, 0].dense
    fault = found[1, 1].fault
    assert fault is not None
    assert (fault.code, found[1, 1].dense) == ("internal_error", None)


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_what_is_no_number_is_computed_once_alone_and_then_an_error(
    kind: str, serve: Serve
) -> None:
    served = serve(
        {"match": "rare", "fault": "nan_in_company"}, {"match": "never", "fault": "nan"}, kind=kind
    )
    served.ready()
    found: list[Any]
    if kind == "embedding":
        found = vectors(served, embed("fine", "rare", "never"))
    else:
        found, _ = scores(served, score("q", "fine", "rare", "never"))
    assert [item.fault is None for item in found] == [True, True, False]
    assert "no numbers" in found[2].fault.message


def test_an_encoder_that_always_fails_ends_the_worker(serve: Serve) -> None:
    served = serve({"match": "", "fault": "step"})
    served.ready()
    for job in range(1, MAX_FAILURES):
        assert all(item.fault for item in vectors(served, embed("a", "b", job=job)))
    served.send(embed("a", "b", job=MAX_FAILURES))
    while served.read() is not None:
        pass
    assert served.ended() == worker.EXIT_ENGINE_FAILED


def test_many_bad_texts_of_one_request_do_not_end_the_worker(serve: Serve) -> None:
    served = serve({"match": "poison", "fault": "step"})
    served.ready()
    found = vectors(served, embed(*[f"poison {i}" for i in range(2 * MAX_FAILURES)], "fine"))
    assert [item.fault is None for item in found] == [False] * 2 * MAX_FAILURES + [True]


def test_what_is_cut_off_counts_when_texts_are_tokenised(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text("{}")
    of = spec(str(tmp_path / "script.json"), encoder=wire.EncoderSpec(kind="embedding"), n_ctx=16)
    jobs = EncoderJobs(worker.load_model(of, lambda _: None), tier="embedding", batch_tokens=64)
    long = "a " * TOKENS_AT_ONCE
    assert not jobs.admit(embed(long, job=1, truncate="end"))
    assert not jobs.admit(embed(*[long] * 9, job=2, truncate="end"))
    assert not jobs.tokenize()
    assert [message.job for message in jobs.compute(lambda: True)] == [1]
    assert not jobs.idle
    assert not jobs.compute(lambda: True), "of the other one not all is tokenised"


# cancelling, pings, the end


def test_a_request_that_is_cancelled_while_it_is_computed_ends_at_once(serve: Serve) -> None:
    # each text in a batch of its own: one that somebody else is in too goes on
    served = serve({"match": "stall", "fault": "stall"}, encoder={"batch_tokens": 1})
    served.ready()
    served.send(embed("stall", job=1), wire.Ping())
    assert served.read() == wire.Pong(), "also in the middle of a batch"
    served.send(embed("next", job=2), wire.Cancel(1))
    message = served.read()
    assert isinstance(message, wire.Vectors)
    assert message.job == 2


def test_a_neighbour_of_a_cancelled_request_gets_its_answer(serve: Serve) -> None:
    served = serve(script={"step_ms": 30}, encoder={"batch_tokens": 64})
    served.ready()
    served.send(embed(*["one two"] * 200, job=1), embed(*["three"] * 20, job=2), wire.Cancel(1))
    found = set()
    while len(found) < 20:
        message = served.read()
        assert isinstance(message, wire.Vectors)
        if message.job == 2:
            found |= {item.index for item in message.items}


def test_shutdown_does_not_wait_for_a_batch(serve: Serve) -> None:
    served = serve({"match": "stall", "fault": "stall"})
    served.ready()
    served.send(embed("stall"), wire.Shutdown())
    assert served.ended() == worker.EXIT_OK


# scores


def test_a_cross_encoder_scores_pairs(serve: Serve) -> None:
    served = serve(kind="reranker")
    served.ready()
    found, message = scores(served, score("a b c", "a b c", "a b x", "x y z"))
    assert (message.method, message.scale) == ("cross-encoder", "logit")
    assert [item.score for item in found] == sorted((i.score for i in found), reverse=True)
    assert found[0].n_tokens == 3 + 3 + 4


def test_scores_of_many_queries_come_by_pair(serve: Serve) -> None:
    for kind in ("embedding", "reranker"):
        served = serve(kind=kind)
        served.ready()
        request = wire.Score(["a", "b"], ["a", "b"], [(0, 0), (1, 0), (1, 1)], job=5)
        found, _ = scores(served, request)
        assert found[0].score > found[1].score < found[2].score


def test_a_document_is_cut_to_its_limit_and_to_what_fits(serve: Serve) -> None:
    long = "a " * 90
    served = serve(kind="reranker", n_ctx=40)
    served.ready()
    (cut,), _ = scores(served, score("q", long))
    assert (cut.n_tokens, cut.n_cut) == (40, 90 - 35)
    (cut,), _ = scores(served, score("q", long, max_tokens=10))
    assert (cut.n_tokens, cut.n_cut) == (15, 80)
    (cut,), _ = scores(served, score(long, "d"))
    assert (cut.n_tokens, cut.n_cut) == (30 + 1 + 4, 0), "a query takes three quarters at most"
    assert cut.n_cut_query == 60
    failure = failed(served, score("q", "short", long, truncate="none"))
    assert (failure.param, failure.numbers["index"]) == ("documents", 1)
    served = serve(n_ctx=40)
    served.ready()
    (cut,), _ = scores(served, score("q", long, max_tokens=10))
    assert (cut.n_tokens, cut.n_cut) == (3 + 12, 80)


@pytest.mark.parametrize("method", ["dense", "sparse", "colbert", "hybrid", None])
def test_an_embedding_model_scores_by_its_vectors(method: Any, serve: Serve) -> None:
    served = serve()
    served.ready()
    found, message = scores(
        served, score("where is the rain", "the rain is here", "two eggs", method=method)
    )
    assert (message.method, message.scale) == (method or "hybrid", "similarity")
    assert found[0].score > found[1].score


def test_hybrid_is_the_weighted_mean_of_the_three(serve: Serve) -> None:
    served = serve()
    served.ready()
    by_method = {}
    for method in ("dense", "sparse", "colbert"):
        (found,), _ = scores(served, score("a b c", "b c d", method=method))
        by_method[method] = found.score
    (found,), _ = scores(served, score("a b c", "b c d", weights=(1.0, 3.0, 4.0)))
    mean = by_method["dense"] + 3 * by_method["sparse"] + 4 * by_method["colbert"]
    assert found.score == pytest.approx(mean / 8, rel=1e-6)


def test_a_query_that_fails_fails_its_pairs_only(serve: Serve) -> None:
    served = serve({"match": "never", "fault": "nan"})
    served.ready()
    pairs = [(0, 0), (1, 0), (0, 1)]
    found, _ = scores(served, wire.Score(["fine", "never"], ["d", "never"], pairs, job=1))
    assert [item.fault is None for item in found] == [True, False, False]
