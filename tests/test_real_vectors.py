"""The default embedding model over HTTP: what its vectors are for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from settings import Settings
from tests.serving import Service, serving, settings

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
