"""POST /v1/rerank in the words of Jina, Cohere and text-embeddings-inference, and /v1/score."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BeforeValidator, Field
from starlette.responses import JSONResponse, Response

from api.deps import Services, ServicesDep, while_connected
from api.errors import client_names
from api.fields import (
    Direction,
    Extensible,
    SomeText,
    Switch,
    WholeText,
    accepted,
    as_list,
    read_truncate,
)
from api.generation import new_id
from api.keep_alive import KeepAlive
from api.vectors import truncated_header
from caching import Caching
from engine import wire
from engine.types import EQUAL_WEIGHTS, Method, Scale, Truncate
from errors import BadRequest
from tier import Tier

router = APIRouter()

MAX_DOCUMENTS = 2048
MAX_PAIRS = 4096
DEFAULT_MODEL = "reranker"


def _text_of(value: Any) -> Any:
    """Clients send documents as texts, or as objects with a text."""
    return value["text"] if isinstance(value, dict) and "text" in value else value


def _that_weigh(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("One of them must be more than 0.")
    return weights


Document = Annotated[WholeText, BeforeValidator(_text_of)]  # chunks of files may be empty
Many = Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)
Documents = Annotated[list[Document], Many]
OneOrMoreDocuments = Annotated[Documents, BeforeValidator(as_list)]
OneOrMoreQueries = Annotated[
    list[Annotated[SomeText, BeforeValidator(_text_of)]], Many, BeforeValidator(as_list)
]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Weights = Annotated[tuple[Weight, Weight, Weight], AfterValidator(_that_weigh)]


class ScoringFields(Extensible):
    model: str = DEFAULT_MODEL  # some clients know only one
    raw_scores: Switch = False
    keep_alive: KeepAlive | None = None
    method: Method | None = None
    weights: Weights | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    truncate: Literal[Truncate, True, False] | None = None  # TEI says yes or no
    truncation_direction: Direction | None = None  # TEI's

    def read_truncate(self, unsaid: Truncate = "end") -> Truncate:
        """Documents are cut unless that is not wanted. Raises BadRequest."""
        return read_truncate(self.truncate, self.truncation_direction, unsaid)


class RerankRequest(ScoringFields):
    query: SomeText
    documents: Documents | None = None
    texts: Documents | None = None  # TEI's documents
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: Switch = False
    return_text: Switch = False  # TEI's

    def read_documents(self) -> list[str]:
        """Raises BadRequest."""
        if self.documents is not None and self.texts is not None:
            raise BadRequest("Send `documents` or `texts`, not both.", param="texts")
        documents = self.texts if self.documents is None else self.documents
        if documents is None:
            raise BadRequest("'documents' is required.", param="documents")
        return documents


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, request: Request, services: ServicesDep) -> Response:
    documents = body.read_documents()
    tier = services.scoring_tier(body.model, body.method)
    headers = accepted(body, request, services)
    pairs = [(0, n) for n in range(len(documents))]
    names = {} if body.texts is None else {r"^documents": "texts"}
    caching = services.caching(request)
    # TEI cuts only where that is asked for
    truncate = body.read_truncate("end" if body.texts is None else tier.settings.truncate)
    with client_names(names):
        work = _score(services, caching, tier, body, [body.query], documents, pairs, truncate)
        scores = await while_connected(request.receive, work)
    headers |= caching.headers()
    # by the score before it is rounded; the first come first where they are equal
    best = sorted(scores.items, key=lambda item: (-item.score, item.index))[: body.top_n]
    wants_text = body.return_documents or body.return_text
    if body.texts is not None:
        texts = ((str(item.index), item.n_cut) for item in scores.items)
        headers |= truncated_header([("query", scores.n_cut_query), *texts])
        reply: Any = [
            {"index": item.index, "score": scores.shown(item)}
            | ({"text": documents[item.index]} if wants_text else {})
            for item in best
        ]
        return JSONResponse(reply, headers=headers)
    data = [{"index": item.index, "relevance_score": scores.shown(item)} for item in best]
    results: list[dict[str, Any]] = [
        of | ({"document": {"text": documents[item.index]}} if wants_text else {})
        for of, item in zip(data, best, strict=True)
    ]
    cut = [("query", scores.n_cut_query)]
    cut += [(f"documents[{item.index}]", item.n_cut) for item in scores.items]
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
        "warnings": [f"{what}: {n_cut} tokens were cut." for what, n_cut in cut if n_cut],
    }
    reply = {
        "id": new_id("rerank-"),
        "object": "list",
        "model": DEFAULT_MODEL if services.manager.means_reranker(body.model) else tier.name,
        "results": results,
        "data": data,  # where Continue looks
        "meta": meta,
        **scores.about(),
    }
    return JSONResponse(reply, headers=headers)


class ScoreRequest(ScoringFields):
    text_1: OneOrMoreQueries | None = None
    text_2: OneOrMoreDocuments | None = None
    queries: OneOrMoreQueries | None = None
    documents: OneOrMoreDocuments | None = None

    def read_pairs(self) -> tuple[list[str], list[str], list[tuple[int, int]]]:
        """Texts on both sides, and which of them are scored. Raises BadRequest."""
        if self.text_1 is not None or self.text_2 is not None:
            extra = "queries" if self.queries is not None else "documents"
            if getattr(self, extra) is not None:
                raise BadRequest(
                    "Send `text_1` and `text_2`, or `queries` and `documents`, not both.",
                    param=extra,
                )
        for first, second in (("text_1", "text_2"), ("queries", "documents")):
            left, right = getattr(self, first), getattr(self, second)
            if left is None and right is None:
                continue
            if left is None or right is None:
                missing = first if left is None else second
                raise BadRequest(f"'{missing}' is required.", param=missing)
            n, m = len(left), len(right)
            if first == "text_1" and n == m:
                return left, right, [(i, i) for i in range(n)]
            if first == "text_1" and n > 1:
                raise BadRequest(
                    f"'text_1' has {n} texts and 'text_2' {m}: send as many, or one text_1. Every "
                    "one with every other: `queries` and `documents`.",
                    param="text_2",
                )
            if n * m > MAX_PAIRS:
                raise BadRequest(f"There may be {MAX_PAIRS:,} pairs.", param=second)
            return left, right, [(i, j) for i in range(n) for j in range(m)]
        raise BadRequest(
            "Send `text_1` and `text_2`, or `queries` and `documents`.", param="text_1"
        )


@router.post("/v1/score")
async def score(body: ScoreRequest, request: Request, services: ServicesDep) -> Response:
    left, right, pairs = body.read_pairs()
    tier = services.scoring_tier(body.model, body.method)
    headers = accepted(body, request, services)
    caching = services.caching(request)
    names = {r"^query$": "queries"}
    if body.text_1 is not None:
        names = {r"^query$": "text_1", r"^documents": "text_2"}
    with client_names(names):
        work = _score(services, caching, tier, body, left, right, pairs, body.read_truncate())
        scores = await while_connected(request.receive, work)
    headers |= caching.headers()
    data = [
        {"index": item.index, "object": "score", "score": scores.shown(item)}
        for item in scores.items
    ]
    reply = {
        "id": new_id("score-"),
        "object": "list",
        "created": int(time.time()),
        "model": DEFAULT_MODEL if services.manager.means_reranker(body.model) else tier.name,
        "data": data,
        **scores.about(),
    }
    if cut := [
        {"index": item.index, "n_tokens_cut": n_cut}
        for item in scores.items
        if (n_cut := item.n_cut + item.n_cut_query)
    ]:
        reply["truncated"] = cut
    return JSONResponse(reply, headers=headers)


@dataclass(frozen=True, slots=True)
class Scores:
    """All pairs in their order, and on which scale."""

    items: list[wire.Scored]
    method: Method
    scale: Scale
    is_raw: bool
    weights: Sequence[float] | None

    def shown(self, item: wire.Scored) -> float:
        """Between 0 and 1 for cross-encoders, unless raw scores are wanted."""
        if self.is_raw or self.scale != "logit":
            return item.score
        return 1 / (1 + math.exp(-max(min(item.score, 700.0), -700.0)))

    @property
    def n_cut_query(self) -> int:
        """Tokens of the only query."""
        return max(item.n_cut_query for item in self.items)

    def about(self) -> dict[str, Any]:
        n_tokens = sum(item.n_tokens for item in self.items)
        is_sigmoid = self.scale == "logit" and not self.is_raw
        about: dict[str, Any] = {
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
            "score_type": "sigmoid" if is_sigmoid else self.scale,
            "method": self.method,
        }
        if self.weights is not None:
            about["weights"] = self.weights
        return about


async def _score(
    services: Services,
    caching: Caching,
    tier: Tier,
    fields: ScoringFields,
    queries: list[str],
    documents: list[str],
    pairs: list[tuple[int, int]],
    truncate: Truncate,
) -> Scores:
    asked = wire.Score(
        queries=queries,
        documents=documents,
        pairs=pairs,
        method=fields.method,
        weights=fields.weights,
        max_tokens=fields.max_tokens_per_doc,
        truncate=truncate,
    )
    await tier.fetched()
    scores = await services.lookups.scores(tier, asked, caching)
    tier.keep_alive(fields.keep_alive)
    method, scale = scores[0].method, scores[0].scale
    return Scores(
        [score.item for score in scores],
        method,
        scale,
        fields.raw_scores,
        (fields.weights or EQUAL_WEIGHTS) if method == "hybrid" else None,
    )
