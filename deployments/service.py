"""A request for tokens, from its body to its answer; and what all requests share.

The body is parsed, planned (in a thread if that takes long), handed to the driver and answered, as
one body or as server-sent events. What is wrong before the first token has a status of its own;
what goes wrong later is one `data: {"error": ...}` event, and no `[DONE]`. A client that leaves is
noticed between any two tokens and its generations are cancelled at once.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from deployments.answer import Answer
from deployments.api_keys import Keys
from deployments.chat_template import ASIDE, AT_ONCE, Effort, TooMuchEffort
from deployments.driver_client import DriverClient
from deployments.errors import EngineUnavailable
from deployments.exchange import ClientGone, Exchange, encode_json, event_of, outcome_of
from deployments.generations import Generations
from deployments.hosts import Hosts
from deployments.request_plan import ModelLimits, Plan, check_model, plan_chat, plan_completion
from deployments.schemas import parse_chat, parse_completion
from deployments.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from deployments.traces import Traces

LONG_BODY_BYTES = 16 * 2**10
"""Longer ones are planned in a thread: tokenizing them would hold up every stream."""


class Service:
    """What every route shares: the model's tokenizer and the line to the driver."""

    def __init__(
        self,
        client: DriverClient,
        tokenizer: ChatTokenizer,
        *,
        model: str,
        api_keys: Iterable[str] = (),
        allowed_hosts: Iterable[str] = (),
        traces: "Traces | None" = None,
    ) -> None:
        """`traces` is told of every request for tokens; it is closed with the service."""
        self.client = client
        self.tokenizer = tokenizer
        self.model = model
        self.keys = Keys(api_keys)
        self.hosts = Hosts(allowed_hosts)
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


async def answer_completion(service: Service, exchange: Exchange, tenant: str) -> None:
    await _generate(service, exchange, tenant, _plan_completion, "cmpl-")


async def answer_chat(service: Service, exchange: Exchange, tenant: str) -> None:
    await _generate(service, exchange, tenant, _plan_chat, "chatcmpl-")


Planner = Callable[[Service, ModelLimits, bytes, str, Effort], Plan]


def _plan_completion(
    service: Service, limits: ModelLimits, data: bytes, tenant: str, effort: Effort
) -> Plan:
    """Without a template there is nothing but tokenizing, which the body's length bounds."""
    request = parse_completion(data)
    check_model(request.model, service.model)
    salt = _salt(tenant, request.cache_salt)
    seed = secrets.randbits(63)
    return plan_completion(request, service.tokenizer, limits, seed=seed, salt=salt)


def _plan_chat(
    service: Service, limits: ModelLimits, data: bytes, tenant: str, effort: Effort
) -> Plan:
    request = parse_chat(data)
    check_model(request.model, service.model)
    salt = _salt(tenant, request.cache_salt)
    seed = secrets.randbits(63)
    return plan_chat(request, service.tokenizer, limits, seed=seed, salt=salt, effort=effort)


def _salt(tenant: str, asked: str | None) -> str:
    """Holders of different keys never share cached prefixes, whatever salt they send."""
    return f"{tenant}/{asked or ''}" if tenant else asked or ""


async def _plan(
    planner: Planner, service: Service, limits: ModelLimits, data: bytes, tenant: str
) -> Plan:
    """At once if that is quick, else in a thread, so that no stream waits for it."""
    if len(data) <= LONG_BODY_BYTES:
        with contextlib.suppress(TooMuchEffort):
            return planner(service, limits, data, tenant, AT_ONCE)
    return await asyncio.to_thread(planner, service, limits, data, tenant, ASIDE)


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
        plan = await _plan(planner, service, limits, data, tenant)
        num_refused = len(plan.specs)
        generations = client.generate(plan.specs, began=began)
    except Exception as error:
        client.counts.turn_away(outcome_of(error), num_refused)
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
            data = b"".join([event_of(encode_json(chunk)) for chunk in chunks])
            await exchange.write(data, more=True)
    if generations.cancelled:
        raise ClientGone
    last = b""
    if plan.include_usage:
        last = event_of(encode_json(answer.usage_event(generations.num_cached)))
    await exchange.write(last + event_of(b"[DONE]"), more=False)
