"""POST /v1/embeddings, and the same as text-embeddings-inference knows it, on the fake encoder."""

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from api import embeddings
from api.vectors import truncated_header
from engine.backends.fake_encoder import N_EMBD, N_VOCAB
from server import check_config
from tests.serving import Service, fake, script, serving, settings, wait_until

RULES = (
    {"match": "poison", "fault": "nan"},
    {"match": "shy", "fault": "nan_in_company"},
    {"match": "broken", "fault": "step"},
    {"match": "stall", "fault": "stall"},
)
KINDS = ["dense", "sparse", "colbert"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(tmp_path_factory.mktemp("embeddings"), *RULES)
    with serving(settings(embedding=fake(path, aliases=["bge-m3"]), light=fake())) as service:
        yield service


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Only dense vectors of few tokens, token ids are its own, and the first numbers a vector."""
    path = script(tmp_path_factory.mktemp("small"), heads=False)
    tier = fake(
        path, n_ctx=16, token_ids="own", matryoshka=True, query_prefix="ask: ",
        passage_prefix="text: ",
    )  # fmt: skip
    with serving(settings(embedding=tier)) as service:
        yield service


def items(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    data: list[Any] = reply.json()["data"]
    return data


def fault(reply: httpx.Response, status: int = 400) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def floats(data: str, dtype: str = "<f4") -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(data), dtype)


# OpenAI's form


def test_one_text_has_one_vector_of_length_1(service: Service) -> None:
    body = service.embed("two words").json()
    (item,) = body.pop("data")
    assert body == {
        "object": "list",
        "model": "embedding",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    vector = item.pop("embedding")
    assert item == {"object": "embedding", "index": 0}
    assert len(vector) == N_EMBD
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_vectors_come_in_the_order_of_their_texts(service: Service) -> None:
    texts = [f"{'word ' * (i % 7)}number {i}" for i in range(40)]
    found = items(service.embed(texts))
    assert [item["index"] for item in found] == list(range(40))
    for i in (0, 6, 39):
        (alone,) = items(service.embed(texts[i]))
        np.testing.assert_allclose(found[i]["embedding"], alone["embedding"], atol=1e-6)


def test_base64_has_the_same_numbers(service: Service) -> None:
    (numbers,) = items(service.embed("a b"))
    (packed,) = items(service.embed("a b", encoding_format="base64"))
    assert floats(packed["embedding"]).tolist() == numbers["embedding"]


def test_2048_texts_are_not_too_many(service: Service) -> None:
    found = items(service.embed([f"t{i}" for i in range(2048)], encoding_format="base64"))
    assert [item["index"] for item in found] == list(range(2048))


def test_a_tier_is_found_by_its_names(service: Service) -> None:
    assert service.embed(model="bge-m3").json()["model"] == "embedding"
    assert fault(service.embed(model="ada"), 404)["code"] == "model_not_found"
    for model in ("light", "reranker"):
        assert fault(service.embed(model=model))["param"] == "model"


# kinds of vectors


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ["dense"]),
        ({"embedding_type": "sparse"}, ["sparse"]),
        ({"embedding_type": ["colbert", "dense"]}, ["dense", "colbert"]),
        ({"return_sparse": True}, ["dense", "sparse"]),
        ({"return_sparse": True, "return_dense": False}, ["sparse"]),
        ({"return_sparse": True, "return_colbert": True}, KINDS),
        ({"embedding_type": "colbert", "return_dense": True}, ["dense", "colbert"]),
        ({"embedding_type": KINDS, "return_colbert": False}, ["dense", "sparse"]),
        ({"embedding_type": None, "return_dense": None}, ["dense"]),
    ],
    ids=str,
)
def test_each_has_the_vectors_that_are_asked_for(
    service: Service, fields: dict[str, Any], kinds: list[str]
) -> None:
    for item in items(service.embed(["a b", "c"], **fields)):
        assert bool(item["embedding"]) == ("dense" in kinds)
        assert isinstance(item["embedding"], list), "clients read a list or a text"
        assert ("sparse_embedding" in item) == ("lexical_weights" in item) == ("sparse" in kinds)
        assert ("colbert_vecs" in item) == ("colbert" in kinds)


def test_a_sparse_vector_is_the_same_in_both_forms(service: Service) -> None:
    (item,) = items(service.embed("rain and rain", embedding_type="sparse", return_tokens=True))
    assert item["embedding"] == []
    sparse = item["sparse_embedding"]
    assert sparse["indices"] == sorted(set(sparse["indices"]))
    assert len(sparse["indices"]) == 2, "a token that is repeated counts once"
    assert set(sparse["indices"]) == set(item["token_ids"][1:-1])
    assert min(sparse["values"]) > 0
    pairs = zip(sparse["indices"], sparse["values"], strict=True)
    assert item["lexical_weights"] == {str(index): value for index, value in pairs}


def test_colbert_rows_are_those_of_the_tokens_without_the_first(service: Service) -> None:
    (item,) = items(service.embed("a b c", embedding_type="colbert"))
    rows = np.array(item["colbert_vecs"])
    assert rows.shape == (4, N_EMBD)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("float32", "<f4"), ("float16", "<f2")])
def test_colbert_in_base64_has_its_shape(service: Service, name: str, dtype: str) -> None:
    fields = {"embedding_type": "colbert", "colbert_dtype": name}
    (numbers,) = items(service.embed("a b c", **fields))
    (packed,) = items(service.embed("a b c", encoding_format="base64", **fields))
    colbert = packed["colbert_embedding"]
    assert "colbert_vecs" not in packed
    assert (colbert["shape"], colbert["dtype"]) == ([4, N_EMBD], name)
    rows = floats(colbert["data"], dtype).reshape(colbert["shape"])
    assert rows.tolist() == numbers["colbert_vecs"]


def test_tokens_are_told_on_request(service: Service) -> None:
    (item,) = items(service.embed("Rain here", return_tokens=True))
    assert item["tokens"] == ["<s>", " rain", " here", "</s>"]
    assert len(item["token_ids"]) == 4
    assert "tokens" not in items(service.embed("Rain here"))[0]


def test_without_heads_only_dense_vectors_are_made(small: Service) -> None:
    assert items(small.embed("a"))[0]["embedding"]
    for fields in ({"embedding_type": "sparse"}, {"return_colbert": True}):
        error = fault(small.embed("a", **fields))
        assert "sparse_linear.pt" in error["message"]
        assert error["param"] == next(iter(fields))


def test_nothing_asked_for(service: Service) -> None:
    assert fault(service.embed("a", return_dense=False))["param"] == "return_dense"


# dimensions


def test_shorter_vectors_are_the_first_numbers_with_length_1(small: Service) -> None:
    (whole,) = items(small.embed("a b"))
    for form in ("float", "base64"):
        (cut,) = items(small.embed("a b", dimensions=8, encoding_format=form))
        numbers = cut["embedding"] if form == "float" else floats(cut["embedding"])
        head = np.array(whole["embedding"][:8])
        np.testing.assert_allclose(numbers, head / np.linalg.norm(head), atol=1e-6)
    assert items(small.embed("a b", dimensions=N_EMBD)) == [whole]


def test_vectors_are_not_cut_where_the_model_was_not_trained_for_it(service: Service) -> None:
    error = fault(service.embed("a", dimensions=8))
    assert (error["param"], error["code"]) == ("dimensions", "unsupported_parameter")
    assert "EMBEDDING_MATRYOSHKA=true" in error["message"]
    assert items(service.embed("a", dimensions=N_EMBD)) == items(service.embed("a"))


def test_models_that_are_known_to_allow_it_need_no_setting(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-Embedding-0.6B.json"
    path.write_text("{}")
    with serving(settings(embedding=fake(str(path)))) as service:
        assert len(items(service.embed("a", dimensions=4))[0]["embedding"]) == 4
    with serving(settings(embedding=fake(str(path), matryoshka=False))) as service:
        assert fault(service.embed("a", dimensions=4))["param"] == "dimensions"


def test_nomics_are_normed_as_a_layer_before_they_are_cut(tmp_path: Path) -> None:
    """As its authors do: F.layer_norm without weights, the first numbers, length 1."""
    path = tmp_path / "nomic-embed-text-v1.5.Q8_0.json"
    path.write_text("{}")
    with serving(settings(embedding=fake(str(path)))) as service:
        whole = np.array(items(service.embed("a b"))[0]["embedding"])
        assert abs(whole.mean()) > 1e-2
        head = ((whole - whole.mean()) / np.sqrt(whole.var() + 1e-5))[:8]
        wanted = head / np.linalg.norm(head)
        (cut,) = items(service.embed("a b", dimensions=8))
        np.testing.assert_allclose(cut["embedding"], wanted, atol=1e-6)
        (row,) = service.http.post("/embed", json={"inputs": "a b", "dimensions": 8}).json()
        np.testing.assert_allclose(row, wanted, atol=1e-6)
        assert items(service.embed("a b", dimensions=N_EMBD))[0]["embedding"] == whole.tolist()


def test_a_model_of_the_hub_is_known_by_its_repo_and_not_by_its_commit(tmp_path: Path) -> None:
    for repo, knows in (("mixedbread-ai--mxbai-embed-large-v1", True), ("BAAI--bge-m3", False)):
        path = tmp_path / f"models--{repo}" / "snapshots" / ("4f" * 20)
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        with serving(settings(embedding=fake(str(path)))) as service:
            reply = service.embed("a", dimensions=4)
            if knows:
                assert len(items(reply)[0]["embedding"]) == 4
            else:
                assert fault(reply)["message"].startswith("BAAI/bge-m3 is not known")
            too_many = fault(service.embed("a", dimensions=N_EMBD + 1))
            assert too_many["message"].startswith(f"The vectors of {repo.replace('--', '/', 1)} ")


def test_the_dimensions_of_who_asks_for_none_are_a_setting() -> None:
    with serving(settings(embedding=fake(embedding_dimension=4, matryoshka=True))) as service:
        assert len(items(service.embed("a"))[0]["embedding"]) == 4
        assert len(items(service.embed("a", dimensions=5))[0]["embedding"]) == 5
        assert len(service.http.post("/embed", json={"inputs": "a"}).json()[0]) == 4
        assert items(service.embed("a", embedding_type="sparse"))[0]["embedding"] == []


@pytest.mark.parametrize("dimension", [4, N_EMBD + 1])
def test_dimensions_of_a_setting_that_the_model_does_not_have_are_named_by_it(
    caplog: pytest.LogCaptureFixture, dimension: int
) -> None:
    with serving(settings(embedding=fake(embedding_dimension=dimension))) as service:
        for reply in (service.embed("a"), service.http.post("/embed", json={"inputs": "a"})):
            error = fault(reply)
            assert error["message"].startswith(f"EMBEDDING_EMBEDDING_DIMENSION={dimension}: ")
        asked = fault(service.embed("a", dimensions=dimension))
        assert "EMBEDDING_EMBEDDING_DIMENSION" not in asked["message"]
        assert items(service.embed("a", dimensions=N_EMBD))
        report, is_well = check_config(service.manager)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [f"Tier embedding: {error['message']}"], "at the start"
    assert error["message"] in report
    assert not is_well


@pytest.mark.parametrize("dimensions", [0, -1, N_EMBD + 1, 2**40, "few"])
def test_dimensions_that_no_vector_has(small: Service, dimensions: object) -> None:
    assert fault(small.embed("a", dimensions=dimensions))["param"] == "dimensions"


def test_dimensions_are_those_of_dense_vectors(service: Service) -> None:
    asked = service.embed("a", dimensions=N_EMBD, embedding_type="sparse")
    assert fault(asked)["param"] == "dimensions"


# token ids


@pytest.mark.parametrize("ids", [[5, 6], [[5], [6, 7]]], ids=str)
def test_token_ids_may_be_anybodys_and_are_refused(service: Service, ids: object) -> None:
    error = fault(service.embed(ids))
    assert error["param"] == "input"
    assert "check_embedding_ctx_length=False" in error["message"]
    assert "EMBEDDING_TOKEN_IDS" in error["message"]


def test_token_ids_of_the_model_stand_for_their_text(small: Service) -> None:
    (text,) = items(small.embed("a b", return_tokens=True))
    ids = text["token_ids"]
    for asked in (ids, ids[1:-1]):  # with the model's own at both ends, or without
        assert items(small.embed(asked, return_tokens=True)) == [text]
    assert len(items(small.embed([ids, ids]))) == 2


@pytest.mark.parametrize("ids", [[5, N_VOCAB], [[5], [N_VOCAB]], [[2**31]], [-1], [[]]], ids=str)
def test_token_ids_that_do_not_exist(small: Service, ids: object) -> None:
    assert fault(small.embed(ids))["param"].startswith("input")


def test_token_ids_of_another_tokenizer_become_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoding:
        def decode_bytes(self, ids: list[int]) -> bytes:
            if 9 in ids:
                raise KeyError(9)
            return b" ".join(b"w%d" % i for i in ids)

    monkeypatch.setattr("tiktoken.get_encoding", lambda name: Encoding())
    with serving(settings(embedding=fake(token_ids="cl100k"))) as service:
        assert items(service.embed([[1, 2], [3]])) == items(service.embed(["w1 w2", "w3"]))
        assert "cl100k_base" in fault(service.embed([1, 9]))["message"]


@pytest.mark.parametrize(
    ("cut", "text"),
    [("über".encode()[1:], "ber"), ("😀 b".encode()[1:], " b"), ("a 世".encode()[:-1], "a "),
     ("世 a 😀".encode()[2:-3], " a "), (b"a\xff", None), (b"a\xbfb", None),
     (b"\x80" * 4 + b"a", None), ("世".encode()[:2] + b"a", None), ("世".encode()[1:], None)],
    ids=repr,
)  # fmt: skip
def test_a_cut_of_token_ids_within_a_character_loses_that_alone(
    cut: bytes, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by LangChain, which cuts long texts into so many ids."""

    class Encoding:
        def decode_bytes(self, ids: list[int]) -> bytes:
            return bytes(ids)

    monkeypatch.setattr("tiktoken.get_encoding", lambda name: Encoding())
    with serving(settings(embedding=fake(token_ids="cl100k"))) as service:
        reply = service.embed([[*cut]])
        if text is None:
            assert fault(reply)["param"] == "input"
        else:
            assert items(reply) == items(service.embed([text]))


# too long


def test_a_text_that_is_too_long_is_refused_with_both_numbers(small: Service) -> None:
    error = fault(small.embed(["short", "w " * 30]))
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"], error["index"]) == (32, 16, 1)
    assert error["param"] == "input"
    assert "EMBEDDING_N_CTX" in error["message"]
    assert "`truncate`" in error["message"]


@pytest.mark.parametrize("end", ["start", "end"])
def test_a_text_is_cut_where_that_is_wanted_and_the_reply_says_so(small: Service, end: str) -> None:
    words = [f"w{i}" for i in range(30)]
    left = words[16:] if end == "start" else words[:14]
    reply = small.embed(["short", " ".join(words)], truncate=end)
    assert reply.json()["truncated"] == [{"index": 1, "n_tokens_cut": 16}]
    assert reply.json()["usage"]["prompt_tokens"] == 3 + 16
    (whole,) = items(small.embed(" ".join(left)))
    assert items(reply)[1]["embedding"] == whole["embedding"]
    assert "truncated" not in small.embed("short", truncate=end).json()


@pytest.mark.parametrize("end", ["start", "end"])
def test_a_setting_says_where_texts_are_cut_whose_request_does_not(end: Any) -> None:
    words = [f"w{i}" for i in range(30)]
    long, left = " ".join(words), " ".join(words[16:] if end == "start" else words[:14])
    with serving(settings(embedding=fake(n_ctx=16, truncate=end))) as service:
        reply = service.embed(["short", long])
        assert reply.json()["truncated"] == [{"index": 1, "n_tokens_cut": 16}]
        cut = items(reply)[1]["embedding"]
        assert cut == items(service.embed(left))[0]["embedding"]
        assert cut == items(service.embed(long, truncate=None))[0]["embedding"]
        other = "end" if end == "start" else "start"
        assert items(service.embed(long, truncate=other))[0]["embedding"] != cut
        error = fault(service.embed(long, truncate="none"))
        assert "EMBEDDING_TRUNCATE" in error["message"]
        body = {"inputs": long}
        for asked in ({}, {"truncate": None}, {"truncation_direction": None}):
            reply = service.http.post("/embed", json=body | asked)
            assert reply.json() == [cut]
            assert reply.headers["X-Truncated-Inputs"] == "0=16"
        assert service.http.post("/embed_sparse", json=body).status_code == 200
        direction = "Right" if end == "start" else "Left"
        reply = service.http.post("/embed", json=body | {"truncation_direction": direction})
        assert reply.json() == [items(service.embed(long, truncate=other))[0]["embedding"]]
        assert fault(service.http.post("/embed", json=body | {"truncate": False}))


@pytest.mark.parametrize(
    ("input_type", "text"),
    [("query", "ask: a"), ("search_query", "ask: a"), ("passage", "text: a"),
     ("document", "text: a"), ("search_document", "text: a"), (None, "a")],
)  # fmt: skip
def test_the_prefix_of_a_role(small: Service, input_type: str | None, text: str) -> None:
    assert items(small.embed("a", input_type=input_type)) == items(small.embed(text))
    body = {"inputs": "a", "prompt_name": input_type}
    assert small.http.post("/embed", json=body).json() == [items(small.embed(text))[0]["embedding"]]


def test_a_setting_says_what_texts_are_whose_request_does_not(tmp_path: Path) -> None:
    prefixes = {"query_prefix": "ask: ", "passage_prefix": "text: "}
    tier = fake(script(tmp_path), input_type="document", **prefixes)
    with serving(settings(embedding=tier)) as service:
        plain = items(service.embed("text: a", input_type="none"))
        assert items(service.embed("a")) == plain
        assert service.http.post("/embed", json={"inputs": "a"}).json() == [plain[0]["embedding"]]
        asked = items(service.embed("a", input_type="query"))
        assert asked == items(service.embed("ask: a", input_type="none"))


# what is refused


@pytest.mark.parametrize(
    ("asked", "param"),
    [("", "input"), ([], "input"), (None, "input"), ({}, "input"), (["a", ""], "input[1]"),
     (["a"] * 2049, "input"), (["a", "\ud800"], "input[1]"), (["a", 5], "input[1]"),
     ([5, "a"], "input[1]"), ([["a"]], "input[0][0]"), ([True, False], "input[0]"),
     ([5, True], "input[1]"), ([[5, True]], "input[0][1]")],
    ids=["empty", "none", "null", "object", "empty text", "too many", "half a surrogate",
         "an id among texts", "a text among ids", "texts in a list", "truths", "a truth among ids",
         "a truth in a list"],
)  # fmt: skip
def test_input_that_is_none(service: Service, asked: object, param: str) -> None:
    content = json.dumps({"model": "embedding", "input": asked})
    headers = {"Content-Type": "application/json"}
    reply = service.http.post("/v1/embeddings", content=content, headers=headers)
    assert fault(reply)["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [("embedding_type", "late"), ("embedding_type", []), ("encoding_format", "int8"),
     ("truncate", "middle"), ("colbert_dtype", "int8"), ("input_type", "image"),
     ("return_tokens", 7)],
)  # fmt: skip
def test_the_field_at_fault_is_named(service: Service, field: str, value: object) -> None:
    assert fault(service.embed("a", **{field: value}))["param"].startswith(field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"return_dense": False}, "return_dense"),
     ({"embedding_type": "sparse", "return_sparse": False}, "return_sparse")],
)  # fmt: skip
def test_no_kind_of_vector_names_the_field_that_took_the_last(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    assert fault(service.embed("a", **fields))["param"] == param


def test_a_reply_of_too_many_numbers_is_refused_before_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    (item,) = items(service.embed("a b", embedding_type="colbert"))
    n_numbers = sum(map(len, item["colbert_vecs"]))
    monkeypatch.setitem(embeddings.MAX_COLBERT_NUMBERS, "float", 4 * n_numbers - 1)
    error = fault(service.embed(["a b"] * 4, embedding_type="colbert"))
    assert (error["param"], "base64" in error["message"]) == ("encoding_format", True)
    assert len(items(service.embed(["a b"] * 3, embedding_type="colbert"))) == 3
    packed = {"embedding_type": "colbert", "encoding_format": "base64"}
    assert len(items(service.embed(["a b"] * 4, **packed))) == 4
    assert len(items(service.embed(["a b"] * 4))) == 4


def test_fields_that_nobody_knows_are_named(service: Service) -> None:
    reply = service.embed("a", frob=1, user="me")
    assert items(reply)
    assert reply.headers["X-Ignored-Params"] == "frob"
    assert "X-Ignored-Params" not in service.embed("a", user="me").headers
    with serving(settings({"strict_params": True}, embedding=fake())) as strict:
        assert fault(strict.embed("a", frob=1))["param"] == "frob"


# faults


@pytest.mark.parametrize("word", ["poison", "broken"])
def test_a_poison_text_is_its_own_requests_error(service: Service, word: str) -> None:
    replies: list[httpx.Response] = []
    innocent = threading.Thread(target=lambda: replies.append(service.embed(["a"] * 200)))
    innocent.start()
    error = fault(service.embed(["fine", word]), 500)
    innocent.join()
    assert (error["code"], error["index"]) == ("internal_error", 1)
    assert len(items(replies[0])) == 200
    assert items(service.embed("fine"))


def test_what_goes_wrong_in_company_is_computed_alone(service: Service) -> None:
    found = items(service.embed(["fine", "shy"]))
    assert all(np.isfinite(item["embedding"]).all() for item in found)


def test_a_full_queue_is_a_429_that_says_when_to_come_back(tmp_path: Path) -> None:
    tier = fake(script(tmp_path, *RULES), queue_texts=2)
    with serving(settings(embedding=tier)) as service:
        with httpx.Client(base_url=service.url, timeout=30, trust_env=False) as other:
            body = {"model": "embedding", "input": ["stall", "b"]}
            stalled = threading.Thread(target=_post_and_leave, args=(other, body))
            stalled.start()
            wait_until(lambda: service.manager.tiers["embedding"].is_wanted)
            reply = service.embed("a")
            stalled.join()
        assert fault(reply, 429)["code"] == "queue_full"
        assert int(reply.headers["Retry-After"]) >= 1
        wait_until(lambda: not service.manager.tiers["embedding"].is_wanted)
        assert items(service.embed("a"))


def _post_and_leave(client: httpx.Client, body: object) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/embeddings", json=body, timeout=1)


# text-embeddings-inference's form


def test_tei_gets_bare_lists(service: Service) -> None:
    reply = service.http.post("/embed", json={"inputs": ["a", "b c"]})
    assert reply.json() == [item["embedding"] for item in items(service.embed(["a", "b c"]))]
    (alone,) = service.http.post("/embed", json={"inputs": "b c", "normalize": True}).json()
    np.testing.assert_allclose(alone, reply.json()[1], atol=1e-6)


def test_tei_gets_vectors_as_they_are_pooled_where_they_are_not_to_have_length_1(
    small: Service,
) -> None:
    for texts in (["a b", "c d e"], ["a b"]):
        body = {"inputs": texts, "normalize": False}
        raw = np.array(small.http.post("/embed", json=body).json())
        unit = np.array([item["embedding"] for item in items(small.embed(texts))])
        lengths = np.linalg.norm(raw, axis=1, keepdims=True)
        assert (abs(lengths - 1) > 0.1).all()
        np.testing.assert_allclose(raw / lengths, unit, atol=1e-6)
        short = small.http.post("/embed", json=body | {"dimensions": 4}).json()
        np.testing.assert_allclose(short, raw[:, :4], atol=1e-6)
    reply = small.http.post("/embed", json={"inputs": "a b", "normalize": None})
    assert reply.json() == [unit[0].tolist()]


def test_nomics_are_less_their_mean_before_a_cut_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "nomic-embed-text-v1.5.Q8_0.json"
    path.write_text("{}")
    with serving(settings(embedding=fake(str(path)))) as service:
        body: dict[str, Any] = {"inputs": "a b", "normalize": False}
        (raw,) = np.array(service.http.post("/embed", json=body).json())
        (cut,) = service.http.post("/embed", json=body | {"dimensions": 8}).json()
        np.testing.assert_allclose(cut, (raw - raw.mean())[:8], atol=1e-6)


def test_tei_is_reached_without_a_path_too(service: Service) -> None:
    body = {"inputs": ["a", "b c"]}
    reply = service.http.post("/", json=body)
    assert reply.status_code == 200
    assert reply.json() == service.http.post("/embed", json=body).json()


def test_tei_gets_sparse_vectors_as_pairs(service: Service) -> None:
    (pairs,) = service.http.post("/embed_sparse", json={"inputs": "a b"}).json()
    (item,) = items(service.embed("a b", embedding_type="sparse"))
    assert {str(pair["index"]): pair["value"] for pair in pairs} == item["lexical_weights"]


def test_tei_may_let_texts_be_cut(small: Service) -> None:
    words = [f"w{i}" for i in range(30)]
    body: dict[str, Any] = {"inputs": " ".join(words)}
    error = fault(small.http.post("/embed", json=body))
    assert (error["param"], error["n_ctx"]) == ("inputs", 16)
    assert error["message"].startswith("inputs[0] ")
    for direction, left in (("Right", words[:14]), ("Left", words[16:])):
        cut = {"truncate": True, "truncation_direction": direction}
        (vector,) = small.http.post("/embed", json=body | cut).json()
        assert vector == items(small.embed(" ".join(left)))[0]["embedding"]
    body = {"inputs": "a", "dimensions": 4}
    assert len(small.http.post("/embed", json=body).json()[0]) == 4


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/embed", {"inputs": []}, "inputs"), ("/embed", {"inputs": ["a", ""]}, "inputs[1]"),
     ("/embed", {"inputs": [5]}, "inputs[0]"), ("/embed", {}, "inputs"),
     ("/embed", {"inputs": "a", "normalize": 7}, "normalize"),
     ("/embed_sparse", {"inputs": "a"}, "inputs")],
    ids=str,
)  # fmt: skip
def test_tei_is_told_the_field_at_fault(
    small: Service, path: str, body: object, param: str
) -> None:
    assert fault(small.http.post(path, json=body))["param"] == param


def test_what_has_no_meaning_for_a_sparse_vector_is_named(service: Service) -> None:
    body = {"inputs": "a", "dimensions": 4, "normalize": False}
    reply = service.http.post("/embed_sparse", json=body)
    assert reply.status_code == 200
    assert reply.headers["X-Ignored-Params"] == "dimensions,normalize"


def test_tei_is_told_the_limits(service: Service) -> None:
    assert service.http.get("/info").json() == {
        "model_id": "fake",
        "max_input_length": 8192,
        "max_batch_tokens": 512,
        "max_client_batch_size": 2048,
    }
    with serving() as without:
        assert without.http.get("/info").status_code == 404


def test_a_header_names_no_more_cuts_than_clients_take() -> None:
    few = truncated_header([("query", 3), ("0", 0), ("1", 20)])
    assert few == {"X-Truncated-Inputs": "query=3,1=20"}
    named = truncated_header((str(n), 123) for n in range(2048))["X-Truncated-Inputs"]
    *whole, end = named.split(",")
    assert (end, whole[-1][-4:]) == ("...", "=123")
    assert 3900 < len(named) < 4100
    assert truncated_header([("0", 0)]) == {}
