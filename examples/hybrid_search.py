"""Search by meaning and by words, then an answer from what was found: one service for all of it.

    pip install openai qdrant-client
    python examples/hybrid_search.py "Why is the sky blue?"

1. Texts become dense, sparse and ColBERT vectors in one request, and points of a Qdrant in memory.
2. A question finds some by its dense vector and some by its sparse one; ColBERT orders them.
3. The reranker reads the best of them, and a chat model answers from what it puts first.

A model without the two heads of BGE-M3 makes dense vectors only; then these alone search.
"""

import argparse
import base64
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
from qdrant_client import QdrantClient, models

TEXTS = (
    "Air scatters blue light more than red light, so the sky looks blue by day.",
    "At sunset light goes a long way through the air, and what is left of it is red.",
    "The sea looks blue because water absorbs red light.",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "Salt slows yeast down, and makes the gluten of dough stronger.",
    "Cats sleep for up to sixteen hours a day.",
    "The error E1042 means that the filter of the pump is blocked.",
    "The error E1043 means that the door of the machine is open.",
    "Die Hauptstadt von Frankreich ist Paris.",
    "Water boils at a lower temperature in the mountains, where the air is thin.",
)


@dataclass(frozen=True)
class Found:
    text: str
    score: float  # the reranker's


class HybridSearch:
    """Texts in a collection of Qdrant, found through one Quintet."""

    def __init__(self, client: openai.OpenAI, store: QdrantClient, name: str = "texts") -> None:
        self.kinds: list[str] = []  # of vectors, which the model makes
        self._client = client
        self._store = store
        self._name = name

    def add(self, texts: Sequence[str]) -> None:
        """Make the collection of these texts."""
        if not self.kinds:
            self._client.embeddings.create(model="embedding", input="Load the model.")
            about = self._client.models.retrieve("embedding").model_extra or {}
            self.kinds = about["vectors"]
        vectors = self.embed(texts, "document")
        self._create(vectors[0])
        points = [
            models.PointStruct(id=n, vector=dict(vector), payload={"text": text})
            for n, (text, vector) in enumerate(zip(texts, vectors, strict=True))
        ]
        self._store.upsert(self._name, points)

    def embed(self, texts: Sequence[str], input_type: str) -> list[dict[str, Any]]:
        """Every kind of vector of each text, as Qdrant takes them."""
        asked = {"embedding_type": self.kinds, "input_type": input_type}
        reply = self._client.embeddings.create(
            model="embedding", input=list(texts), extra_body=asked
        )
        return [_vectors(item) for item in reply.data]

    def _create(self, vector: Mapping[str, Any]) -> None:
        dense = models.VectorParams(size=len(vector["dense"]), distance=models.Distance.COSINE)
        params = {"dense": dense}
        if "colbert" in vector:
            params["colbert"] = models.VectorParams(
                size=len(vector["colbert"][0]),
                distance=models.Distance.COSINE,
                multivector_config=models.MultiVectorConfig(
                    comparator=models.MultiVectorComparator.MAX_SIM
                ),
                hnsw_config=models.HnswConfigDiff(m=0),  # it only orders what others find
            )
        sparse = {"sparse": models.SparseVectorParams()} if "sparse" in vector else None
        self._store.create_collection(self._name, params, sparse_vectors_config=sparse)

    def candidates(self, question: str, n: int) -> list[str]:
        """Texts that may answer, by their vectors."""
        (vector,) = self.embed([question], "query")
        query, using, prefetch = vector["dense"], "dense", None
        if "colbert" in vector:
            query, using = vector["colbert"], "colbert"
            prefetch = [
                models.Prefetch(query=vector[kind], using=kind, limit=4 * n)
                for kind in ("dense", "sparse")
            ]
        points = self._store.query_points(
            self._name, query=query, using=using, prefetch=prefetch, limit=n
        ).points
        return [point.payload["text"] for point in points if point.payload]

    def search(self, question: str, n: int = 3) -> list[Found]:
        """The best texts by the reranker, of those that the vectors find."""
        texts = self.candidates(question, 3 * n)
        asked = {"model": "reranker", "query": question, "documents": texts, "top_n": n}
        reply: Any = self._client.post("/rerank", body=asked, cast_to=object)
        return [Found(texts[r["index"]], r["relevance_score"]) for r in reply["results"]]

    def answer(self, question: str, found: Sequence[Found], model: str = "light") -> str:
        """What a chat model makes of it."""
        facts = "\n".join(f"- {item.text}" for item in found)
        ask = f"Answer in one sentence from these facts.\n{facts}\n\nQuestion: {question}"
        reply = self._client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": ask}], temperature=0, max_tokens=400
        )
        return reply.choices[0].message.content or ""


def _vectors(item: Any) -> dict[str, Any]:
    vectors: dict[str, Any] = {"dense": item.embedding}
    if sparse := getattr(item, "sparse_embedding", None):
        vectors["sparse"] = models.SparseVector(**sparse)
    if colbert := getattr(item, "colbert_embedding", None):  # base64, as the SDK asks for it
        rows = np.frombuffer(base64.b64decode(colbert["data"]), "<f4")
        vectors["colbert"] = rows.reshape(colbert["shape"]).tolist()
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", default="light", help="which answers")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    with (
        closing(QdrantClient(":memory:")) as store,
        openai.OpenAI(base_url=f"{args.url.rstrip('/')}/v1", api_key=args.key) as client,
    ):
        search = HybridSearch(client, store)
        search.add(TEXTS)
        print(f"{len(TEXTS)} texts with {', '.join(search.kinds)} vectors")
        found = search.search(args.question)
        for item in found:
            print(f"{item.score:6.3f}  {item.text}")
        print(search.answer(args.question, found, args.model))


if __name__ == "__main__":
    main()
