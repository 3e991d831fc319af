"""HTTP in, OpenAI's answers out. The only module that knows about HTTP.

`build_api` makes a plain ASGI app of a `Service`: tests run it bare, production runs it as the
Serve deployment `Ingress`. A request is read whole (bounded), parsed, planned, handed to the driver
and answered, as one body or as server-sent events. What is wrong before the first token has a
status of its own; what goes wrong later is one `data: {"error": ...}` event, and no `[DONE]`.
A client that leaves is noticed between any two tokens and its generations are cancelled at once.

There is no framework between the server and the routes: a request costs one dictionary look-up.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

import workers.bundled
from deployments import page
from deployments.config import ServiceConfig
from deployments.counting import Outcome
from deployments.driver_client import DriverClient, Generations
from deployments.errors import (
    EngineUnavailable,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    ServiceError,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from deployments.logs import REQUESTS, configure_logs
from deployments.messages import EngineInfo
from deployments.openai_api import (
    Answer,
    ModelLimits,
    Plan,
    check_model,
    plan_chat,
    plan_completion,
)
from deployments.schemas import MAX_BODY_BYTES, Model, ModelList, parse_chat, parse_completion
from deployments.spans import Exchanged, Work, request_span
from deployments.tokenizer import ChatTokenizer
from deployments.watching import Look

if TYPE_CHECKING:
    from deployments.traces import Traces

log = logging.getLogger("lockstep.ingress")
request_log = logging.getLogger(REQUESTS)

BODY_TIMEOUT_S = 30.0
LONG_BODY_BYTES = 16 * 2**10
"""Longer ones are planned in a thread: tokenizing them would hold up every stream."""

LOOK_S = 15.0
"""How long one stream for the live page lasts: a service that is told to stop waits for those who
look no longer than that. The page asks again at once."""
AWAY_S = 2.0
"""Without a view for so long, the driver is away."""

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
NOTHING_RUNS = b"default-src 'none'"
"""Content-Security-Policy of all that is not the page."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

encode_json = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """Nobody is there to answer."""


class Keys:
    """The API keys that open the service, kept as digests; none opens it to everybody."""

    def __init__(self, keys: Iterable[str]) -> None:
        """A key is given as it is or as the 64 hexadecimal digits of its SHA-256."""
        self._digests = [
            bytes.fromhex(key)
            if re.fullmatch(r"[0-9a-fA-F]{64}", key)
            else hashlib.sha256(key.encode()).digest()
            for key in keys
        ]

    def tenant(self, authorization: str) -> str:
        """A name for who holds the key, empty if none is needed; or `Unauthorized`.

        All keys are compared, each in constant time: how long it takes tells nothing.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized
        return digest.hex()[:16]


def read_keys(path: str) -> list[str]:
    """The keys in a file; a file that is named and not there refuses to start, open to all."""
    if not path:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"api_keys_file={path} cannot be read ({error.strerror}): mount the file or unset it"
        ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_keys_file={path} holds no key: put one on a line or unset it")
    return keys


class Service:
    """What every route shares: the model's tokenizer and the line to the driver."""

    def __init__(
        self,
        client: DriverClient,
        tokenizer: ChatTokenizer,
        *,
        model: str,
        api_keys: Iterable[str] = (),
        traces: "Traces | None" = None,
    ) -> None:
        """`traces` is told of every request for tokens; it is closed with the service."""
        self.client = client
        self.tokenizer = tokenizer
        self.model = model
        self.keys = Keys(api_keys)
        self.traces = traces
        self.created = int(time.time())

    def limits(self) -> ModelLimits:
        info = self.client.info
        if info is None:
            raise EngineUnavailable
        return ModelLimits(
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=info.stop_token_ids,
        )


class Exchange:
    """One HTTP request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, names_itself: bool) -> None:
        self.method: str = scope["method"]
        root = scope.get("root_path", "")
        self.path: str = scope["path"].removeprefix(root) or "/"
        self.query: bytes = scope.get("query_string", b"")
        self.headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        self.begun = False
        self.status = 0
        """Of the response, once it has begun."""
        self.request_id = ""
        self.error: ServiceError | None = None
        """Why it failed, if it did."""
        self.generating: tuple[Plan, Answer, Generations] | None = None
        """What the engine does for it, if anybody traces."""
        self.scheme: str = scope.get("scheme", "http")
        self._receive = receive
        self._send = send
        self._ended = False
        self._policy = NOTHING_RUNS
        self._extra_headers = self._identity(names_itself)

    @property
    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        if self.error is not None:
            return _outcome(self.error)
        return Outcome.FINISHED if self._ended else Outcome.CANCELLED

    def header(self, name: str) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    async def body(self) -> bytes:
        """All of a JSON body, or an error as soon as it is too long or too late."""
        self._check_is_json()
        length = self.header("content-length")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise TooLarge(MAX_BODY_BYTES)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read()
        except TimeoutError:
            raise RequestTimeout from None

    async def _read(self) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise TooLarge(MAX_BODY_BYTES)
            if not message.get("more_body", False):
                return bytes(body)

    def _check_is_json(self) -> None:
        kind, _, parameters = self.header("content-type").lower().partition(";")
        charset = re.search(r"charset=\"?([\w-]+)", parameters)
        if kind.strip() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8")):
            raise UnsupportedMediaType
        if self.header("content-encoding").strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType

    async def until_gone(self) -> None:
        """Returns when the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, (b"content-type", b"application/json"), length, *headers)
        await self.write(b"" if self.method == "HEAD" else body, more=False)

    async def show(self, shown: page.Page) -> None:
        self._policy = shown.policy
        length = (b"content-length", str(len(shown.html)).encode())
        await self._start(200, (b"content-type", b"text/html; charset=utf-8"), length)
        await self.write(b"" if self.method == "HEAD" else shown.html, more=False)

    async def begin_events(self) -> None:
        # NOTE: a proxy that buffers would turn the stream into one late answer.
        await self._start(
            200,
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-accel-buffering", b"no"),
        )

    async def write(self, data: bytes, *, more: bool) -> None:
        self._ended = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: ServiceError) -> None:
        """The error as a response, or as the stream's last event if it has begun."""
        self.error = error
        body = encode_json(error.body())
        if not self.begun:
            await self.answer(error.status, body, *_error_headers(error))
        elif not self._ended:
            await self.write(_event(body), more=False)

    async def _start(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        self.begun = True
        self.status = status
        policy = (b"content-security-policy", self._policy)
        every = [*headers, *SECURITY_HEADERS, policy, *self._extra_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": every})

    def _identity(self, names_itself: bool) -> list[tuple[bytes, bytes]]:
        """Our id of the request, and the client's own if it is fit to be shown."""
        found = []
        theirs = self.headers.get("x-request-id", b"")
        is_showable = re.fullmatch(rb"[\x20-\x7e]{1,128}", theirs)
        if names_itself:
            self.request_id = "req_" + secrets.token_hex(16)
            found.append((b"x-request-id", self.request_id.encode()))
        elif is_showable:
            self.request_id = theirs.decode()
        if is_showable:
            found.append((b"x-client-request-id", theirs))
        return found


def _error_headers(error: ServiceError) -> list[tuple[bytes, bytes]]:
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    return headers


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


Handler = Callable[[Service, Exchange, str], Awaitable[None]]
"""Answers one exchange; the text is the tenant, empty without API keys."""


async def _livez(service: Service, exchange: Exchange, tenant: str) -> None:
    await exchange.answer(200, b'{"status":"alive"}')


async def _readyz(service: Service, exchange: Exchange, tenant: str) -> None:
    if not service.client.ready:
        raise EngineUnavailable
    await exchange.answer(200, b'{"status":"ready"}')


async def _page(service: Service, exchange: Exchange, tenant: str) -> None:
    await exchange.show(page.load())


async def _engine(service: Service, exchange: Exchange, tenant: str) -> None:
    """How the engine is, as events; `?after=` names the last sample that the page has."""
    client, watch = service.client, service.client.watch
    found = re.fullmatch(rb"after=(\d{1,12})", exchange.query)
    sent = int(found[1]) if found else -1
    ends = time.monotonic() + LOOK_S
    gone = asyncio.create_task(exchange.until_gone())
    try:
        with watch.watching():
            client.ask_for_views()
            await exchange.begin_events()
            while not gone.done() and time.monotonic() < ends and exchange.method == "GET":
                state = await watch.next(AWAY_S)
                look = Look(service.model, state, watch.samples_after(sent))
                sent = watch.last_sample
                await exchange.write(_event(encode_json(look)), more=True)
            await exchange.write(b"", more=False)
    finally:
        gone.cancel()


def _model(service: Service) -> Model:
    info = service.client.info
    return Model(service.model, service.created, None if info is None else info.max_model_len)


async def _models(service: Service, exchange: Exchange, tenant: str) -> None:
    await exchange.answer(200, encode_json(ModelList([_model(service)])))


async def _model_named(service: Service, exchange: Exchange, tenant: str) -> None:
    try:
        check_model(exchange.path.removeprefix(MODEL_PREFIX), service.model)
    except NotFound:
        service.client.counts.turn_away(Outcome.REJECTED)
        raise
    await exchange.answer(200, encode_json(_model(service)))


async def _completions(service: Service, exchange: Exchange, tenant: str) -> None:
    await _generate(service, exchange, tenant, _plan_completion, "cmpl-")


async def _chat_completions(service: Service, exchange: Exchange, tenant: str) -> None:
    await _generate(service, exchange, tenant, _plan_chat, "chatcmpl-")


Planner = Callable[[Service, ModelLimits, bytes, str], Plan]


def _plan_completion(service: Service, limits: ModelLimits, data: bytes, tenant: str) -> Plan:
    request = parse_completion(data)
    check_model(request.model, service.model)
    salt = _salt(tenant, request.cache_salt)
    seed = secrets.randbits(63)
    return plan_completion(request, service.tokenizer, limits, seed=seed, salt=salt)


def _plan_chat(service: Service, limits: ModelLimits, data: bytes, tenant: str) -> Plan:
    request = parse_chat(data)
    check_model(request.model, service.model)
    salt = _salt(tenant, request.cache_salt)
    seed = secrets.randbits(63)
    return plan_chat(request, service.tokenizer, limits, seed=seed, salt=salt)


def _salt(tenant: str, asked: str | None) -> str:
    """Holders of different keys never share cached prefixes, whatever salt they send."""
    return f"{tenant}/{asked or ''}" if tenant else asked or ""


async def _generate(
    service: Service, exchange: Exchange, tenant: str, planner: Planner, prefix: str
) -> None:
    """Plan, run and answer one request; what ends early is counted as refused."""
    client = service.client
    began = asyncio.get_running_loop().time()
    num_refused = 1
    try:
        data = await exchange.body()
        limits = service.limits()
        if len(data) > LONG_BODY_BYTES:
            plan = await asyncio.to_thread(planner, service, limits, data, tenant)
        else:
            plan = planner(service, limits, data, tenant)
        num_refused = len(plan.specs)
        generations = client.generate(plan.specs, began=began)
    except Exception as error:
        client.counts.turn_away(_outcome(error), num_refused)
        raise
    answer = Answer(
        plan,
        service.tokenizer,
        answer_id=prefix + secrets.token_hex(16),
        created=int(time.time()),
        model=service.model,
    )
    if service.traces is not None:
        exchange.generating = plan, answer, generations
    watch = asyncio.create_task(exchange.until_gone())
    watch.add_done_callback(lambda _: generations.cancel())
    try:
        async with generations:
            reply = _stream if plan.stream else _whole
            await reply(exchange, plan, answer, generations)
    finally:
        watch.cancel()


def _outcome(error: Exception) -> Outcome:
    """How a request is counted that ended before its first generation began."""
    if isinstance(error, ClientGone):
        return Outcome.CANCELLED
    is_refusal = isinstance(error, ServiceError) and error.status != 500
    return Outcome.REJECTED if is_refusal else Outcome.FAILED


async def _whole(exchange: Exchange, plan: Plan, answer: Answer, generations: Generations) -> None:
    async for events in generations:
        for choice, index in answer.feed(events):
            generations.finish(choice, index)
        answer.collect(events)
    if generations.cancelled:
        raise ClientGone
    body = answer.body(generations.num_cached, generations.prompt_logprobs)
    await exchange.answer(200, encode_json(body))


async def _stream(exchange: Exchange, plan: Plan, answer: Answer, generations: Generations) -> None:
    """Headers wait for the first token, so that what fails before has its own status."""
    async for events in generations:
        for choice, index in answer.feed(events):
            generations.finish(choice, index)
        if not exchange.begun:
            await exchange.begin_events()
        chunks = answer.stream(events, generations.prompt_logprobs)
        if chunks:
            data = b"".join([_event(encode_json(chunk)) for chunk in chunks])
            await exchange.write(data, more=True)
    if generations.cancelled:
        raise ClientGone
    last = b""
    if plan.include_usage:
        last = _event(encode_json(answer.usage_event(generations.num_cached)))
    await exchange.write(last + _event(b"[DONE]"), more=False)


MODEL_PREFIX = "/v1/models/"

OPEN_ROUTES: Mapping[str, Handler] = {
    "/": _page,
    "/livez": _livez,
    "/readyz": _readyz,
    "/health": _readyz,
}
"""Probes, and the page, which holds no data: they need no API key."""

TRACED = ("/v1/completions", "/v1/chat/completions")
"""Routes whose every request has a trace."""

ROUTES: Mapping[str, tuple[str, Handler]] = {
    "/api/engine": ("GET", _engine),
    "/v1/models": ("GET", _models),
    "/v1/completions": ("POST", _completions),
    "/v1/chat/completions": ("POST", _chat_completions),
}


def _route(service: Service, exchange: Exchange) -> tuple[Handler, str]:
    """The handler of an exchange and its tenant; who is turned away here is counted."""
    try:
        return _find_route(service, exchange)
    except ServiceError:
        service.client.counts.turn_away(Outcome.REJECTED)
        raise


def _find_route(service: Service, exchange: Exchange) -> tuple[Handler, str]:
    """Only open routes need no key."""
    open_to_all = OPEN_ROUTES.get(exchange.path)
    if open_to_all is not None:
        _check_method(exchange.method, "GET")
        return open_to_all, ""
    tenant = service.keys.tenant(exchange.header("authorization"))
    allowed, handler = ROUTES.get(exchange.path, ("", None))
    if exchange.path.startswith(MODEL_PREFIX):
        allowed, handler = "GET", _model_named
    if handler is None:
        raise NotFound("There is no such route.", code="unknown_url")
    _check_method(exchange.method, allowed)
    return handler, tenant


def _check_method(method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise MethodNotAllowed(allowed)


async def _respond(service: Service, exchange: Exchange) -> None:
    """Every way an exchange can end is an answer, an event, or nobody left to tell."""
    known = {"request_id": exchange.request_id}
    began = time.monotonic()
    try:
        handler, tenant = _route(service, exchange)
        await handler(service, exchange, tenant)
    except ClientGone:
        return
    except ServiceError as error:
        if error.status == 500:
            log.error("a request failed: %s", error, extra=known)
        await exchange.fail(error)
    except OSError:
        return  # the server found the connection closed while we wrote
    except Exception:
        log.exception("a request failed", extra=known)
        await exchange.fail(ServiceError())
    finally:
        if request_log.isEnabledFor(logging.INFO):
            _log_end(exchange, time.monotonic() - began)
        if service.traces is not None and exchange.path in TRACED:
            _trace(service.traces, service.model, exchange, began)


def _trace(traces: "Traces", model: str, exchange: Exchange, began: float) -> None:
    """Tell of a request that is over."""
    work = None
    if exchange.generating is not None:
        plan, answer, generations = exchange.generating
        work = Work(
            plan=plan,
            answer_id=answer.id,
            usage=answer.usage(generations.num_cached),
            finish_reasons=answer.finish_reasons,
            courses=generations.courses,
        )
    error = exchange.error
    over = Exchanged(
        method=exchange.method,
        route=exchange.path,
        scheme=exchange.scheme,
        request_id=exchange.request_id,
        model=model,
        start=began,
        end=time.monotonic(),
        status=exchange.status,
        outcome=exchange.outcome,
        error="" if error is None else error.code or str(error.status),
        work=work,
    )
    caller = {name: exchange.header(name) for name in ("traceparent", "tracestate")}
    traces.record(request_span(over), caller)


def _log_end(exchange: Exchange, seconds: float) -> None:
    """A line for each request but those of open routes."""
    if exchange.path not in OPEN_ROUTES:
        known = {
            "request_id": exchange.request_id,
            "path": exchange.path if exchange.path in ROUTES else "another",
            "status": exchange.status,
            "seconds": round(seconds, 4),
        }
        event = "request answered" if exchange.status else "client gone"
        request_log.info(event, extra=known)


async def _lifespan(service: Service, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await service.client.start()
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await service.client.close()
            if service.traces is not None:
                await asyncio.to_thread(service.traces.close)
            await send({"type": "lifespan.shutdown.complete"})
            return


def build_api(service: Service, *, names_requests: bool = True) -> ASGIApp:
    """The ASGI app. Under Serve, whose own middleware sets `x-request-id`, we must not."""

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(service, receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send, names_itself=names_requests)
            await _respond(service, exchange)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})

    return api


def _model_name(config: ServiceConfig) -> str:
    """What clients call the model if nothing else was said: its folder's name."""
    return Path(config.engine.model).resolve().name if config.engine.model else "bundled"


def _traces(endpoint: str, name: str) -> "Traces | None":
    if not endpoint:
        return None
    from deployments.traces import Traces  # OpenTelemetry is an extra

    return Traces(endpoint, instance=name)


# Serve's access log would be a line a request on the launching terminal; /metrics counts them.
@serve.deployment(
    max_ongoing_requests=4096,
    health_check_period_s=1,
    logging_config={"enable_access_log": False},
)
@serve.ingress()
class Ingress:
    """The HTTP front as a Serve deployment: stateless, any number of replicas."""

    def __init__(self, config: ServiceConfig, driver: DeploymentHandle) -> None:
        configure_logs(config.service.log_format)
        folder = Path(config.engine.model) if config.engine.model else workers.bundled.path()
        context = ray.get_runtime_context()

        async def locate() -> EngineInfo:
            return await driver.endpoint.remote()

        name = f"ingress-{context.get_actor_id() or 'local'}"
        client = DriverClient(
            locate,
            name=name,
            node_id=context.get_node_id(),
            resume_wait_s=config.service.resume_wait_s,
        )
        self._service = Service(
            client,
            ChatTokenizer.load(folder),
            model=config.model_name,
            api_keys=(*config.service.api_keys, *read_keys(config.service.api_keys_file)),
            traces=_traces(config.service.otlp_endpoint, name),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this in the replica, after the constructor."""
        return build_api(self._service, names_requests=False)
