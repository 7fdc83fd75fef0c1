"""Vectors of texts and scores of pairs: each remembered for itself, or computed.

1. What is alike in a request is computed once.
2. An identical request is on its way: its work is shared.
3. Each text is looked up by each kind of vector that is wanted of it, and each pair by how it is
   scored; a pair that is not known by the vectors of its texts, where these are compared.
4. The rest is computed in one request, and remembered as it comes, also if that fails later. If
   the model was replaced meanwhile all is computed: no reply has results of two.

The tokens of a cached item count as if it had been computed.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from cache import Cache, Entry, key
from caching import Caching
from embedders import Embedded
from encoding import Encoding, error_of
from engine import wire
from engine.types import EQUAL_WEIGHTS, Method, Role, Scale, Truncate
from errors import BadRequest
from flights import Flights, Tell
from lengths import check_colbert
from rerankers import EmbeddingReranker, is_blank
from tier import Tier

# the fields of a vector by the kind of what is remembered
FIELDS = {
    "dense": ("dense", "norm"),
    "sparse": ("sparse_ids", "sparse_weights"),
    "colbert": ("colbert",),
    "tokens": ("tokens", "pieces"),
}
SCORE = "score"
LARGE_CHARS, LARGE_TEXTS = 1 << 18, 100  # what is more is not hashed on the event loop
CHECK_ITEMS = 64  # after so many it is looked again whether the model's file is still the same


class Vector(msgspec.Struct, array_like=True, frozen=True):
    """The vectors of a text; in the cache those of one kind."""

    item: wire.Vector
    n_colbert: int  # length of a ColBERT row


class Score(msgspec.Struct, array_like=True, frozen=True):
    """The score of a pair, and how it was made."""

    item: wire.Scored
    method: Method
    scale: Scale


Result = TypeVar("Result", Vector, Score)
Asked = wire.Embed | wire.Score


class _Found(NamedTuple, Generic[Result]):
    result: Result
    age_s: float | None  # None: it was computed


Keep = Callable[[int, Result], None]


class Lookups:
    """Belongs to one event loop. Without a cache everything is computed for its request."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._flights: Flights[dict[int, _Found[Any]]] = Flights()

    async def vectors(self, tier: Tier, asked: wire.Embed, caching: Caching) -> list[Vector]:
        """The vectors of each input. Says in `caching` what it had. Raises ServiceError, also for
        the first input with a fault, whose place is then in its `numbers` as `index`."""
        batch = await _made(_Texts, tier, asked, caching, asked.inputs)
        vectors = await self._all(batch, caching)
        # the worker, which counts them first, has not seen those that were known, nor equal ones
        check_colbert(sum(len(v.item.colbert or b"") // 4 for v in vectors), asked.max_colbert)
        return vectors

    async def scores(self, tier: Tier, asked: wire.Score, caching: Caching) -> list[Score]:
        """The score of each pair, in the same way."""
        batch = await _made(_Pairs, tier, asked, caching, [*asked.queries, *asked.documents])
        scores = await self._all(batch, caching)
        return _each_text_counted_once(asked, scores)

    async def _all(self, batch: "_Batch[Result]", caching: Caching) -> list[Result]:
        by_place = await self._found(batch, caching)
        found = [by_place[first] for first in batch.firsts]
        for index, (result, _) in enumerate(found):
            if result.item.fault is not None:
                raise error_of(msgspec.structs.replace(result.item, index=index))
        ages = [age_s for _, age_s in found if age_s is not None]
        caching.n_cached = len(ages)
        caching.n_before, caching.queued_at, caching.handed_at = batch.waited
        if len(ages) == len(found):
            caching.outcome, caching.age_s = "HIT", max(ages)
        return [
            msgspec.structs.replace(result, item=msgspec.structs.replace(result.item, index=index))
            for index, (result, _) in enumerate(found)
        ]

    async def _found(self, batch: "_Batch[Result]", caching: Caching) -> dict[int, _Found[Result]]:
        """By the first place in the request that asks for it."""
        cache = self._cache
        if cache is None or not caching.writes:
            return await batch.computed(batch.places, lambda at, result: None)
        caching.outcome = "MISS"
        if not caching.reads:
            return await _kept(batch, batch.places, cache)
        max_age_s = caching.max_age_s

        async def find(tell: Tell[dict[int, _Found[Result]]]) -> None:
            tell(await _known_or_kept(batch, cache, max_age_s))

        with self._flights.join(key("flight", batch.name, max_age_s), find) as reader:
            by_place = await anext(reader)
        computed = [at for at, found in by_place.items() if found.age_s is None]
        if reader.is_joined and computed:
            caching.outcome = "JOIN"
            for kind, _ in (name for at in computed for name in batch.names[at]):
                cache.joined(kind)
        return by_place


async def _made(
    of: "Callable[[Tier, Any, str | None], _Batch[Result]]",
    tier: Tier,
    asked: Asked,
    caching: Caching,
    texts: Sequence[str | list[int]],
) -> "_Batch[Result]":
    """Hashes all of the texts, which takes a while where that is much."""
    if sum(map(len, texts)) > LARGE_CHARS or len(texts) > LARGE_TEXTS:
        return await asyncio.to_thread(of, tier, asked, caching.owner)
    return of(tier, asked, caching.owner)


async def _known_or_kept(
    batch: "_Batch[Result]", cache: Cache, max_age_s: float | None
) -> dict[int, _Found[Result]]:
    known = await batch.known(cache, max_age_s)
    rest = [at for at in batch.places if at not in known]
    if not rest:
        return known
    found = known | await _kept(batch, rest, cache)
    if known and batch.tier.identity != batch.identity:  # which made what is known
        return await _kept(batch, batch.places, cache)
    return found


async def _kept(
    batch: "_Batch[Result]", places: Sequence[int], cache: Cache
) -> dict[int, _Found[Result]]:
    """What is computed, each remembered as it comes."""
    n, is_same = 0, True

    def keep(at: int, result: Result) -> None:
        nonlocal n, is_same
        if n % CHECK_ITEMS == 0:
            is_same &= batch.tier.is_still(batch.identity)
        n += 1
        if is_same and result.item.fault is None:
            for kind, name in batch.names[at]:
                if (value := batch.packed(kind, at, result)) is not None:
                    cache.put(kind, name, value)

    return await batch.computed(places, keep)


class _Batch(ABC, Generic[Result]):
    """What a request asks for, and under which names that is remembered."""

    asked: Asked
    names: list[list[tuple[str, bytes]]]  # of each item: kinds and keys
    waited = 0, 0.0, 0.0  # where it had to be computed for this request: as Caching has it

    def __init__(self, tier: Tier, owner: str | None) -> None:
        self.tier = tier
        self.identity = tier.identity
        self._owner = owner
        self._n_ctx = tier.n_ctx

    def _number(self) -> None:
        self.name = key("batch", self.identity, self._owner, self.asked)
        first: dict[tuple[tuple[str, bytes], ...], int] = {}
        self.firsts = [first.setdefault(tuple(n), at) for at, n in enumerate(self.names)]
        self.places = list(first.values())

    @abstractmethod
    async def known(self, cache: Cache, max_age_s: float | None) -> dict[int, _Found[Result]]: ...

    @abstractmethod
    async def computed(
        self, places: Sequence[int], keep: Keep[Result]
    ) -> dict[int, _Found[Result]]:
        """Computes these; `keep` gets each as it comes. Raises ServiceError."""

    @abstractmethod
    def packed(self, kind: str, at: int, result: Result) -> bytes | None:
        """What is remembered of it under its name of this kind; None: nothing."""

    def _note(self, encoding: Encoding[Any]) -> None:
        self.waited = encoding.n_before, encoding.queued_at, encoding.handed_at

    def _text_key(self, kind: str, text: str | list[int], role: Role, truncate: Truncate) -> bytes:
        cut = "none" if self._is_short(text) else truncate
        return key(kind, self.identity, self._owner, text, role, cut)

    def _is_short(self, text: str | list[int]) -> bool:
        """It fits, so where a longer one is to be cut does not matter: few characters have more
        than four tokens. One that is cut all the same is not remembered."""
        return len(text) <= self._n_ctx // 8


class _Texts(_Batch[Vector]):
    def __init__(self, tier: Tier, asked: wire.Embed, owner: str | None) -> None:
        super().__init__(tier, owner)
        self.asked: wire.Embed = asked
        kinds: list[str] = [*asked.outputs, *(["tokens"] if asked.return_tokens else [])]
        self.names = [
            [(kind, self._text_key(kind, text, asked.role, asked.truncate)) for kind in kinds]
            for text in asked.inputs
        ]
        self._number()

    async def known(self, cache: Cache, max_age_s: float | None) -> dict[int, _Found[Vector]]:
        entries = await _entries(cache, [self.names[at] for at in self.places], max_age_s)
        known = {}
        for at in self.places:
            if (found := _vector_of(self.names[at], entries)) is not None:
                known[at] = _Found(*found)
        return known

    async def computed(
        self, places: Sequence[int], keep: Keep[Vector]
    ) -> dict[int, _Found[Vector]]:
        inputs = [self.asked.inputs[at] for at in places]
        asked = msgspec.structs.replace(self.asked, inputs=inputs)
        computed = {}
        try:
            with self.tier.lease(), self.tier.embed(asked) as encoding:
                async for item in encoding:
                    at, encoder = places[item.index], self.tier.encoder
                    vector = Vector(item, encoder.n_colbert if encoder else 0)
                    computed[at] = _Found(vector, None)
                    keep(at, vector)
        except BadRequest as error:
            raise _moved(error, places) from None
        self._note(encoding)
        return computed

    def packed(self, kind: str, at: int, result: Vector) -> bytes | None:
        item = result.item
        if item.n_cut and self._is_short(self.asked.inputs[at]):
            return None
        fields = {field: getattr(item, field) for field in FIELDS[kind]}
        vector = wire.Vector(0, item.n_tokens, item.n_cut, **fields)
        return _encode(Vector(vector, result.n_colbert))


class _Pairs(_Batch[Score]):
    def __init__(self, tier: Tier, asked: wire.Score, owner: str | None) -> None:
        super().__init__(tier, owner)
        self.asked: wire.Score = asked
        self._method = asked.method
        if tier.name == "reranker":  # it has only one
            self._method = "cross-encoder"
        how = (self._method, asked.weights, asked.max_tokens, asked.truncate)
        texts = [
            (asked.queries[query], asked.documents[document]) for query, document in asked.pairs
        ]
        self.names = [[(SCORE, key(SCORE, self.identity, owner, how, *pair))] for pair in texts]
        self._number()

    async def known(self, cache: Cache, max_age_s: float | None) -> dict[int, _Found[Score]]:
        entries = await _entries(cache, [self.names[at] for at in self.places], max_age_s)
        known = {}
        for at in self.places:
            ((_, name),) = self.names[at]
            entry = entries.get(name)
            if entry is not None and (score := _decoded(entry, _score)) is not None:
                known[at] = _Found(score, entry.age_s)
        rest = [at for at in self.places if at not in known]
        return known | (await self._compared(cache, rest, max_age_s) if rest else {})

    async def computed(self, places: Sequence[int], keep: Keep[Score]) -> dict[int, _Found[Score]]:
        pairs = [self.asked.pairs[at] for at in places]
        asked = msgspec.structs.replace(self.asked, pairs=pairs)
        computed = {}
        with self.tier.lease(), self.tier.score(asked) as encoding:
            async for item in encoding:
                assert encoding.method is not None
                assert encoding.scale is not None
                at, score = places[item.index], Score(item, encoding.method, encoding.scale)
                computed[at] = _Found(score, None)
                keep(at, score)
        self._note(encoding)
        return computed

    def packed(self, kind: str, at: int, result: Score) -> bytes | None:
        item = msgspec.structs.replace(result.item, index=0)
        return _encode(msgspec.structs.replace(result, item=item))

    async def _compared(
        self, cache: Cache, places: Sequence[int], max_age_s: float | None
    ) -> dict[int, _Found[Score]]:
        """Of pairs whose texts' vectors are known the scores, as the worker would make them."""
        method, weights = self._compares()
        if method is None:
            return {}
        kinds = sorted(EmbeddingReranker.outputs(method))

        def names(text: str, role: Role) -> list[tuple[str, bytes]]:
            return [(kind, self._text_key(kind, text, role, self.asked.truncate)) for kind in kinds]

        asked = self.asked
        pairs = {at: asked.pairs[at] for at in places}
        queries = {q: names(asked.queries[q], "query") for q in {q for q, _ in pairs.values()}}
        entries = await _entries(cache, queries.values(), max_age_s)
        ours = {q: _vector_of(of, entries) for q, of in queries.items()}
        pairs = {at: pair for at, pair in pairs.items() if ours[pair[0]] is not None}
        texts = {d: names(asked.documents[d], "passage") for d in {d for _, d in pairs.values()}}
        entries = await _entries(cache, texts.values(), max_age_s)

        def compare() -> dict[int, _Found[Score]]:
            theirs = {d: _vector_of(of, entries) for d, of in texts.items()}
            embedded: dict[tuple[str, int], Embedded] = {}
            known = {}
            for at, (q, d) in pairs.items():
                query, document = ours[q], theirs[d]
                if query is None or document is None or self._is_cut(document[0].item):
                    continue
                for place, (vector, _) in ((("q", q), query), (("d", d), document)):
                    embedded.setdefault(place, _embedded(vector))
                score = 0.0
                if not is_blank(self.asked.documents[d]):
                    both = embedded["q", q], embedded["d", d]
                    score = EmbeddingReranker.score(*both, method, weights)
                n_query, n_document = query[0].item.n_tokens, document[0].item.n_tokens
                n_cut_query, n_cut = query[0].item.n_cut, document[0].item.n_cut
                item = wire.Scored(0, 0, n_cut, score, None, n_cut_query, n_query, n_document)
                age_s = max(query[1], document[1])
                known[at] = _Found(Score(item, method, "similarity"), age_s)
            return known

        return await asyncio.to_thread(compare)

    def _compares(self) -> tuple[Method | None, tuple[float, float, float]]:
        """The method by which an embedding model compares vectors, where it is known and a request
        may ask for it so; and the weights."""
        method, encoder, weights = self._method, self.tier.encoder, self.asked.weights
        if method is None and encoder is not None:
            method = encoder.methods[0]
        if method == "cross-encoder" or (weights is not None and method != "hybrid"):
            method = None
        return method, weights or EQUAL_WEIGHTS

    def _is_cut(self, document: wire.Vector) -> bool:
        """It may have more tokens than are wanted of it."""
        limit = self.asked.max_tokens
        return limit is not None and document.n_tokens + document.n_cut > limit


_encode = msgspec.msgpack.Encoder().encode
_vector = msgspec.msgpack.Decoder(Vector)
_score = msgspec.msgpack.Decoder(Score)


def _decoded(entry: Entry, decoder: "msgspec.msgpack.Decoder[Result]") -> Result | None:
    """None where it is something else."""
    try:
        return decoder.decode(entry.value)
    except msgspec.MsgspecError:
        return None


async def _entries(
    cache: Cache, names: Iterable[Sequence[tuple[str, bytes]]], max_age_s: float | None
) -> dict[bytes, Entry]:
    by_kind: dict[str, list[bytes]] = {}
    for kind, name in (one for several in names for one in several):
        by_kind.setdefault(kind, []).append(name)
    entries: dict[bytes, Entry] = {}
    for kind, wanted in by_kind.items():
        entries |= await cache.get_many(kind, wanted, max_age_s)
    return entries


def _vector_of(
    names: Sequence[tuple[str, bytes]], entries: Mapping[bytes, Entry]
) -> tuple[Vector, float] | None:
    """The vectors of a text out of what is remembered of each kind, and how old the oldest is; None
    where one is missing."""
    fields: dict[str, Any] = {}
    age_s = n_tokens = n_cut = n_colbert = 0.0
    for kind, name in names:
        entry = entries.get(name)
        vector = None if entry is None else _decoded(entry, _vector)
        if entry is None or vector is None:
            return None
        fields |= {field: getattr(vector.item, field) for field in FIELDS[kind]}
        age_s = max(age_s, entry.age_s)
        n_tokens, n_cut = vector.item.n_tokens, vector.item.n_cut
        n_colbert = vector.n_colbert
    if None in fields.values():
        return None
    return Vector(wire.Vector(0, int(n_tokens), int(n_cut), **fields), int(n_colbert)), age_s


def _embedded(vector: Vector) -> Embedded:
    """Its numbers, as the functions that compare them take them."""
    item = vector.item
    embedded = Embedded()
    if item.dense is not None:
        embedded.dense = np.frombuffer(item.dense, "<f4")
    if item.sparse_ids is not None and item.sparse_weights is not None:
        ids, weights = np.frombuffer(item.sparse_ids, "<i4"), item.sparse_weights
        embedded.sparse = ids, np.frombuffer(weights, "<f4")
    if item.colbert is not None:
        embedded.colbert = np.frombuffer(item.colbert, "<f4").reshape(-1, vector.n_colbert)
    return embedded


def _each_text_counted_once(asked: wire.Score, scores: Sequence[Score]) -> list[Score]:
    """Where an embedding model reads each text once for all its pairs, so do its tokens count."""
    counted: set[tuple[str, int]] = set()
    results = []
    for (query, document), score in zip(asked.pairs, scores, strict=True):
        item = score.item
        if score.scale == "similarity":
            n_tokens = 0
            for place, n in ((("q", query), item.n_query), (("d", document), item.n_document)):
                n_tokens += n if place not in counted else 0
                counted.add(place)
            item = msgspec.structs.replace(item, n_tokens=n_tokens)
        results.append(msgspec.structs.replace(score, item=item))
    return results


def _moved(error: BadRequest, places: Sequence[int]) -> BadRequest:
    """The same error about the place that the client knows."""
    index = error.numbers.get("index")
    if index is not None:
        error.numbers["index"] = places[index]
        error.message = error.message.replace(f"input[{index}]", f"input[{places[index]}]", 1)
    return error
