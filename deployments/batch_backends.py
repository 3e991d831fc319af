"""Who answers a batch: an engine of its own, or a service over HTTP.

Both take a path and a JSON body and give back a `Reply`, so a batch says nothing that the service
would not say. `OwnEngine` asks the ingress's own ASGI app, in this process, over the same line to
the driver; its ranks are under Ray if this is a Ray job, else processes of this machine.
`Service` speaks HTTP. Neither tries again: `deployments.batch` knows when to.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import ray

from deployments.config import ServiceConfig
from deployments.driver_client import DriverClient
from deployments.engine import Engine
from deployments.exchange import Message
from deployments.fleet import Fleet, LocalFleet
from deployments.logs import configure_logs
from deployments.messages import EngineInfo
from deployments.metrics import MetricsServer
from deployments.routes import build_api
from deployments.service import Service
from deployments.tokenizer import ChatTokenizer
from workers import bundled
from workers.config import ray_address

RESUME_WAIT_S = 3600.0
"""A batch has nobody waiting: it outlasts any restart of the engine."""

LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None


class NoAnswer(Exception):
    """Nobody answered; another try may fare better."""


class BackendFailed(Exception):
    """No line will be answered any more; the sentence says why."""


class Backend(Protocol):
    async def start(self) -> None:
        """Return when lines can be asked, or raise `BackendFailed`."""
        ...

    async def ask(self, path: str, body: bytes) -> Reply: ...

    async def watch(self) -> None:
        """Raise `BackendFailed` when there is no hope; else wait for ever."""
        ...

    async def close(self) -> None: ...


class OwnEngine:
    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        configure_logs(config.service.log_format)
        self._stack = contextlib.ExitStack()
        self._engine: Engine | None = None
        self._client: DriverClient | None = None

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self._start_engine)
        except BackendFailed:
            raise
        except Exception as error:  # whatever Ray or the engine says is the reason
            raise BackendFailed(str(error)) from error
        engine = self._engine
        if engine is None:
            raise BackendFailed("the engine did not start")

        async def locate() -> EngineInfo:
            return engine.info()

        folder = Path(self._config.engine.model) if self._config.engine.model else bundled.path()
        self._client = DriverClient(
            locate, name="batch", node_id=engine.node_id, resume_wait_s=RESUME_WAIT_S
        )
        tokenizer = ChatTokenizer.load(folder)
        self._app = build_api(Service(self._client, tokenizer, model=self._config.model_name))
        await self._client.start()
        while not self._client.ready:
            await asyncio.sleep(0.01)

    def _start_engine(self) -> None:
        engine = Engine(self._config.engine, self._fleet(), **self._where(), on_progress=show)
        self._engine = engine
        self._stack.callback(engine.stop)
        engine.start()
        engine.wait_ready()
        metrics = MetricsServer(engine, self._config.service)
        self._stack.callback(metrics.close)

    def _fleet(self) -> Fleet:
        if not ray.is_initialized():
            if not ray_address():
                return LocalFleet()
            ray.init(address=ray_address(), log_to_driver=False)
            self._stack.callback(ray.shutdown)
        from deployments.ray_fleet import RayFleet

        return RayFleet(cluster_wait_s=self._config.service.cluster_wait_s, progress=show)

    def _where(self) -> dict[str, Any]:
        """How ranks on other nodes find this process."""
        if not ray.is_initialized():
            return {}
        context = ray.get_runtime_context()
        return {
            "node_ip": ray.util.get_node_ip_address(),
            "node_id": context.get_node_id(),
            "listen_tcp": True,
        }

    async def ask(self, path: str, body: bytes) -> Reply:
        exchange = _Exchange(path, body)
        await self._app(exchange.scope, exchange.receive, exchange.send)
        return exchange.reply()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            health = self._engine.health() if self._engine is not None else None
            if health is not None and health.hopeless:
                raise BackendFailed(f"the engine has given up: {health.reason}")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        await asyncio.to_thread(self._stack.close)


class _Exchange:
    """One request to an ASGI app that is called, not served."""

    def __init__(self, path: str, body: bytes) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json")],
        }
        self._requests: list[Message] = [{"type": "http.request", "body": body}]
        self._status = 500
        self._headers: Mapping[bytes, bytes] = {}
        self._answer = bytearray()

    async def receive(self) -> Message:
        if self._requests:
            return self._requests.pop()
        await asyncio.get_running_loop().create_future()  # a client that stays
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], dict(message["headers"])
        else:
            self._answer += message["body"]

    def reply(self) -> Reply:
        request_id = self._headers.get(b"x-request-id", b"").decode()
        retry_after = self._headers.get(b"retry-after", b"").decode()
        return Reply(self._status, request_id, bytes(self._answer), _seconds(retry_after))


class RunningService:
    """A service that is there already, asked over HTTP."""

    def __init__(self, url: str, *, api_key: str, num_connections: int) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._num_connections = num_connections
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._num_connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )
        try:
            async with self._session.get(f"{self._url}/v1/models", headers=self._headers) as found:
                status = found.status
        except (aiohttp.ClientError, ValueError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise BackendFailed(f"no service answers at {self._url}: {reason}") from error
        if status in (401, 403):
            raise BackendFailed(f"{self._url} wants an API key: name its file with --api-key-file")
        if status >= 400 and status not in (429, 503):
            raise BackendFailed(f"{self._url}/v1/models answered {status}: is it an OpenAI API?")

    async def ask(self, path: str, body: bytes) -> Reply:
        if self._session is None:
            raise NoAnswer("not started")
        try:
            async with self._session.post(
                self._url + path, data=body, headers=self._headers
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswer(str(error) or type(error).__name__) from error
        headers = response.headers
        request_id = headers.get("x-request-id", "")
        return Reply(response.status, request_id, data, _seconds(headers.get("retry-after", "")))

    async def watch(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _seconds(retry_after: str) -> float | None:
    return float(retry_after) if retry_after.isdecimal() else None


def show(sentence: str) -> None:
    print(f"lockstep: {sentence}", flush=True)
