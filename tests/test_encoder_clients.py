"""What searches are built with, against the service: the SDKs of OpenAI, LangChain and Cohere."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cohere
import numpy as np
import openai
import pytest
import tiktoken
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_openai import OpenAIEmbeddings

from tests.serving import Service, fake, serving, settings

TEXTS = ["here is rain", "eggs and salt", "where is rain today"]
BY_BYTES = tiktoken.Encoding(  # OpenAI's own tables are on the net
    "cl100k_base", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={},
)  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(settings(embedding=fake(), reranker=fake())) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for tiktoken, without the net."""
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: BY_BYTES)
    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: BY_BYTES)


@contextmanager
def langchain(service: Service, **fields: Any) -> Iterator[OpenAIEmbeddings]:
    embeddings = OpenAIEmbeddings(
        model="embedding", base_url=f"{service.url}/v1", api_key="any", max_retries=0, **fields
    )
    try:
        yield embeddings
    finally:
        embeddings.client._client.close()  # which it does not do itself


def vectors(service: Service, texts: list[str]) -> list[Any]:
    return [item["embedding"] for item in service.embed(texts).json()["data"]]


def test_openai_asks_for_base64_and_reads_it(service: Service, client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model="embedding", input=TEXTS)
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert [item.embedding for item in reply.data] == vectors(service, TEXTS)
    assert reply.usage.total_tokens == 5 + 5 + 6
    assert reply.model == "embedding"
    plain = client.embeddings.create(model="embedding", input=TEXTS, encoding_format="float")
    assert [item.embedding for item in plain.data] == vectors(service, TEXTS)


def test_openai_gets_the_further_vectors_too(client: openai.OpenAI) -> None:
    asked = {"return_sparse": True, "return_colbert": True, "return_dense": False}
    (item,) = client.embeddings.create(model="embedding", input="rain", extra_body=asked).data
    assert item.embedding == []
    assert item.model_extra is not None
    assert item.model_extra["sparse_embedding"]["indices"]
    assert item.model_extra["colbert_embedding"]["shape"] == [2, 32]


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="embedding", input=["a", ""])
    assert refused.value.param == "input[1]"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")


def test_sixty_four_at_once(service: Service) -> None:
    async def main() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any") as client:

            async def one(i: int) -> list[float]:
                reply = await client.embeddings.create(model="embedding", input=f"text {i}")
                return reply.data[0].embedding

            return await asyncio.gather(*map(one, range(64)))

    together = vectors(service, [f"text {i}" for i in range(64)])
    np.testing.assert_allclose(asyncio.run(main()), together, atol=1e-6)


def test_langchain(service: Service) -> None:
    with langchain(service, check_embedding_ctx_length=False) as embeddings:
        assert embeddings.embed_documents(TEXTS) == vectors(service, TEXTS)
        assert embeddings.embed_query("rain") == vectors(service, ["rain"])[0]


def test_langchain_sends_token_ids_of_another_model_unless_told(
    service: Service, table: None
) -> None:
    told = pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False")
    with langchain(service) as embeddings:
        with told:
            embeddings.embed_documents(TEXTS)
        with told:
            embeddings.embed_query("rain")


def test_langchains_token_ids_are_read_where_the_tier_is_told_whose_they_are(table: None) -> None:
    with (
        serving(settings(embedding=fake(token_ids="cl100k"))) as service,
        langchain(service) as embeddings,
    ):
        found = embeddings.embed_documents(TEXTS)
        np.testing.assert_allclose(found, vectors(service, TEXTS), atol=1e-6)


def test_coheres_second_version(service: Service) -> None:
    with cohere.ClientV2("any", base_url=service.url) as client:
        reply = client.rerank(
            model="reranker", query="where is rain", documents=TEXTS, top_n=2,
            max_tokens_per_doc=4096,
        )  # fmt: skip
        with pytest.raises(cohere.BadRequestError):
            client.rerank(model="reranker", query="", documents=TEXTS)
    assert [item.index for item in reply.results] == [2, 0]
    assert 1 > reply.results[0].relevance_score > reply.results[1].relevance_score > 0
    assert reply.id
    assert reply.meta is not None
    assert reply.meta.billed_units is not None
    assert reply.meta.billed_units.search_units == 1


def test_coheres_second_version_without_waiting(service: Service) -> None:
    async def main() -> list[int]:
        async with cohere.AsyncClientV2("any", base_url=service.url) as client:
            reply = await client.rerank(model="reranker", query="where is rain", documents=TEXTS)
        return [item.index for item in reply.results]

    assert asyncio.run(main()) == [2, 0, 1]


def test_coheres_first_version(service: Service) -> None:
    documents: list[Any] = [TEXTS[0], {"text": TEXTS[1]}, {"text": TEXTS[2]}]
    with cohere.Client("any", base_url=service.url) as client:
        reply = client.rerank(
            model="reranker", query="where is rain", documents=documents, return_documents=True
        )
    assert [item.index for item in reply.results] == [2, 0, 1]
    assert [item.document.text for item in reply.results if item.document] == [
        TEXTS[2], TEXTS[0], TEXTS[1],
    ]  # fmt: skip


def test_the_client_of_text_embeddings_inference(service: Service) -> None:
    with InferenceClient(model=service.url, token="any") as client:  # as LangChain and Haystack do
        raw = client.feature_extraction(TEXTS[0], truncate=False, normalize=False)
        unit = raw / np.linalg.norm(raw, axis=1)
        np.testing.assert_allclose(unit, vectors(service, TEXTS[:1]), atol=1e-6)
    with InferenceClient(model=f"{service.url}/embed", token="any") as client:
        found = client.feature_extraction(TEXTS[0], prompt_name="query", truncate=True)
        assert found.tolist() == vectors(service, TEXTS[:1])
        with pytest.raises(HfHubHTTPError, match="prompt_name"):
            client.feature_extraction(TEXTS[0], prompt_name="image")
