"""What tests have done on a node of a cluster that they cannot enter themselves.

    python -m tests.e2e.on_a_node 10.0.0.2:6379 serve '{"port": 8000, "driver_on": "head", ...}'
    python -m tests.e2e.on_a_node 10.0.0.2:6379 ask

`serve` deploys the service and both print, as JSON, where its ranks are and where it is heard.
"""

import json
import sys

import ray
from msgspec.structs import asdict
from ray import serve

from deployments.config import ServiceConfig
from deployments.driver import Driver
from deployments.ingress import Ingress

APP = "lockstep"


def deploy(port, driver_on, ingress_on, settings):
    """`driver_on` and `ingress_on` name custom resources of nodes."""
    config = ServiceConfig.from_args(settings)
    driver = Driver.options(ray_actor_options={"resources": {driver_on: 0.01}})
    ingress = Ingress.options(ray_actor_options={"resources": {ingress_on: 0.01}})
    serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": port})
    serve.run(ingress.bind(config, driver.bind(config)), name=APP, route_prefix="/")


def where():
    driver = serve.get_deployment_handle("Driver", app_name=APP)
    asked = {
        "ranks": driver.ranks.remote(),
        "metrics": driver.metrics_address.remote(),
        "endpoint": driver.endpoint.remote(),
    }
    told = {name: answer.result(timeout_s=20) for name, answer in asked.items()}
    told["ranks"] = [asdict(hello) for hello in told["ranks"]]
    told["endpoint"] = told["endpoint"].tcp_address
    return told


def main(address, verb, options="{}"):
    ray.init(address=address, log_to_driver=False, logging_level="error")
    if verb == "serve":
        deploy(**json.loads(options))
    print(json.dumps(where()))


if __name__ == "__main__":
    main(*sys.argv[1:])
