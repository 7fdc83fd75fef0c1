"""As test_fuzz.py, for vectors and scores: any body is answered or refused, nothing breaks, and
nothing is left behind."""

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.client import launch_process
from settings import TierSettings
from tests import encoder_fixtures
from tests.serving import Service, fake, in_threads, serving, settings, wait_until
from tests.test_fuzz import ANY_NUMBER, ODD

N_CTX = 64
TEXT = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from([*encoder_fixtures.TEXTS, "\0", " ", "</s>", "<mask>", "\u0301", "🙂" * 40]),
)
IDS = st.lists(st.integers(0, 200), min_size=1, max_size=70)
KIND = st.sampled_from(["dense", "sparse", "colbert", "late"])
FLAG = st.one_of(st.booleans(), st.none())
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "truncate": st.sampled_from(["start", "end", "none", None, True, False]),
    "truncation_direction": st.sampled_from(["Left", "right", "up"]),
    "frob": ODD,
}
EMBEDDING_FIELDS = COMMON | {
    "encoding_format": st.sampled_from(["float", "base64", "int8", None]),
    "dimensions": st.integers(-1, 80),
    "user": ODD,
    "embedding_type": st.one_of(KIND, st.lists(KIND, max_size=4)),
    "return_dense": FLAG,
    "return_sparse": FLAG,
    "return_colbert": FLAG,
    "return_tokens": FLAG,
    "colbert_dtype": st.sampled_from(["float32", "float16", "int8"]),
    "input_type": st.sampled_from(["query", "document", "search_query", "image"]),
    "normalize": FLAG,
    "inputs": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
}
WEIGHT = st.one_of(st.floats(0, 5), st.sampled_from([5e-324, 1e6, 1e308, math.nan, -1]))
SCORE_FIELDS = COMMON | {
    "texts": st.lists(TEXT, max_size=3),
    "top_n": st.integers(-1, 5),
    "return_documents": FLAG,
    "return_text": FLAG,
    "raw_scores": FLAG,
    "method": st.sampled_from(["dense", "sparse", "colbert", "hybrid", "cross-encoder", "bm25"]),
    "weights": st.lists(WEIGHT, min_size=2, max_size=4),
    "max_tokens_per_doc": st.one_of(st.integers(-1, 70), st.just(2**31)),
    "text_1": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
    "text_2": st.one_of(TEXT, st.lists(TEXT, max_size=3)),
    "queries": st.lists(TEXT, max_size=3),
}
DOCUMENT = st.one_of(TEXT, st.fixed_dictionaries({"text": TEXT}))


@st.composite
def bodies(
    draw: st.DrawFn, right: dict[str, st.SearchStrategy[Any]], more: dict[str, Any]
) -> dict[str, Any]:
    """Mostly right, with a few fields of any kind."""
    is_odd = draw(st.integers(0, 3)) == 0
    body = {name: draw(values) for name, values in right.items()}
    if is_odd and draw(st.booleans()):
        body[draw(st.sampled_from(sorted(body)))] = draw(ODD)
    for name in draw(st.lists(st.sampled_from(sorted(more)), max_size=4, unique=True)):
        body[name] = draw(st.one_of(more[name], ODD) if is_odd else more[name])
    return body


EMBEDDINGS = bodies(
    {"model": st.just("embedding"),
     "input": st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=5), IDS,
                        st.lists(IDS, min_size=1, max_size=3))},
    EMBEDDING_FIELDS,
)  # fmt: skip
RERANKS = bodies(
    {"model": st.sampled_from(["reranker", "reranker", "embedding"]), "query": TEXT,
     "documents": st.lists(DOCUMENT, min_size=1, max_size=5)},
    SCORE_FIELDS,
)  # fmt: skip
SCORES = bodies({"text_1": TEXT, "text_2": st.lists(TEXT, min_size=1, max_size=3)}, SCORE_FIELDS)
TEI = bodies({"inputs": st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3))}, EMBEDDING_FIELDS)


@pytest.fixture(scope="module", params=["fake", pytest.param("llamacpp", marks=pytest.mark.real)])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A cross-encoder stands beside the fake; the tiny BGE-M3 also stands in for one."""
    of: dict[str, Any] = {"n_ctx": N_CTX, "token_ids": "own", "matryoshka": True}
    if request.param == "fake":
        tiers = {"embedding": fake(**of), "reranker": fake(n_ctx=N_CTX)}
        launch = in_threads
    else:
        folder = tmp_path_factory.mktemp("fuzz_vectors")
        path = encoder_fixtures.write_embedder(folder / "tiny.gguf")
        encoder_fixtures.write_heads(folder)
        tiers = {"embedding": TierSettings(model_path=str(path), n_threads=1, **of)}
        launch = launch_process  # that it lives at the end is what the test is about
    with serving(settings(**tiers), launch=launch) as service:
        assert service.embed("a", return_colbert=True).status_code == 200
        assert service.rerank("a", ["b"]).status_code == 200
        workers = [tier.life.worker for tier in service.manager.tiers.values()]
        yield service
        assert [tier.life.worker for tier in service.manager.tiers.values()] == workers, "one died"


def post(service: Service, path: str, body: Any) -> Any:
    """The answer; None where the body was refused as it should be."""
    content = json.dumps(body)
    reply = service.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code == 200:
        return reply.json()
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"], error
    return None


def is_unit(vector: Any) -> bool:
    return abs(float(np.linalg.norm(vector)) - 1) < 1e-3


@ANY_NUMBER
@given(body=EMBEDDINGS)
def test_any_texts_get_their_vectors_or_are_refused(service: Service, body: Any) -> None:
    reply = post(service, "/v1/embeddings", body)
    if reply is None:
        return
    asked = body["input"]
    n_inputs = 1 if isinstance(asked, str) or isinstance(asked[0], int) else len(asked)
    assert [item["index"] for item in reply["data"]] == list(range(n_inputs))
    for item in reply["data"]:
        dense = item["embedding"]
        if isinstance(dense, str):
            dense = np.frombuffer(base64.b64decode(dense), "<f4")
        assert not len(dense) or is_unit(dense)
        for row in item.get("colbert_vecs", ()):
            assert is_unit(row)
        assert all(0 < weight < math.inf for weight in item.get("lexical_weights", {}).values())


@ANY_NUMBER
@given(body=RERANKS, path=st.sampled_from(["/v1/rerank", "/rerank"]))
def test_any_documents_get_their_scores_or_are_refused(
    service: Service, body: Any, path: str
) -> None:
    reply = post(service, path, body)
    if reply is None:
        return
    results = reply if isinstance(reply, list) else reply["results"]
    scores = [item["score" if reply is results else "relevance_score"] for item in results]
    assert scores == sorted(scores, reverse=True)
    assert all(map(math.isfinite, scores))
    assert len({item["index"] for item in results}) == len(results) > 0


@ANY_NUMBER
@given(
    asked=st.one_of(
        st.tuples(st.just("/v1/score"), SCORES),
        st.tuples(st.sampled_from(["/embed", "/embed_sparse"]), TEI),
    )
)
def test_any_pairs_and_any_body_of_teis_are_answered_or_refused(
    service: Service, asked: tuple[str, Any]
) -> None:
    path, body = asked
    reply = post(service, path, body)
    if reply is not None and path == "/v1/score":
        assert all(math.isfinite(item["score"]) for item in reply["data"])
    elif reply is not None:
        assert len(reply) == (1 if isinstance(body["inputs"], str) else len(body["inputs"]))


def test_nothing_is_left_behind(service: Service) -> None:
    for tier in service.manager.tiers.values():
        wait_until(lambda tier=tier: not tier._running and not tier._n_leases)
        assert not tier._waiting
        assert tier.life.status() == ("ready", None)
    reply: httpx.Response = service.rerank("a", ["b", "a"])
    assert reply.json()["results"][0]["index"] == 1
