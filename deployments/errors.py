"""Every error the service raises on purpose.

    ServiceError                  our own fault              -> 500
    ├── RequestError              the caller can fix it      -> 400
    │   ├── Unauthorized          no key, or a wrong one     -> 401
    │   ├── NotFound              no such route or model     -> 404
    │   ├── MethodNotAllowed      GET on a POST route        -> 405
    │   ├── RequestTimeout        body did not come in time  -> 408
    │   ├── TooLarge              body over the limit        -> 413
    │   ├── UnsupportedMediaType  body that is not JSON      -> 415
    │   └── WrongHost             none of `allowed_hosts`    -> 421
    ├── GenerationFailed          the model, not the engine  -> 500
    ├── Overloaded                try again soon             -> 429
    ├── EngineUnavailable         starting or restarting     -> 503
    │   └── EngineStopping        what runs may end          -> 503
    └── ClusterError              an operator can fix it     -> 503
        └── ClusterTooSmall
            └── TooFewNodes

A message says what was asked, what there is, and what to change. It may be shown to a client word
for word, so it never quotes another exception, a path or an address: operators' errors
(`ClusterError`) are logged and shown as `ServiceError`'s fixed sentence. This module knows nothing
of HTTP but the numbers; `deployments.exchange` turns an error into a response.

    >>> RequestError("n=9 is over the limit of 8", param="n").body()["error"]["param"]
    'n'
"""

from typing import TypedDict


class ErrorObject(TypedDict):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorObject


class ServiceError(Exception):
    """Anything that went wrong on our side; its text is for logs."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    """Seconds in the `Retry-After` header; unset sends none."""

    def public_message(self) -> str:
        return "The server had an error while processing your request."

    def body(self) -> ErrorBody:
        return {
            "error": {
                "message": self.public_message(),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(ServiceError):
    """The caller can fix it; `param` names the field at fault."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def public_message(self) -> str:
        return self.message


class Unauthorized(RequestError):
    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "A valid API key is needed: send it in the header 'Authorization: Bearer KEY'."
        )


class NotFound(RequestError):
    status = 404


class MethodNotAllowed(RequestError):
    status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__(
            f"This method is not allowed here: use {allowed}.", code="method_not_allowed"
        )
        self.allowed = allowed


class RequestTimeout(RequestError):
    status = 408

    def __init__(self) -> None:
        super().__init__("The request body did not arrive in time.", code="request_timeout")


class TooLarge(RequestError):
    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The request body is larger than {limit} bytes: send a shorter one.",
            code="request_too_large",
        )


class UnsupportedMediaType(RequestError):
    status = 415

    def __init__(self) -> None:
        super().__init__(
            "The request body must be JSON: send the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


class WrongHost(RequestError):
    status = 421

    def __init__(self) -> None:
        super().__init__(
            "This service does not answer under the name in the header 'Host'.",
            code="misdirected_request",
        )


class GenerationFailed(ServiceError):
    """One generation went wrong and the engine goes on; `code` says how."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code

    def public_message(self) -> str:
        if self.code == "numerical_error":
            return "The model computed something for this request that is not a number."
        if self.code == "grammar_error":
            return "The request's grammar could not be followed to its end: simplify it."
        return super().public_message()


class Overloaded(ServiceError):
    """The engine's queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1

    def public_message(self) -> str:
        return "The server is at capacity: try again in a moment."


class EngineUnavailable(ServiceError):
    """The engine is starting, restarting or gone."""

    status = 503
    code = "engine_unavailable"
    retry_after_s = 5

    def public_message(self) -> str:
        return "The engine is not ready: it is starting or restarting. Try again in a moment."


class EngineStopping(EngineUnavailable):
    """The engine was told to stop: it takes nothing new, and what it has may not end in time."""

    def public_message(self) -> str:
        return "The server is being stopped: try again in a moment."


class ClusterError(ServiceError):
    """The cluster cannot hold the service as it is configured; the sentence is the operator's."""

    status = 503
    retry_after_s = 30


class ClusterTooSmall(ClusterError):
    """`ClusterTooSmall(4, 2, "GPU")`: needs 4 GPUs on one node; the largest node has 2 free."""

    def __init__(self, needed: float, largest_free: float, what: str = "GPU") -> None:
        noun = what if needed == 1 else f"{what}s"
        super().__init__(
            f"needs {needed} {noun} on one node; the largest node has {largest_free} free"
        )
        self.needed = needed
        self.largest_free = largest_free


class TooFewNodes(ClusterTooSmall):
    """`TooFewNodes(4, 2, 1)`: needs 4 GPUs on each of 2 nodes; 1 node has them free."""

    def __init__(self, needed: float, num_nodes: int, num_fitting: int, what: str = "GPU") -> None:
        noun = what if needed == 1 else f"{what}s"
        nodes = "1 node has" if num_fitting == 1 else f"{num_fitting} nodes have"
        ClusterError.__init__(
            self, f"needs {needed} {noun} on each of {num_nodes} nodes; {nodes} them free"
        )
        self.needed, self.num_nodes, self.num_fitting = needed, num_nodes, num_fitting
