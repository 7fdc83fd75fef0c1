"""POST /v1/rerank and /v1/score on the fake encoder: a cross-encoder, and an embedding model."""

import dataclasses
import json
import math
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.rerank import ScoreRequest
from errors import BadRequest
from tests.serving import Service, fake, script, serving, settings

QUERY = "where is rain"
DOCUMENTS = ["eggs and salt", "here is rain", "where is rain today", "rain"]
BEST_FIRST = [2, 1, 3, 0]
POISON = {"match": "poison", "fault": "nan"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cross-encoder of 32 tokens, and an embedding model with all kinds of vectors."""
    path = script(tmp_path_factory.mktemp("rerank"), POISON)
    tiers = {"reranker": fake(path, aliases=["bge-reranker"], n_ctx=32), "embedding": fake(path)}
    with serving(settings(**tiers, light=fake())) as service:
        yield service


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """No reranker, and an embedding model without heads."""
    path = script(tmp_path_factory.mktemp("stand_in"), POISON, heads=False)
    tier = fake(path, n_ctx=32, query_prefix="query: ", passage_prefix="passage: ")
    with serving(settings(embedding=tier)) as service:
        yield service


def answer(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()


def fault(reply: httpx.Response, status: int = 400) -> Any:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def scored(service: Service, query: str, documents: list[str], **fields: Any) -> dict[int, float]:
    """The scores by index, best first."""
    results = answer(service.rerank(query, documents, **fields))["results"]
    return {item["index"]: item["relevance_score"] for item in results}


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


# shapes


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_reply_that_every_client_can_read(service: Service, path: str) -> None:
    body = answer(service.rerank(QUERY, DOCUMENTS, path))
    assert body.pop("id").startswith("rerank-")
    results = body.pop("results")
    assert body.pop("data") == results, "where Continue looks"
    assert [item["index"] for item in results] == BEST_FIRST
    assert all(item.keys() == {"index", "relevance_score"} for item in results)
    assert all(0 < item["relevance_score"] < 1 for item in results)
    n_tokens = body["usage"]["prompt_tokens"]
    assert n_tokens == 4 * 7 + 3 + 3 + 4 + 1
    assert body == {
        "object": "list",
        "model": "reranker",
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "warnings": [],
        },
        "score_type": "sigmoid",
        "method": "cross-encoder",
    }


def test_jinas_and_coheres_documents_as_objects(service: Service) -> None:
    objects = [{"text": text, "id": n} for n, text in enumerate(DOCUMENTS)]
    body = answer(service.rerank(QUERY, objects, return_documents=True, top_n=2))
    assert [item["document"] for item in body["results"]] == [
        {"text": DOCUMENTS[2]},
        {"text": DOCUMENTS[1]},
    ]
    assert [item.keys() for item in body["data"]] == [{"index", "relevance_score"}] * 2


def test_tei_gets_a_bare_list(service: Service) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True}
    found = answer(service.http.post("/rerank", json=body))
    assert [item["index"] for item in found] == BEST_FIRST
    assert all(item.keys() == {"index", "score"} for item in found)
    with_texts = answer(service.http.post("/rerank", json=body | {"return_text": True}))
    assert [item["text"] for item in with_texts] == [DOCUMENTS[i] for i in BEST_FIRST]
    raw = answer(service.http.post("/rerank", json=body | {"raw_scores": True}))
    assert [sigmoid(item["score"]) for item in raw] == [item["score"] for item in found]


@pytest.mark.parametrize("method", [None, "dense", "sparse", "colbert", "hybrid"])
def test_an_empty_document_is_scored_as_others_are(service: Service, method: str | None) -> None:
    documents = ["", "rain", {"text": ""}]
    found = scored(service, "rain", documents, method=method)  # type: ignore[arg-type]
    assert list(found) == [1, 0, 2]
    assert found[0] == found[2]
    body = {"query": "rain", "texts": ["", "rain"]}
    assert [item["index"] for item in answer(service.http.post("/rerank", json=body))] == [1, 0]
    low, high = scores(service, text_1="rain", text_2=["", "rain"], method=method)
    assert low < high
    if method is not None:  # vectors are compared, and those of nothing are near many others
        assert found[0] == low == 0.0


def test_the_model_is_found_by_its_names_or_is_the_only_one(service: Service) -> None:
    for model in ("bge-reranker", "reranker"):
        assert answer(service.rerank("a", ["b"], model=model))["model"] == "reranker"
    assert answer(service.rerank("a", ["b"], model="embedding"))["model"] == "embedding"
    assert fault(service.rerank("a", ["b"], model="light"))["param"] == "model"
    assert fault(service.rerank("a", ["b"], model="ada"), 404)["code"] == "model_not_found"


# order


def test_ties_are_in_the_order_of_the_documents(service: Service) -> None:
    assert list(scored(service, "a", ["x", "a", "y", "a", "z"])) == [1, 3, 0, 2, 4]


def test_the_order_is_that_of_logits_also_where_they_look_alike(tmp_path: Path) -> None:
    # so many further words that the sigmoid is 0 to the last digit that a float has
    words = " ".join(f"w{i}" for i in range(8000))
    documents = [words, words.rsplit(" ", 1)[0]]
    with serving(settings(reranker=fake(n_ctx=8192))) as service:
        raw = scored(service, "a", documents, raw_scores=True)
        assert list(raw) == [1, 0]
        assert raw[1] - raw[0] == pytest.approx(0.01, rel=0.01)
        assert list(scored(service, "a", documents)) == [1, 0]


def test_top_n_may_be_more_than_there_are(service: Service) -> None:
    assert list(scored(service, QUERY, DOCUMENTS, top_n=1)) == BEST_FIRST[:1]
    for top_n in (4, 99, None):
        assert list(scored(service, QUERY, DOCUMENTS, top_n=top_n)) == BEST_FIRST


# scales


def test_raw_scores_of_a_cross_encoder_are_logits(service: Service) -> None:
    raw = answer(service.rerank(QUERY, DOCUMENTS, raw_scores=True))
    assert raw["score_type"] == "logit"
    logits = {item["index"]: item["relevance_score"] for item in raw["results"]}
    assert min(logits.values()) < 0
    shown = scored(service, QUERY, DOCUMENTS)
    assert {n: sigmoid(logit) for n, logit in logits.items()} == pytest.approx(shown)


@pytest.mark.parametrize("raw_scores", [False, True])
def test_similarities_stay_as_they_are(service: Service, raw_scores: bool) -> None:
    body = answer(service.rerank("rain", ["rain"], method="dense", raw_scores=raw_scores))
    assert (body["score_type"], body["method"]) == ("similarity", "dense")
    assert body["results"][0]["relevance_score"] == pytest.approx(1)


# methods


def test_each_method_compares_its_own_vectors(service: Service) -> None:
    by_method = {
        method: scored(service, QUERY, DOCUMENTS, method=method)
        for method in ("dense", "sparse", "colbert")
    }
    assert by_method["sparse"][0] == 0, "no word in common"
    body = answer(service.rerank(QUERY, DOCUMENTS, method="hybrid"))
    assert body["weights"] == [1, 1, 1]
    assert [item["index"] for item in body["results"]] == BEST_FIRST
    for item in body["results"]:
        parts = [of[item["index"]] for of in by_method.values()]
        assert item["relevance_score"] == pytest.approx(sum(parts) / 3)
    weighted = answer(service.rerank(QUERY, DOCUMENTS, method="hybrid", weights=[0, 3, 1]))
    assert weighted["weights"] == [0, 3, 1]
    for item in weighted["results"]:
        _, sparse, colbert = (of[item["index"]] for of in by_method.values())
        assert item["relevance_score"] == pytest.approx((3 * sparse + colbert) / 4)


def test_where_vectors_are_compared_each_text_counts_once(service: Service) -> None:
    asked = {"queries": ["a b", "b"], "documents": ["a c", "b b"], "method": "dense"}
    assert answer(score(service, **asked))["usage"]["prompt_tokens"] == 4 + 3 + 4 + 4


def test_an_embedding_model_asked_for_scores_by_its_own_method(service: Service) -> None:
    assert answer(service.rerank("a", ["b"], model="embedding"))["method"] == "hybrid"


def test_a_method_that_is_not_there_is_named(service: Service, stand_in: Service) -> None:
    for method in ("sparse", "colbert", "hybrid", "cross-encoder"):
        error = fault(stand_in.rerank("a", ["b"], method=method))
        assert error["param"] == "method"
        assert method in error["message"]
    assert fault(service.rerank("a", ["b"], method="bm25"))["param"] == "method"
    with serving(settings(reranker=fake())) as alone:
        error = fault(alone.rerank("a", ["b"], method="dense"))
        assert "EMBEDDING_MODEL_PATH" in error["message"]


@pytest.mark.parametrize(
    "weights", [[1, 1], [1, 1, -1], [0, 0, 0], [1e308, 1e308, 1e308], "even", [1, 1, 1, 1]], ids=str
)
def test_weights_that_weigh_nothing(service: Service, weights: object) -> None:
    error = fault(service.rerank("a", ["b"], method="hybrid", weights=weights))
    assert error["param"].startswith("weights")


@pytest.mark.parametrize("method", [None, "dense"])
def test_weights_where_nothing_is_weighed(service: Service, method: str | None) -> None:
    error = fault(service.rerank("a", ["b"], method=method, weights=[1, 1, 1]))
    assert error["param"] == "weights"
    assert "hybrid" in error["message"]


# the embedding tier in place of a reranker


def test_without_a_reranker_the_embedding_model_scores(stand_in: Service) -> None:
    body = answer(stand_in.rerank(QUERY, DOCUMENTS))
    assert (body["model"], body["method"]) == ("reranker", "dense")
    assert body["score_type"] == "similarity"
    assert "weights" not in body
    assert body["results"][0]["index"] == 2


def test_its_prefixes_are_those_of_queries_and_passages(stand_in: Service) -> None:
    """The same text on both sides is not the same vector."""
    assert scored(stand_in, "rain", ["rain"])[0] < 0.999


def test_the_list_of_models_says_who_scores(stand_in: Service, service: Service) -> None:
    answer(stand_in.rerank("a", ["b"]))
    models = {model["id"]: model for model in stand_in.http.get("/v1/models").json()["data"]}
    assert list(models) == ["embedding", "reranker"]
    reranker = models["reranker"]
    assert (reranker["served_by"], reranker["capabilities"]) == ("embedding", ["rerank"])
    assert (reranker["methods"], reranker["state"]) == (["dense"], "ready")
    assert stand_in.http.get("/v1/models/reranker").json() == reranker
    assert "reranker" in fault(stand_in.embed(model="ada"), 404)["message"]
    assert "served_by" not in service.http.get("/v1/models/reranker").json()
    answer(service.rerank("a", ["b"], model="embedding"))
    about = service.http.get("/v1/models/embedding").json()
    assert set(about["methods"]) == {"hybrid", "dense", "sparse", "colbert"}
    assert set(about["vectors"]) == {"dense", "sparse", "colbert"}
    assert about["dimensions"] == 32


# too long


def test_max_tokens_per_doc_cuts_and_says_so(service: Service) -> None:
    long = "rain " + "x " * 9
    for method in (None, "dense"):
        fields = {"method": method, "max_tokens_per_doc": 4, "raw_scores": True}
        body = answer(service.rerank("rain", [long, "rain", "rain x x x"], **fields))
        (warning,) = body["meta"]["warnings"]
        assert warning.startswith("documents[0]: 6 tokens ")
        by_index = {item["index"]: item["relevance_score"] for item in body["results"]}
        assert by_index[0] == pytest.approx(by_index[2])


def test_a_document_that_does_not_fit_is_cut_at_its_end(service: Service) -> None:
    long = " ".join(["rain", *(f"w{i}" for i in range(40))])
    body = answer(service.rerank("rain", [long], raw_scores=True))
    assert body["meta"]["warnings"] == ["documents[0]: 14 tokens were cut."]
    score = body["results"][0]["relevance_score"]
    at_start = scored(service, "rain", [long], raw_scores=True, truncate="start")[0]
    assert score > 0 > at_start, "the word was at the start"


def test_a_query_that_had_to_be_cut_is_told_once(service: Service) -> None:
    long = "rain " * 40
    body = answer(service.rerank(long, ["a", "b"]))
    assert body["meta"]["warnings"] == ["query: 16 tokens were cut."]
    reply = service.http.post("/rerank", json={"query": long, "texts": ["a"], "truncate": True})
    assert reply.headers["x-truncated-inputs"] == "query=16"
    body = answer(service.http.post("/v1/score", json={"text_1": long, "text_2": ["a", "b " * 40]}))
    assert body["truncated"][0] == {"index": 0, "n_tokens_cut": 16}
    assert body["truncated"][1]["n_tokens_cut"] > 16


def test_a_stand_in_answers_to_the_names_of_the_reranker() -> None:
    of = dataclasses.replace(settings(embedding=fake()), reranker_aliases=["bge-reranker", "light"])
    with serving(of) as service:
        for model in ("bge-reranker", "reranker"):
            assert answer(service.rerank("a", ["b"], model=model))["model"] == "reranker"
            assert answer(service.http.get(f"/v1/models/{model}"))["served_by"] == "embedding"
            assert fault(service.embed(model=model))["param"] == "model"
        listed = answer(service.http.get("/v1/models"))["data"]
        assert [model["aliases"] for model in listed if model["id"] == "reranker"] == [
            ["bge-reranker", "light"]
        ]


@pytest.mark.parametrize("truncate", ["none", False])
def test_what_does_not_fit_is_refused_where_that_is_wanted(
    service: Service, stand_in: Service, truncate: object
) -> None:
    for of in (service, stand_in):
        error = fault(of.rerank("a", ["b", "b " * 40], truncate=truncate))
        assert error["code"] == "context_length_exceeded"
        assert (error["param"], error["index"], error["n_ctx"]) == ("documents", 1, 32)
        assert error["n_prompt_tokens"] > 40
        body = {"query": "a", "texts": ["b", "b " * 40], "truncate": truncate}
        error = fault(of.http.post("/rerank", json=body))
        assert error["param"] == "texts"
        assert error["message"].startswith("texts[1] ")


def test_tei_may_cut_at_the_start(service: Service) -> None:
    long = " ".join(["rain", *(f"w{i}" for i in range(40))])
    body = {"query": "rain", "texts": [long], "truncate": True, "raw_scores": True}
    (right,) = answer(service.http.post("/rerank", json=body))
    (left,) = answer(service.http.post("/rerank", json=body | {"truncation_direction": "Left"}))
    assert right["score"] > 0 > left["score"]


@pytest.mark.parametrize(
    ("truncate", "direction", "cut"),
    [("end", "Right", "end"), ("start", "left", "start"), (None, "Left", "start"),
     (True, "Left", "start"), (True, None, "end"), ("none", "Left", "none"),
     (False, "Right", "none"), ("end", "Left", None), ("start", "Right", None)],
)  # fmt: skip
def test_two_fields_that_say_where_to_cut_say_the_same(
    service: Service, truncate: object, direction: str | None, cut: str | None
) -> None:
    asked = {"truncate": truncate, "truncation_direction": direction}
    long = " ".join(["rain", *(f"w{i}" for i in range(40))])
    reply = service.rerank("rain", [long], **asked)
    if cut is None:
        error = fault(reply)
        assert error["param"] == "truncation_direction"
        assert f"'{truncate}'" in error["message"]
    elif cut == "none":
        assert fault(reply)["code"] == "context_length_exceeded"
    else:
        assert (
            answer(reply)["results"]
            == answer(service.rerank("rain", [long], truncate=cut))["results"]
        )


# /v1/score


def score(service: Service, **fields: Any) -> httpx.Response:
    return service.http.post("/v1/score", json={"model": "reranker"} | fields)


def scores(service: Service, **fields: Any) -> list[float]:
    data = answer(score(service, **fields))["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert all(item["object"] == "score" for item in data)
    return [item["score"] for item in data]


@pytest.mark.parametrize("model", ["reranker", "embedding"])
def test_scores_of_one_with_many_of_pairs_and_of_each_with_each(
    service: Service, model: str
) -> None:
    texts = ["rain", "sun", "rain and sun"]

    def of(first: object, second: object) -> list[float]:
        return scores(service, model=model, text_1=first, text_2=second)

    one = of("rain", texts)
    assert one[0] > one[2] > one[1]
    assert of(["rain"], texts) == pytest.approx(one)
    assert of("rain", "sun") == pytest.approx(one[1:2])
    pairs = of(["sun", "rain"], ["rain", "rain"])
    assert pairs == pytest.approx([of("sun", "rain")[0], one[0]])
    each = scores(service, model=model, queries=["rain", "sun"], documents=texts)
    assert each == pytest.approx(one + of("sun", texts))


def test_the_reply_of_score(service: Service) -> None:
    body = answer(score(service, text_1="rain", text_2="rain x", raw_scores=True))
    assert body.pop("id").startswith("score-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "list",
        "model": "reranker",
        "data": [{"index": 0, "object": "score", "score": pytest.approx(4.99)}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
        "score_type": "logit",
        "method": "cross-encoder",
    }
    cut = answer(score(service, text_1="rain", text_2=["a", "x " * 40]))
    assert cut["truncated"] == [{"index": 1, "n_tokens_cut": 13}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "text_1"), ({"text_1": "a"}, "text_2"), ({"documents": ["a"]}, "queries"),
     ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
     ({"text_1": ["a", "b"], "text_2": "a"}, "text_2"),
     ({"text_1": [], "text_2": "a"}, "text_1"), ({"text_1": ["a", ""], "text_2": "a"}, "text_1[1]"),
     ({"queries": "", "documents": "a"}, "queries[0]"),
     ({"text_1": "a", "text_2": "b", "queries": "a", "documents": "b"}, "queries"),
     ({"queries": ["a"] * 65, "documents": ["b"] * 64}, "documents"),
     ({"text_1": "a", "text_2": "b " * 40, "truncate": "none"}, "text_2"),
     ({"text_1": "a " * 40, "text_2": "b", "truncate": "none"}, "text_1"),
     ({"queries": "a " * 40, "documents": "b", "truncate": "none"}, "queries")],
    ids=str,
)  # fmt: skip
def test_pairs_that_are_none(
    service: Service, stand_in: Service, fields: dict[str, Any], param: str
) -> None:
    for of in (service, stand_in):
        error = fault(score(of, **fields))
        assert error["param"] == param, error


def test_too_many_pairs_are_refused_before_they_are_made() -> None:
    body = ScoreRequest(queries=["a"] * 2048, documents=["b"] * 2048)
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match="4,096 pairs"):
            body.read_pairs()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"query": ""}, "query"), ({"query": None}, "query"), ({"query": "\ud800"}, "query"),
     ({"documents": []}, "documents"), ({"documents": "a"}, "documents"),
     ({"documents": None}, "documents"),
     ({"documents": ["a", {"body": "b"}]}, "documents[1]"), ({"texts": ["a"]}, "texts"),
     ({"documents": ["a"] * 2049}, "documents"), ({"documents": ["\ud800"]}, "documents[0]"),
     ({"top_n": 0}, "top_n"), ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
     ({"truncate": "middle"}, "truncate"), ({"raw_scores": 7}, "raw_scores")],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_the_field_at_fault_is_named(service: Service, fields: object, param: str) -> None:
    body = {"model": "reranker", "query": "a", "documents": ["a", "b"]}
    reply = service.http.post(
        "/v1/rerank",
        content=json.dumps(body | fields),  # type: ignore[operator]
        headers={"Content-Type": "application/json"},
    )
    assert fault(reply)["param"] == param


def test_a_query_that_does_not_fit(stand_in: Service) -> None:
    error = fault(stand_in.rerank("a " * 40, ["b"], truncate="none"))
    assert (error["param"], error["code"]) == ("query", "context_length_exceeded")


def test_fields_that_nobody_knows_are_named(service: Service) -> None:
    reply = service.rerank("a", ["b"], rank_fields=["text"])
    assert answer(reply)
    assert reply.headers["X-Ignored-Params"] == "rank_fields"


def test_a_poison_document_is_its_own_requests_error(service: Service) -> None:
    replies: list[httpx.Response] = []
    documents = [f"document {i}" for i in range(200)]
    innocent = threading.Thread(target=lambda: replies.append(service.rerank("a", documents)))
    innocent.start()
    error = fault(service.rerank("a", ["fine", "poison"]), 500)
    innocent.join()
    assert (error["code"], error["index"]) == ("internal_error", 1)
    assert len(answer(replies[0])["results"]) == 200
    assert fault(service.rerank("poison", ["fine"], method="dense"), 500)["index"] == 0


def test_tei_cuts_only_where_it_is_asked_to_and_says_so(
    service: Service, stand_in: Service
) -> None:
    long = "word " * 1000
    reply = service.http.post("/rerank", json={"query": "q", "texts": [long, "a"]})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    body = {"query": "q", "texts": ["a", long], "truncate": True}
    reply = service.http.post("/rerank", json=body)
    assert reply.status_code == 200
    index, _, n_cut = reply.headers["x-truncated-inputs"].partition("=")
    assert (index, int(n_cut) > 100) == ("1", True)
    reply = stand_in.http.post("/embed", json={"inputs": ["a", long], "truncate": True})
    assert reply.headers["x-truncated-inputs"].startswith("1=")
    assert "x-truncated-inputs" not in stand_in.http.post("/embed", json={"inputs": "a"}).headers


@pytest.mark.parametrize("extra", ["queries", "documents"])
def test_two_forms_of_pairs_are_not_mixed(service: Service, extra: str) -> None:
    body = {"model": "reranker", "text_1": "a", "text_2": "b", extra: ["c"]}
    reply = service.http.post("/v1/score", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, extra)
