"""Which handler answers what, and how every exchange ends.

`build_api` makes a plain ASGI app of a `Service`: tests run it bare, production runs it as the
Serve deployment `Ingress`, a batch asks it in its own process. There is no framework between the
server and the routes: a request costs one dictionary look-up.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from deployments import page
from deployments.counting import Outcome
from deployments.errors import (
    EngineUnavailable,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    WrongHost,
)
from deployments.exchange import (
    ASGIApp,
    ClientGone,
    Exchange,
    Receive,
    Scope,
    Send,
    encode_json,
    event_of,
)
from deployments.logs import REQUESTS
from deployments.request_plan import check_model
from deployments.schemas import Model, ModelList
from deployments.service import Service, answer_chat, answer_completion
from deployments.spans import Exchanged, Work, request_span
from deployments.watching import Look

if TYPE_CHECKING:
    from deployments.traces import Traces

log = logging.getLogger("lockstep.ingress")
request_log = logging.getLogger(REQUESTS)

LOOK_S = 15.0
"""How long one stream for the live page lasts: a service that is told to stop waits for those who
look no longer than that. The page asks again at once."""
AWAY_S = 2.0
"""Without a view for so long, the driver is away."""


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
                await exchange.write(event_of(encode_json(look)), more=True)
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


MODEL_PREFIX = "/v1/models/"

OPEN_ROUTES: Mapping[str, Handler] = {
    "/": _page,
    "/livez": _livez,
    "/readyz": _readyz,
    "/health": _readyz,
}
"""Probes, and the page, which holds no data: they need no API key."""

PROBES = ("/livez", "/readyz", "/health")
"""Asked by address, by whoever watches the service: they answer under any name."""

TRACED = ("/v1/completions", "/v1/chat/completions")
"""Routes whose every request has a trace."""

ROUTES: Mapping[str, tuple[str, Handler]] = {
    "/api/engine": ("GET", _engine),
    "/v1/models": ("GET", _models),
    "/v1/completions": ("POST", answer_completion),
    "/v1/chat/completions": ("POST", answer_chat),
}


def _route(service: Service, exchange: Exchange) -> tuple[Handler, str]:
    """The handler of an exchange and its tenant; who is turned away here is counted."""
    try:
        return _find_route(service, exchange)
    except ServiceError:
        service.client.counts.turn_away(Outcome.REJECTED)
        raise


def _find_route(service: Service, exchange: Exchange) -> tuple[Handler, str]:
    """Only open routes need no key, and only probes no name that is ours."""
    if exchange.path not in PROBES and not all(map(service.hosts.allow, exchange.hosts)):
        raise WrongHost
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
