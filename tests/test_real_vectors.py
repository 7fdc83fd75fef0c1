"""The default embedding model over HTTP: what its vectors are for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest

from engine.backends.base import load_encoder
from engine.model_file import read_model_file
from settings import ServerSettings, Settings
from tests.serving import Service, serving, settings
from worker_spec import worker_spec

pytestmark = pytest.mark.real

# of each the same in English, Chinese, Russian and French
MEANINGS = [
    ["The weather is lovely today.", "今天天气很好。", "Сегодня прекрасная погода.",
     "Il fait très beau aujourd'hui."],
    ["How do I bake bread at home?", "怎样在家烤面包？", "Как испечь хлеб дома?",
     "Comment faire du pain à la maison ?"],
    ["The parliament passed a new law.", "议会通过了一项新法律。", "Парламент принял новый закон.",
     "Le parlement a adopté une nouvelle loi."],
    ["My computer does not start any more.", "我的电脑无法启动了。",
     "Мой компьютер больше не включается.", "Mon ordinateur ne démarre plus."],
]  # fmt: skip
QUESTIONS = {
    "how to make bread": 1,
    "какая сегодня погода": 0,
    "电脑坏了": 3,
    "une nouvelle loi au parlement": 2,
}


@pytest.fixture(scope="module")
def service(e5: Path) -> Iterator[Service]:
    with serving(settings(embedding=Settings.load(None).tiers["embedding"])) as service:
        yield service


def test_the_same_meaning_is_nearest_in_every_language(service: Service) -> None:
    texts = [text for same in MEANINGS for text in same]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        asked = {"input_type": "passage"}
        reply = client.embeddings.create(model="embedding", input=texts, extra_body=asked)
    vectors = np.array([item.embedding for item in reply.data])
    assert vectors.shape == (16, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similar = vectors @ vectors.T
    for n, row in enumerate(similar):
        nearest = np.argsort(-row)[:4]
        assert {int(i) // 4 for i in nearest} == {n // 4}, texts[n]


@pytest.mark.parametrize(("question", "meaning"), QUESTIONS.items())
def test_reranking_without_a_reranker_finds_the_meaning_in_every_language(
    service: Service, question: str, meaning: int
) -> None:
    texts = [same[language] for language in range(4) for same in MEANINGS]
    body = service.rerank(question, texts).json()
    assert (body["method"], body["score_type"]) == ("dense", "similarity")
    assert {item["index"] % 4 for item in body["results"][:4]} == {meaning}


def test_only_dense_vectors_and_only_whole_ones(service: Service) -> None:
    for fields in ({"embedding_type": "sparse"}, {"dimensions": 64}):
        reply = service.embed("a", **fields)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == next(iter(fields))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_room_for_logits_that_nobody_computes_is_given_back(e5: Path) -> None:
    """512 tokens of a vocabulary of 250,000 have logits of 512 MB."""
    of = Settings.load(None).tiers["embedding"]
    encoder = load_encoder(
        worker_spec("embedding", of, read_model_file(of.path), ServerSettings()), lambda _: None
    )
    before = psutil.Process().memory_info().rss
    rows = encoder.encode([np.full(512, 1000, np.int32)])
    assert rows.shape == (512, 384)
    assert psutil.Process().memory_info().rss - before < 100 << 20
    encoder.close()
