"""The driver as a Serve deployment: one replica, one engine, on the node where Serve puts it.

Thin: it builds an `Engine` over a `RayFleet`, returns from its constructor when all ranks serve,
tells ingresses where to connect, and answers Serve's health check from a flag. Tokens never pass
through Serve or Ray.
"""

import ray
from ray import serve

from deployments.config import ServiceConfig
from deployments.engine import Engine, EngineFailed
from deployments.logs import configure_logs
from deployments.messages import EngineInfo
from deployments.metrics import MetricsServer
from deployments.ray_fleet import RayFleet
from workers.protocol import Hello


def show(sentence: str) -> None:
    """A line for whoever watches the service start; Ray carries it to the launching terminal."""
    print(f"lockstep: {sentence}", flush=True)


STOP_S = 30.0
"""Serve kills a driver that has not ended so long after its requests could have."""


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=1000,
    health_check_period_s=1,
    health_check_timeout_s=10,
    max_constructor_retry_count=1,
    graceful_shutdown_timeout_s=STOP_S,
)
class Driver:
    def __init__(self, config: ServiceConfig) -> None:
        configure_logs(config.service.log_format)
        self._drain_s = config.service.drain_s
        context = ray.get_runtime_context()
        self._engine = Engine(
            config.engine,
            RayFleet(cluster_wait_s=config.service.cluster_wait_s, progress=show),
            node_ip=ray.util.get_node_ip_address(),
            node_id=context.get_node_id(),
            listen_tcp=True,
            on_progress=show,
        )
        self._engine.start()
        try:
            self._engine.wait_ready()
        except EngineFailed:
            self._engine.stop()
            raise
        self._metrics = MetricsServer(self._engine, config.service)

    async def endpoint(self) -> EngineInfo:
        """Where to connect; ingresses ask at start and after a silence."""
        return self._engine.info()

    async def ranks(self) -> list[Hello]:
        """Where every rank runs: node, process, device."""
        return self._engine.ranks()

    async def num_in_flight(self) -> int:
        """Generations that have not ended."""
        return self._engine.num_in_flight

    async def drain(self, limit_s: float) -> None:
        """Before it is deleted: nothing new from now on, and what runs has `limit_s`."""
        self._engine.drain(limit_s)

    async def metrics_address(self) -> str:
        """host:port of /metrics; empty if it is off."""
        return self._metrics.address

    def check_health(self) -> None:
        """Called by Serve every second: reads a flag, does no collective and no actor call."""
        health = self._engine.health()
        if health.hopeless:
            raise EngineFailed(f"the engine has given up: {health.reason}")

    def __del__(self) -> None:
        """Serve calls this when the replica is told to go, and waits for it.

        Ingresses are told at the same time, and wait for what they have begun: so must we. Every
        rank ends with the engine.
        """
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.drain(self._drain_s)
            engine.wait_drained()
            engine.stop()
