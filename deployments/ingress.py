"""The HTTP front as a Serve deployment; `deployments.routes` has what it answers."""

from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

import workers.bundled
from deployments.api_keys import read_keys
from deployments.config import ServiceConfig
from deployments.driver_client import DriverClient
from deployments.exchange import ASGIApp
from deployments.logs import configure_logs
from deployments.messages import EngineInfo
from deployments.routes import build_api
from deployments.service import Service
from deployments.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from deployments.traces import Traces


def _traces(endpoint: str, name: str) -> "Traces | None":
    if not endpoint:
        return None
    from deployments.traces import Traces  # OpenTelemetry is an extra

    return Traces(endpoint, instance=name)


ON_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""The front answers from its replica's own event loop. It never holds a loop up for long, and with
a thread of its own, which is Serve's default, every chunk goes from one loop to the other: that
took 13 of 45 microseconds of CPU a token."""


# Serve's access log would be a line a request on the launching terminal; /metrics counts them.
@serve.deployment(
    max_ongoing_requests=4096,
    health_check_period_s=1,
    logging_config={"enable_access_log": False},
    ray_actor_options={"runtime_env": {"env_vars": ON_ONE_LOOP}},
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
            allowed_hosts=config.service.allowed_hosts,
            api_keys=(*config.service.api_keys, *read_keys(config.service.api_keys_file)),
            traces=_traces(config.service.otlp_endpoint, name),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls this in the replica, after the constructor."""
        return build_api(self._service, names_requests=False)
