"""POST /v1/embeddings: dense, sparse and ColBERT vectors of texts, from one pass."""

import asyncio
import codecs
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Discriminator, Field, Tag
from starlette.responses import Response

from api.deps import ServicesDep, fetched, while_connected
from api.errors import client_names
from api.fields import (
    Extensible,
    SomeText,
    Switch,
    Tokens,
    accepted,
    as_list,
    each_text,
    kind_of_texts,
)
from api.keep_alive import KeepAlive
from api.vectors import Cut, Form, encoded, item
from engine import wire
from engine.model_file import name_of
from engine.types import Output, Role, Truncate
from errors import BadRequest, UnsupportedParameter
from settings import InputType
from tier import Tier

router = APIRouter()

MAX_INPUTS = 2048  # OpenAI's limit
REST_OF_CHARACTER = re.compile(rb"\A[\x80-\xbf]{1,3}")  # in UTF-8
OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
# numbers of the ColBERT vectors in a reply: of BGE-M3's longest text, and of four of them
MAX_COLBERT_NUMBERS = {"float": 8 << 20, "base64": 32 << 20}
# whose first numbers are a vector too, by what their files are called
MATRYOSHKA = (
    "nomic-embed-text-v1.5", "nomic-embed-text-v2", "mxbai-embed-large", "qwen3-embedding",
    "embeddinggemma", "embedding-gemma", "arctic-embed-m-v1.5", "arctic-embed-l-v2",
    "arctic-embed-m-v2", "jina-embeddings-v3",
)  # fmt: skip
# which their authors norm as a layer before the cut: less the mean, since the scale cancels
CENTRED = ("nomic-embed-text-v1.5",)


InputTexts = Annotated[list[SomeText], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
OneOrMore = Annotated[InputTexts, BeforeValidator(as_list)]
TokenLists = Annotated[list[Tokens], Field(max_length=MAX_INPUTS, fail_fast=True)]
Input = Annotated[
    Annotated[SomeText, Tag("<text>")]
    | Annotated[InputTexts, Tag("<texts>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[TokenLists, Tag("<lists of tokens>")],
    Discriminator(kind_of_texts),
]
OutputList = Annotated[
    list[Output], Field(min_length=1, max_length=len(OUTPUTS)), BeforeValidator(as_list)
]


class EmbeddingRequest(Extensible):
    model: str
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Any = None  # whose request it is: nobody here wants to know
    embedding_type: OutputList | None = None
    return_dense: bool | None = None
    return_sparse: bool | None = None
    return_colbert: bool | None = None
    return_tokens: Switch = False
    colbert_dtype: Literal["float32", "float16"] = "float32"
    truncate: Truncate | None = None
    input_type: InputType | None = None
    keep_alive: KeepAlive | None = None

    def outputs(self) -> list[Output]:
        """The kinds of vectors that are wanted. Raises BadRequest."""
        wanted = set[Output](self.embedding_type or ["dense"])
        for kind in OUTPUTS:
            if (flag := getattr(self, f"return_{kind}")) is not None:
                (wanted.add if flag else wanted.discard)(kind)
        if not wanted:
            refused = (self.embedding_type or ["dense"])[0]
            raise BadRequest("No kind of vector is asked for.", param=f"return_{refused}")
        return [kind for kind in OUTPUTS if kind in wanted]


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingRequest, request: Request, services: ServicesDep
) -> Response:
    tier = services.embedding_tier(body.model)
    headers = accepted(body, request, services)
    await fetched(request.receive, tier)
    outputs = body.outputs()
    cut_to = cut_of(tier, body.dimensions, outputs)
    inputs = await inputs_for(each_text(body.input), tier.settings.token_ids)
    asked = wire.Embed(
        inputs=inputs,
        outputs=outputs,
        truncate=body.truncate or tier.settings.truncate,
        role=role_of(tier, body.input_type),
        return_tokens=body.return_tokens,
        max_colbert=MAX_COLBERT_NUMBERS[body.encoding_format or "float"],
    )
    names = {f"^return_{kind}$": "embedding_type" for kind in body.embedding_type or ()}
    caching = services.caching(request)
    with client_names(names):
        work = services.lookups.vectors(tier, asked, caching)
        found = await while_connected(request.receive, work)
    tier.keep_alive(body.keep_alive)
    vectors = [vector.item for vector in found]
    headers |= caching.headers()
    n_tokens = sum(vector.n_tokens for vector in vectors)
    reply: dict[str, Any] = {
        "model": tier.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    if cut := [{"index": v.index, "n_tokens_cut": v.n_cut} for v in vectors if v.n_cut]:
        reply["truncated"] = cut
    form = Form(body.encoding_format == "base64", cut_to, body.colbert_dtype)
    n_colbert = found[0].n_colbert
    content = await encoded(vectors, lambda: _content(reply, vectors, n_colbert, form))
    return Response(content, media_type="application/json", headers=headers)


def _content(
    reply: dict[str, Any], vectors: Sequence[wire.Vector], n_colbert: int, form: Form
) -> bytes:
    """A piece at a time, since none lets the event loop go on before it is done."""
    encode = msgspec.json.encode
    data = b",".join([encode(item(vector, n_colbert, form)) for vector in vectors])
    return b"".join((b'{"object":"list","data":[', data, b"],", encode(reply)[1:]))


def role_of(tier: Tier, input_type: InputType | None) -> Role:
    """Whose prefix a text gets: as the request says, or else INPUT_TYPE."""
    input_type = input_type or tier.settings.input_type or "none"
    if input_type == "none":
        return "none"
    return "query" if input_type.endswith("query") else "passage"


def cut_of(tier: Tier, asked: int | None, outputs: Sequence[Output]) -> Cut | None:
    """What of a dense vector is wanted: as many numbers as asked, or else EMBEDDING_DIMENSION; all
    where it is None. Raises BadRequest where they would be no vector of the model's."""
    if "dense" not in outputs:
        if asked is not None:
            raise BadRequest("It is for dense vectors.", param="dimensions")
        return None
    dimensions = tier.settings.embedding_dimension if asked is None else asked
    model = tier.model()
    name = name_of(model.path)
    if dimensions is None or dimensions == model.n_embd:
        return None
    key = f"{tier.name.upper()}_EMBEDDING_DIMENSION"
    whose = "" if asked is not None else f"{key}={dimensions}: "
    if dimensions > model.n_embd:
        raise BadRequest(
            f"{whose}The vectors of {name} have {model.n_embd} dimensions.", param="dimensions"
        )
    is_known = any(known in name.lower() for known in MATRYOSHKA)
    may_cut = is_known if tier.settings.matryoshka is None else tier.settings.matryoshka
    if not may_cut:
        raise UnsupportedParameter(
            f"{whose}{name} is not known to be trained for shorter vectors than its "
            f"{model.n_embd}; set {tier.name.upper()}_MATRYOSHKA=true if it is.",
            param="dimensions",
        )
    return Cut(dimensions, any(known in name.lower() for known in CENTRED))


def fault_of_dimension(tier: Tier) -> str | None:
    """What is wrong with EMBEDDING_DIMENSION, by which every request would fail that asks for no
    `dimensions`. Raises ModelLoadFailed."""
    if tier.name == "embedding" and tier.settings.embedding_dimension is not None:
        try:
            cut_of(tier, None, ["dense"])
        except BadRequest as error:
            return error.message
    return None


async def inputs_for(inputs: Sequence[Any], setting: str) -> list[str | list[int]]:
    """Texts, or this model's token ids. Raises BadRequest for ids that may be another model's."""
    if isinstance(inputs[0], str) or setting == "own":
        return list(inputs)
    if setting == "refuse":
        raise BadRequest(
            "Token ids are those of one tokenizer, and clients often send another's; send texts "
            "(LangChain: check_embedding_ctx_length=False), or set EMBEDDING_TOKEN_IDS.",
            param="input",
        )
    return await asyncio.to_thread(_texts_of, inputs)


def _texts_of(inputs: Sequence[Any]) -> list[str | list[int]]:
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("cl100k_base")
    except Exception as error:  # not installed, or its table could not be fetched
        raise UnsupportedParameter(
            f"EMBEDDING_TOKEN_IDS=cl100k needs `pip install tiktoken` and its table ({error}).",
            param="input",
        ) from error
    try:
        return [_decoded(encoding.decode_bytes(ids)) for ids in inputs]
    except (KeyError, ValueError) as error:
        raise BadRequest(
            f"These are no token ids of cl100k_base: {error}.", param="input"
        ) from None


def _decoded(data: bytes) -> str:
    """Its text. Clients cut long ones between two ids, which may be within a character: what is
    left of that at either end is dropped. Raises ValueError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return decoder.decode(REST_OF_CHARACTER.sub(b"", data))
