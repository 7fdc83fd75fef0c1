"""The example of a hybrid search, on models without meaning: every stage does its part."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import openai
import pytest
from qdrant_client import QdrantClient

from examples import hybrid_search
from examples.hybrid_search import TEXTS, HybridSearch
from settings import TierSettings
from tests import encoder_fixtures
from tests.serving import Service, fake, script, serving, settings


@contextmanager
def searching(service: Service, texts: tuple[str, ...] = TEXTS) -> Iterator[HybridSearch]:
    with (
        closing(QdrantClient(":memory:")) as store,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client,
    ):
        search = HybridSearch(client, store)
        search.add(texts)
        yield search


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(settings(embedding=fake(), reranker=fake(), light=fake())) as service:
        yield service


def test_vectors_find_the_reranker_orders_and_the_chat_reads_it(service: Service) -> None:
    question = "what does the error E1042 mean"
    with searching(service) as search:
        assert set(search.kinds) == {"dense", "sparse", "colbert"}
        assert len(search.candidates(question, 4)) == 4
        found = search.search(question)
        assert [item.score for item in found] == sorted((i.score for i in found), reverse=True)
        assert len(found) == 3
        assert "E1042" in found[0].text
        answer = search.answer(question, found)
    assert answer.startswith("You said: Answer in one sentence")
    assert all(item.text in answer for item in found)


def test_every_text_has_every_vector(service: Service) -> None:
    with searching(service) as search:
        points, _ = search._store.scroll("texts", limit=99, with_vectors=True)
        assert len(points) == len(TEXTS)
        (alone,) = search.embed([TEXTS[0]], "document")
        stored = points[0].vector
        assert isinstance(stored, dict)
        assert stored["dense"] == pytest.approx(alone["dense"], abs=1e-6)
        assert stored["sparse"] == alone["sparse"]
        assert len(stored["colbert"]) == len(alone["colbert"]) > 10


def test_dense_vectors_alone_are_enough(tmp_path: Path) -> None:
    tier = fake(script(tmp_path, heads=False))
    with serving(settings(embedding=tier)) as service, searching(service) as search:
        assert search.kinds == ["dense"]
        assert search.search(TEXTS[3])[0].text == TEXTS[3]


@pytest.mark.real
def test_a_small_bge_m3_finds_each_of_its_texts_by_itself(tmp_path: Path) -> None:
    """Also as its own reranker, which mixes the three kinds."""
    path = encoder_fixtures.write_embedder(tmp_path / "tiny.gguf")
    encoder_fixtures.write_heads(tmp_path)
    tier = TierSettings(model_path=str(path), n_threads=1)
    texts = encoder_fixtures.TEXTS[:12]
    with (
        serving(settings(embedding=tier, light=fake())) as service,
        searching(service, texts) as search,
    ):
        assert set(search.kinds) == {"dense", "sparse", "colbert"}
        for text in texts:
            assert text in search.candidates(text, 3)
            assert text in [item.text for item in search.search(text)]
        assert service.rerank(texts[0], list(texts)).json()["method"] == "hybrid"


def test_it_runs_as_a_command(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "How long do cats sleep?"
    monkeypatch.setattr(sys, "argv", ["hybrid_search.py", question, "--url", service.url])
    hybrid_search.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("10 texts with ")
    assert lines[1].endswith(TEXTS[5])
    assert question in "\n".join(lines[4:])
