"""Routes of OpenAI's API that this version does not have yet: a clear 400 and not a 404."""

from fastapi import APIRouter, Request

from errors import UnsupportedParameter

router = APIRouter()


@router.post("/v1/embeddings")
@router.post("/v1/rerank")
async def refuse_route(request: Request) -> None:
    raise UnsupportedParameter(f"{request.url.path} is not supported by this version.")
