"""What every worker does with requests: texts to tokens and back, and what is said of a failure."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from engine import wire
from engine.backends.base import Tokenizer
from errors import BadRequest, InternalError, ServiceError

logger = logging.getLogger("worker")


def convert(
    request: wire.Tokenize | wire.Detokenize, tokenizer: Tokenizer
) -> wire.Tokens | wire.Text:
    """Text to tokens, or tokens to text. Raises a ServiceError that is the client's answer."""
    if isinstance(request, wire.Tokenize):
        ids = tokenize(request.segments, request.add_bos, tokenizer)
        return wire.Tokens(request.job, ids, [tokenizer.literal(token) for token in ids])
    check_ids(request.tokens, tokenizer, "tokens")
    data = b"".join(map(tokenizer.literal, request.tokens))
    return wire.Text(request.job, data.decode(errors="replace"))


def tokenize(
    prompt: Sequence[wire.Segment | int], add_bos: bool, tokenizer: Tokenizer
) -> list[int]:
    ids: list[int] = []
    for n, piece in enumerate(prompt):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            with naming("prompt"):
                ids += tokenizer.tokenize(
                    piece.text, parse_special=piece.parse_special, continues=n > 0
                )
    is_text = any(isinstance(piece, wire.Segment) for piece in prompt[:1])
    bos = tokenizer.bos
    if add_bos and is_text and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


@contextmanager
def naming(param: str, **numbers: int) -> Iterator[None]:
    """What is refused within is refused because of this field of the request."""
    try:
        yield
    except BadRequest as error:
        error.param = param
        error.numbers |= numbers
        raise


def check_ids(ids: Iterable[int], tokenizer: Tokenizer, param: str) -> None:
    if any(not 0 <= token < tokenizer.n_vocab for token in ids):
        raise BadRequest(f"Token ids must be from 0 to {tokenizer.n_vocab - 1}.", param=param)


def failure(job: int, error: Exception) -> wire.Failed:
    """What the server is told when a job ends without an answer."""
    if not isinstance(error, ServiceError):
        logger.error("Job %d failed", job, exc_info=error)
        error = InternalError("The model failed at this request. The log has the reason.")
    return wire.Failed(job, error.code, error.message, error.param, error.numbers)
