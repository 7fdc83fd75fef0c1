"""Every error that a client can see, and what it looks like on the wire.

ServiceError
├── BadRequest                     the request itself is wrong
│   ├── UnsupportedParameter       a field (or route) that is understood but cannot be honoured
│   └── ContextLengthExceeded      the prompt does not fit the tier's context
├── InvalidApiKey                  no key, or an unknown one
├── Forbidden                      a host or address that must not be served
├── ModelNotFound                  no configured tier has that name
├── RouteNotFound                  no such path
├── MethodNotAllowed               the path exists, the method does not
├── BodyTooLarge                   more than MAX_BODY_BYTES
├── BodyTooSlow                    no piece of it within RECEIVE_TIMEOUT_S
├── UnsupportedEncoding            a compressed body
├── UrlTooLong                     path and query
├── HeadTooLarge                   too many headers, or too long ones
├── TooManyConnections             more than MAX_CONNECTIONS
├── QueueFull                      the tier has as many waiting requests as it takes
├── QueueTimeout                   the request has waited for as long as it may
├── RequestTimeout                 the request has taken as long as it may
├── TierUnavailable                the tier cannot serve right now, a later try may succeed
├── InsufficientMemory             there is no memory for a model beside the others, or for a text
├── ModelLoadFailed                the model cannot be loaded; trying again at once will not help
├── WorkerCrashed                  the process with the model ended while this request was in it
└── InternalError                  a fault of ours; the log has the traceback under the request id
"""

from typing import Any, ClassVar


class ServiceError(Exception):
    """An error with its place in OpenAI's envelope. Raise a subclass where the cause is known."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    is_final = False  # another try fares no better, so SDKs are told not to make one

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        **numbers: int,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.numbers = numbers  # extra integers of the body, such as n_prompt_tokens

    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope: `{"error": {message, type, param, code, …numbers}}`."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | self.numbers}

    def headers(self) -> dict[str, str]:
        headers = {"x-should-retry": "false"} if self.is_final else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return headers


class BadRequest(ServiceError):
    status = 400
    type = "invalid_request_error"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class InvalidApiKey(ServiceError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class ModelNotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RouteNotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class BodyTooSlow(ServiceError):
    status = 408
    type = "invalid_request_error"
    code = "body_too_slow"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Connection": "close"}  # the rest of the body may still come


class UnsupportedEncoding(ServiceError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_encoding"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Accept-Encoding": "identity"}


class UrlTooLong(ServiceError):
    status = 414
    type = "invalid_request_error"
    code = "url_too_long"


class HeadTooLarge(ServiceError):
    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class TooManyConnections(ServiceError):
    status = 503
    code = "too_many_connections"


class QueueFull(ServiceError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class QueueTimeout(ServiceError):
    status = 503
    code = "queue_timeout"


class RequestTimeout(ServiceError):
    status = 504
    code = "request_timeout"
    is_final = True


class TierUnavailable(ServiceError):
    status = 503
    code = "model_unavailable"


class InsufficientMemory(ServiceError):
    """Without `retry_after_s` a later try will not help."""

    status = 503
    code = "insufficient_memory"

    def __init__(self, message: str, *, retry_after_s: int | None = None, **more: Any) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **more)
        self.is_final = retry_after_s is None


class ModelLoadFailed(ServiceError):
    code = "model_load_failed"
    is_final = True


class WorkerCrashed(ServiceError):
    code = "worker_crashed"


class InternalError(ServiceError):
    code = "internal_error"
