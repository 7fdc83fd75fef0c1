"""Every error as HTTP, whoever raised it: in OpenAI's envelope, or in Anthropic's where its clients
ask."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from api.deps import ClientLeft
from errors import (
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    InternalError,
    MethodNotAllowed,
    RequestTimeout,
    RouteNotFound,
    ServiceError,
)

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nobody receives it; it is what the log says
ANTHROPIC_PATHS = re.compile(r"/v1/messages(/|$)")
# their types of errors by status; the others are invalid requests
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def install(app: FastAPI) -> None:
    """Make `app` answer every error in the envelope."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientLeft, _client_left)


def response(error: ServiceError, scope: Scope) -> Response:
    return JSONResponse(envelope(error, scope), error.status, error.headers())


def envelope(error: ServiceError, scope: Scope) -> dict[str, Any]:
    """An error as the clients of this path know it."""
    body = error.body()
    fault = body["error"]
    for name in ("message", "param"):  # they may quote half a surrogate pair, which is no text
        if fault[name] is not None:
            fault[name] = fault[name].encode(errors="backslashreplace").decode()
    if not ANTHROPIC_PATHS.match(scope["path"]):
        return body
    message, place = fault["message"], fault["param"]
    if place and place not in message:  # for it there is no field
        message = f"{place}: {message}"
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": scope["request_id"],
    }


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Names the field at fault as the client knows it, in a request that was translated. `names`
    has what to put in place of each pattern."""
    try:
        yield
    except BadRequest as error:
        if given := error.param:
            param = client_name(given, names)
            # quoted, or as the sentence's subject
            place = rf"(?<='){re.escape(given)}(?=')|^{re.escape(given)}(?=[\[ ])"
            error.message = re.sub(place, lambda _: param, error.message)
            error.param = param
        raise


def client_name(param: str, names: Mapping[str, str]) -> str:
    """A field of a chat as the client knows it."""
    for pattern, name in names.items():
        param = re.sub(pattern, name, param)
    return param


def as_service_error(error: Exception, request_id: str) -> ServiceError:
    """The error that a client is told of; a fault of ours goes to the log with its traceback."""
    if isinstance(error, ServiceError):
        return error
    logger.error(
        "Request %s failed by a fault of ours", request_id, exc_info=error,
        extra={"fields": {"request_id": request_id}},
    )  # fmt: skip
    return InternalError("A fault of the service. Its log has the reason under the request's id.")


def dotted(location: Sequence[str | int]) -> str:
    """A place in a JSON body, such as `messages[0].content`."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not step.startswith("<"):  # <…> are our own tags of union members
            text += f".{step}" if text else step
    return text


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return response(error, request.scope)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = _explain(error.errors()[0], request.headers.get("content-type", ""))
    return response(fault, request.scope)


def _explain(fault: dict[str, Any], content_type: str) -> BadRequest:
    location = fault["loc"][1:]  # without "body"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "json_invalid":
        return BadRequest(f"The body is not valid JSON: {fault['ctx']['error']}.")
    if not location:
        if content_type.partition(";")[0].strip().lower() != "application/json":
            return BadRequest("Send the body as JSON, with `Content-Type: application/json`.")
        return BadRequest("The body must be a JSON object.")
    param = dotted(location)
    if fault["type"] == "missing":
        return BadRequest(f"'{param}' is required.", param=param)
    return BadRequest(f"'{param}': {reason}", param=param)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    by_status: dict[int, ServiceError] = {
        404: RouteNotFound(f"There is no {where} here{_hint(request)}"),
        405: MethodNotAllowed(f"{where} is not possible."),
        408: BodyTooSlow(str(error.detail)),
        504: RequestTimeout(str(error.detail)),
        413: BodyTooLarge(str(error.detail)),
    }
    fault = by_status.get(error.status_code, BadRequest(str(error.detail)))
    reply = response(fault, request.scope)
    reply.headers.update(error.headers or {})
    if error.status_code == 405:  # whose Allow is of one route, and others may have the same path
        reply.headers["Allow"] = ", ".join(_methods(request, request.scope["path"]))
    return reply


def _hint(request: Request) -> str:
    """What to ask instead of a path that is not there, if that is plain; and the sentence's end."""
    path = re.sub("/+", "/", request.url.path).rstrip("/")
    for meant in (path, f"/v1{path}", path.removeprefix("/v1")):
        if request.method in _methods(request, meant):
            return f"; did you mean {meant}?"
    return "."


def _methods(request: Request, path: str) -> list[str]:
    """With which `path` can be asked."""
    scope = {**request.scope, "path": path}
    routes = [route for route in request.app.routes if route.matches(scope)[0] != Match.NONE]
    methods = {method for route in routes for method in route.methods}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)
