"""From settings to bound deployments: `serve run deployments.app:build_app tp_size=2 ...`."""

from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from deployments.config import ServiceConfig
from deployments.driver import STOP_S, Driver
from deployments.ingress import Ingress


def build_app(args: Mapping[str, Any]) -> Application:
    """Serve calls this with the `args` of the application's config."""
    return build_app_from(ServiceConfig.from_args(args))


def build_app_from(config: ServiceConfig) -> Application:
    """The two deployments: a stateless HTTP front and the driver of one engine."""
    ingress = Ingress.options(
        num_replicas=config.service.num_ingress,
        max_ongoing_requests=config.service.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.service.drain_s,
    )
    driver = Driver.options(graceful_shutdown_timeout_s=config.service.drain_s + STOP_S)
    return ingress.bind(config, driver.bind(config))
