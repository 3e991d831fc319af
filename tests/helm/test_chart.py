"""The chart, rendered by real Helm: what it makes is valid, safe, and says no with a sentence."""

import copy
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments import cli
from deployments.config import ServiceConfig, ServiceSettings, fields
from deployments.driver import Driver
from deployments.ingress import Ingress
from tests.helm.cases import EVERYTHING, REFUSED, VALID, Values
from tests.helm.environment import BIN, CHART, ROOT, NoEnvironment, prepare, render
from tests.helm.ray_schema import SCHEMAS
from workers.config import RAY_SETTINGS, EngineConfig

pytestmark = pytest.mark.timeout(900)

Json = dict[str, Any]
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


# -- rendering: all cases in one call --------------------------------------------------------------


@pytest.fixture(scope="session")
def rendered() -> dict[str, Json]:
    """What Helm makes of every case, of every case less one value, and of a broken one."""
    try:
        python = prepare()
    except NoEnvironment as reason:
        pytest.skip(str(reason))
    cases = {**VALID, **{name: values for name, (values, _) in REFUSED.items()}}
    for path in leaves(SCHEMA):
        for name in cases_with(path):
            cases[f"{name} less {'.'.join(path)}"] = without(values_of(name), path)
    cases["a broken pod"] = {"extraEnv": [{"name": "A", "valeu": "b"}]}
    return render(python, cases, checked=[*VALID, "a broken pod"])


def leaves(schema: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the values that the schema knows."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if "properties" not in schema:
        yield path
    for name, below in schema.get("properties", {}).items():
        if name != "global":  # Helm's own, for charts inside charts
            yield from leaves(below, (*path, name))


def get(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return None
        values = values[name]
    return values


def without(values: Values, path: tuple[str, ...]) -> Values:
    less = copy.deepcopy(values)
    del get(less, path[:-1])[path[-1]]
    return less


def values_of(name: str) -> Values:
    return VALID[name] if name in VALID else REFUSED[name][0]


def cases_with(path: tuple[str, ...]) -> list[str]:
    """A case that gives a value that is not its default, and one that is refused for it."""
    default = get(DEFAULTS, path)
    given = {name: get(values_of(name), path) for name in (*VALID, *REFUSED)}
    given = {name: value for name, value in given.items() if value is not None}
    valid = [name for name in given if name in VALID]
    best = [name for name in valid if given[name] != default] or valid
    refused = [name for name in given if name in REFUSED and path == ("worker", "gpusPerHost")]
    return best[:1] + refused[:1]


def of_kind(answer: Json, kind: str) -> Json:
    found = [each for each in answer["documents"] if each["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of {kind}"
    return found[0]


def clusters(answer: Json) -> list[Json]:
    return [
        each["spec"].get("rayClusterConfig") or each["spec"]["rayClusterSpec"]
        for each in answer["documents"]
        if each["apiVersion"] == "ray.io/v1"
    ]


def serving(answer: Json) -> Json:
    return of_kind(answer, "RayService")["spec"]["rayClusterConfig"]


def ray_pods(cluster: Json) -> list[Json]:
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups]


def pods(answer: Json) -> list[Json]:
    """Every pod that a release makes: Ray's, the submitter's, the test's."""
    found = [pod for cluster in clusters(answer) for pod in ray_pods(cluster)]
    for each in answer["documents"]:
        if each["kind"] == "RayJob":
            found.append(each["spec"]["submitterPodTemplate"])
    return found + [hook for hook in answer["hooks"] if hook["kind"] == "Pod"]


def worker(answer: Json) -> Json:
    return serving(answer)["workerGroupSpecs"][0]


def serve_config(answer: Json) -> Json:
    return yaml.safe_load(of_kind(answer, "RayService")["spec"]["serveConfigV2"])


# -- what is valid, what is refused ----------------------------------------------------------------


@pytest.mark.row("C2")
@pytest.mark.parametrize("name", VALID)
def test_documents_fit_the_schemas_of_their_kinds(rendered, name):
    assert rendered[name].get("refused") is None
    assert rendered[name]["problems"] == []


def test_a_misspelt_field_of_a_pod_is_found(rendered):
    assert any("valeu" in problem for problem in rendered["a broken pod"]["problems"])


def test_a_misspelt_field_of_a_ray_object_is_found(rendered):
    service = copy.deepcopy(of_kind(rendered["default"], "RayService"))
    check = jsonschema.Draft202012Validator(SCHEMAS["ray.io/v1", "RayService"])
    assert check.is_valid(service)
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["numOfHostz"] = group.pop("numOfHosts")
    assert not check.is_valid(service)


@pytest.mark.row("C2")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_sentence(rendered, name):
    assert REFUSED[name][1] in rendered[name].get("refused", "nothing was refused")


def test_everything_makes_every_kind(rendered):
    kinds = {each["kind"] for each in rendered["everything"]["documents"]}
    assert kinds == {
        "RayService",
        "RayJob",
        "ServiceAccount",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Ingress",
        "HTTPRoute",
        "PodMonitor",
        "PrometheusRule",
        "ConfigMap",
    }


def test_by_default_nothing_needs_more_than_kuberay(rendered):
    groups = {each["apiVersion"] for each in rendered["default"]["documents"]}
    assert groups == {"v1", "ray.io/v1", "policy/v1", "networking.k8s.io/v1"}


# -- values and their schema -----------------------------------------------------------------------


def test_every_default_is_in_the_schema():
    known = set(leaves(SCHEMA))

    def walk(values: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if path in known or not isinstance(values, dict):
            yield path
        else:
            for name, below in values.items():
                yield from walk(below, (*path, name))

    assert set(walk(DEFAULTS, ())) <= known


def test_objects_of_the_schema_are_closed():
    def walk(schema: Any) -> Iterator[Json]:
        if isinstance(schema, dict):
            if "properties" in schema and isinstance(schema["properties"], dict):
                yield schema
            for below in schema.values():
                yield from walk(below)

    open_ones = [each for each in walk(SCHEMA) if each.get("additionalProperties") is not False]
    assert open_ones == []


@pytest.mark.parametrize("path", list(leaves(SCHEMA)), ids=".".join)
def test_every_value_changes_something(rendered, path):
    """Each value is given in a case, and taking it away changes what is rendered."""
    names = cases_with(path)
    assert names, f"no case gives {'.'.join(path)} a value: add it to EVERYTHING"
    changed = [
        name
        for name in names
        if outcome(rendered[name]) != outcome(rendered[f"{name} less {'.'.join(path)}"])
    ]
    assert changed, f"{'.'.join(path)} changes nothing in {names}"


def outcome(answer: Json) -> Json:
    return {key: value for key, value in answer.items() if key != "name"}


def chart_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helm_readme", CHART / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    stale = [
        path.name for path, text in chart_script().written().items() if path.read_text() != text
    ]
    assert stale == [], "run `python helm/readme.py`"


# -- the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in VALID if values_of(n).get("service") is None])
def test_serve_and_the_engine_accept_the_config(rendered, name):
    config = serve_config(rendered[name])
    application = ServeDeploySchema.model_validate(config).applications[0]
    assert application.import_path == "deployments.app:build_app"
    assert {each.name for each in application.deployments} <= {Ingress.name, Driver.name}
    engine = ServiceConfig.from_args(known(application.args)).engine
    assert engine.num_nodes == worker(rendered[name])["numOfHosts"]


def known(args: Mapping[str, Any]) -> Json:
    """Settings without the one that this version of the service may not have yet."""
    late = {"api_keys_file"} - set(fields(ServiceSettings))
    return {name: value for name, value in args.items() if name not in late}


def test_only_settings_that_are_given_are_passed_on(rendered):
    args = serve_config(rendered["default"])["applications"][0]["args"]
    given = {name for name, value in DEFAULTS["engine"].items() if value is not None}
    assert set(args) == given - {"model"}
    assert serve_config(rendered["everything"])["applications"][0]["args"] == {
        **EVERYTHING["engine"],
        "api_keys_file": "/etc/lockstep/api-keys",
        "allowed_hosts": ["llm.example", "llama-serve-svc"],
    }


@pytest.mark.row("C2")
@pytest.mark.parametrize(
    ("name", "hosts", "gpus"),
    [
        ("default", 1, "1"),
        ("cpu", 1, None),
        ("four GPUs", 1, "4"),
        ("several hosts", 2, "8"),
        ("everything", 2, "4"),
    ],
)
def test_hosts_and_gpus_follow_from_the_engine(rendered, name, hosts, gpus):
    group = worker(rendered[name])
    resource = "example.com/gpu" if name == "everything" else "nvidia.com/gpu"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["numOfHosts"], limits.get(resource)) == (hosts, gpus)
    assert limits["memory"]


@pytest.mark.skipif(
    "enable_dp_attention" not in fields(EngineConfig),
    reason="enable_dp_attention is no setting yet",
)
def test_dp_attention_needs_tp_size_ranks(rendered):
    limits = worker(rendered["DP attention"])["template"]["spec"]["containers"][0]["resources"]
    assert limits["limits"]["nvidia.com/gpu"] == "4"


@pytest.mark.parametrize("name", VALID)
def test_ray_places_all_ranks_on_workers_and_nothing_on_the_head(rendered, name):
    for cluster in clusters(rendered[name]):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["headGroupSpec"]["rayStartParams"]["ray-client-server-port"] == "0"
        for group in cluster.get("workerGroupSpecs", []):
            gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
                "nvidia.com/gpu", "0"
            )
            assert int(group["rayStartParams"]["num-cpus"]) >= int(gpus) + 2


def test_every_host_has_an_ingress(rendered):
    """The Serve service sends requests to every ready worker."""
    application = serve_config(rendered["several hosts"])["applications"][0]
    assert application["args"]["num_ingress"] == 2
    assert application["deployments"] == [{"name": "Ingress", "max_replicas_per_node": 1}]
    assert serve_config(rendered["everything"])["applications"][0]["deployments"] == [
        {"name": "Ingress", "max_replicas_per_node": 2}
    ]
    assert "deployments" not in serve_config(rendered["default"])["applications"][0]


def test_hosts_are_spread_over_nodes(rendered):
    spread = worker(rendered["several hosts"])["template"]["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname"]
    assert spread[0]["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "worker"
    assert "topologySpreadConstraints" not in worker(rendered["default"])["template"]["spec"]


@pytest.mark.parametrize("name", VALID)
def test_every_ray_container_has_rays_settings(rendered, name):
    mode = values_of(name).get("rayAuth", {}).get("mode", "token")
    for cluster in clusters(rendered[name]):
        assert cluster["authOptions"]["mode"] == mode
    for pod in pods(rendered[name]):
        container = pod["spec"]["containers"][0]
        if not container["name"].startswith("ray-"):
            continue
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert env.items() >= {**RAY_SETTINGS, "RAY_AUTH_MODE": mode, "PYTHONPATH": "/app"}.items()


def batch_arguments(entrypoint: str) -> Json:
    """What the command line makes of a batch's entry point."""
    words = entrypoint.split()
    assert words[:3] == ["python", "-m", "deployments.batch"]
    known, unknown = cli._parser().parse_known_args(["batch", *words[3:]])
    assert unknown == []
    return vars(known)


def test_a_batch_runs_where_the_gpus_are_or_asks_a_service(rendered):
    own = of_kind(rendered["everything"], "RayJob")["spec"]
    args = batch_arguments(own["entrypoint"])
    files = args["input"], args["output"], args["errors"]
    assert files == ("/data/in.jsonl", "/data/out.jsonl", "/data/errors.jsonl")
    assert args["concurrency"] == 64
    given = {name: args[name] for name in (*fields(EngineConfig), "cluster_wait_s")}
    wanted = {name: EVERYTHING["engine"][name] for name in given}
    assert ServiceConfig.from_args(given) == ServiceConfig.from_args(wanted)
    assert own["entrypointNumCpus"] == 1
    asks = of_kind(rendered["batch of a service"], "RayJob")["spec"]
    assert batch_arguments(asks["entrypoint"]) == {
        "command": "batch",
        "input": "/data/in.jsonl",
        "output": "/data/out.jsonl",
        "url": "http://rel-lockstep-serve-svc:8000",
        "api_key_file": "/etc/lockstep-batch/api-key",
    }
    head = ray_pods(asks["rayClusterSpec"])[0]["spec"]
    key = next(each for each in head["volumes"] if each["name"] == "batch-key")
    assert key["secret"]["items"] == [{"key": "key", "path": "api-key"}]
    assert "workerGroupSpecs" not in asks["rayClusterSpec"]
    assert "entrypointNumCpus" not in asks


def test_where_the_model_comes_from(rendered):
    def volume(name: str) -> Json:
        spec = worker(rendered[name])["template"]["spec"]
        mount = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "model"]
        assert mount[0]["readOnly"] is True
        return next(each for each in spec["volumes"] if each["name"] == "model")

    def model(name: str) -> str | None:
        return serve_config(rendered[name])["applications"][0]["args"].get("model")

    assert volume("everything")["persistentVolumeClaim"]["claimName"] == "models"
    assert volume("model of a host")["hostPath"]["path"] == "/mnt/models"
    assert volume("model of an image")["emptyDir"] == {"sizeLimit": "20Gi"}
    copier = worker(rendered["model of an image"])["template"]["spec"]["initContainers"][0]
    assert copier["image"] == "models/llama:1"
    assert [model(n) for n in ("default", "model of an image", "everything")] == [
        None,
        "/models",
        "/weights/llama",
    ]


# -- Pod Security "restricted", and a little more --------------------------------------------------

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(spec: Json) -> set[str]:
    """Names of the rules that a pod breaks: those of "restricted", then ours."""
    broken = set()
    security = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            broken.add(name)
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= VOLUMES:
            broken.add("volumes")
    if security.get("sysctls"):
        broken.add("sysctls")
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        own = container.get("securityContext", {})
        both = {**security, **own}
        capabilities = own.get("capabilities", {})
        rules = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type")
            in ("RuntimeDefault", "Localhost"),
            "drop": capabilities.get("drop") == ["ALL"],
            "add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "procMount": own.get("procMount", "Default") == "Default",
            "seLinuxOptions": not both.get("seLinuxOptions"),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
            "limits": "memory" in container.get("resources", {}).get("limits", {}),
        }
        broken |= {name for name, holds in rules.items() if not holds}
    if spec.get("automountServiceAccountToken") is not False:
        broken.add("automountServiceAccountToken")
    return broken


ASKED_FOR = {
    "rdma": {"add"},
    "everything": {"add"},
    "host network": {"add", "hostNetwork"},
    "model of a host": {"volumes"},
}
"""Cases that switch something on which "restricted" does not allow; of the workers only."""


@pytest.mark.row("C2")
@pytest.mark.parametrize("name", VALID)
def test_pods_are_restricted(rendered, name):
    for pod in pods(rendered[name]):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        expected = ASKED_FOR.get(name, set()) if component.endswith("worker") else set()
        assert violations(pod["spec"]) == expected, component


def own(pod: Json) -> Json:
    return pod["containers"][0]["securityContext"]


BREAKS: dict[str, Callable[[Json], Any]] = {
    **{n: lambda p, n=n: p.update({n: True}) for n in ("hostNetwork", "hostPID", "hostIPC")},
    "volumes": lambda p: p["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "sysctls": lambda p: p["securityContext"].update(sysctls=[{"name": "a", "value": "b"}]),
    "privileged": lambda p: own(p).update(privileged=True),
    "allowPrivilegeEscalation": lambda p: own(p).pop("allowPrivilegeEscalation"),
    "runAsNonRoot": lambda p: own(p).update(runAsNonRoot=False),
    "runAsUser": lambda p: p["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda p: p["securityContext"].pop("seccompProfile"),
    "drop": lambda p: own(p).pop("capabilities"),
    "add": lambda p: own(p)["capabilities"].update(add=["SYS_ADMIN"]),
    "hostPort": lambda p: p["containers"][0]["ports"][0].update(hostPort=1),
    "procMount": lambda p: own(p).update(procMount="Unmasked"),
    "seLinuxOptions": lambda p: own(p).update(seLinuxOptions={"type": "spc_t"}),
    "readOnlyRootFilesystem": lambda p: own(p).pop("readOnlyRootFilesystem"),
    "limits": lambda p: p["containers"][0]["resources"].pop("limits"),
    "automountServiceAccountToken": lambda p: p.pop("automountServiceAccountToken"),
}
"""How a pod comes to break each rule."""


def test_every_rule_has_a_way_to_break_it():
    everything_wrong = {"volumes": [{"hostPath": {}}], "containers": [{}]}
    assert violations(everything_wrong) < BREAKS.keys()


@pytest.mark.parametrize("rule", BREAKS)
def test_each_rule_is_noticed_when_broken(rendered, rule):
    pod = copy.deepcopy(pods(rendered["default"])[0]["spec"])
    assert violations(pod) == set()
    BREAKS[rule](pod)
    assert violations(pod) == {rule}


@pytest.mark.parametrize("name", VALID)
def test_ray_has_folders_to_write_to(rendered, name):
    for cluster in clusters(rendered[name]):
        for pod in ray_pods(cluster):
            volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
            mounts = pod["spec"]["containers"][0]["volumeMounts"]
            writable = {m["mountPath"] for m in mounts if "emptyDir" in volumes[m["name"]]}
            assert writable >= {"/tmp", "/dev/shm", "/home/lockstep"}
            shm = volumes["shm"]["emptyDir"]
            assert shm["medium"] == "Memory"
            assert shm["sizeLimit"]


def test_rdma_gives_workers_devices_and_locked_memory(rendered):
    head, gpu = (pod["spec"]["containers"][0] for pod in ray_pods(serving(rendered["rdma"])))
    assert gpu["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert gpu["resources"]["limits"]["rdma/hca"] == "8"
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in gpu["env"]
    assert "add" not in head["securityContext"]["capabilities"]
    assert "rdma/hca" not in head["resources"]["limits"]
    spec = worker(rendered["host network"])["template"]["spec"]
    assert spec["dnsPolicy"] == "ClusterFirstWithHostNet"


# -- who may reach what ----------------------------------------------------------------------------


def ports(rule: Json) -> set[int] | None:
    return {each["port"] for each in rule["ports"]} if "ports" in rule else None


def test_the_network_policy_names_all_that_is_open(rendered):
    spec = of_kind(rendered["default"], "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    ours = {"app.kubernetes.io/instance": "rel", "app.kubernetes.io/part-of": "lockstep"}
    assert spec["podSelector"]["matchLabels"] == ours
    among, operator, clients = spec["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert ports(operator) == {8265, 8000}
    assert operator["from"] == DEFAULTS["networkPolicy"]["operator"]
    assert clients["from"] == [{"podSelector": {}}]
    assert ports(clients) == {8000}
    to_ours, dns = spec["egress"]
    assert to_ours == {"to": [{"podSelector": {"matchLabels": ours}}]}
    assert "to" not in dns
    assert {(each["protocol"], each["port"]) for each in dns["ports"]} == {("UDP", 53), ("TCP", 53)}


def test_the_network_policy_opens_what_is_switched_on(rendered):
    spec = of_kind(rendered["everything"], "NetworkPolicy")["spec"]
    assert [ports(rule) for rule in spec["ingress"]] == [None, {8265, 8080}, {8080}, {9500, 8080}]
    assert [ports(rule) for rule in spec["egress"]] == [None, {53}, {6380}, {443}, None]
    to_collector = of_kind(rendered["four GPUs"], "NetworkPolicy")["spec"]["egress"]
    assert [ports(rule) for rule in to_collector] == [None, {53}, {4318}]
    assert all("from" in rule for rule in spec["ingress"])
    alone = of_kind(rendered["batch alone"], "NetworkPolicy")["spec"]
    assert len(alone["ingress"]) == 2


@pytest.mark.parametrize("name", VALID)
def test_the_network_policy_and_budgets_cover_every_pod(rendered, name):
    answer = rendered[name]
    for each in answer["documents"]:
        if each["kind"] == "NetworkPolicy":
            wanted = each["spec"]["podSelector"]["matchLabels"].items()
            assert all(wanted <= pod["metadata"]["labels"].items() for pod in pods(answer))
        if each["kind"] == "PodDisruptionBudget":
            wanted = each["spec"]["selector"]["matchLabels"].items()
            matched = [pod for pod in pods(answer) if wanted <= pod["metadata"]["labels"].items()]
            assert len(matched) == 1
            hosts = worker(answer)["numOfHosts"] if each["metadata"]["name"].endswith("r") else 1
            assert each["spec"]["minAvailable"] == hosts


def test_only_the_serve_port_is_published(rendered):
    answer = rendered["everything"]
    path = of_kind(answer, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]
    service = of_kind(answer, "RayService")["metadata"]["name"] + "-serve-svc"
    assert path["backend"] == {"service": {"name": service, "port": {"number": 8080}}}
    backends = of_kind(answer, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert backends == [{"name": service, "port": 8080}]
    assert not [each for each in answer["documents"] if each["kind"] == "Service"]


def test_secrets_are_named_and_never_shown(rendered):
    answer = rendered["everything"]
    assert not [each for each in answer["documents"] if each["kind"] == "Secret"]
    cluster = serving(answer)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    redis = cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert redis == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    for pod in [*ray_pods(cluster), answer["hooks"][0]]:
        volume = next(each for each in pod["spec"]["volumes"] if each["name"] == "api-keys")
        assert volume["secret"]["secretName"] == "api"
        assert volume["secret"]["items"] == [{"key": "keys", "path": "api-keys"}]
    assert "api_keys" not in serve_config(answer)["applications"][0]["args"]


# -- health, and going away ------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALID)
def test_pods_have_longer_to_end_than_requests(rendered, name):
    drain_s = {**DEFAULTS["engine"], **values_of(name).get("engine", {})}["drain_s"]
    for cluster in clusters(rendered[name]):
        for pod in ray_pods(cluster):
            assert pod["spec"]["terminationGracePeriodSeconds"] >= drain_s + 30
    for each in rendered[name]["documents"]:
        if each["kind"] == "RayService":
            for pod in ray_pods(each["spec"]["rayClusterConfig"]):
                stop = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
                assert stop[3] == str(drain_s)


def test_probes_ask_the_pod_itself(rendered):
    head, gpu = (pod["spec"]["containers"][0] for pod in ray_pods(serving(rendered["default"])))
    script = (CHART / "files" / "ready.sh").read_text()
    for container, probe, words in (
        (head, "livenessProbe", ["52365", "/api/healthz"]),
        (head, "readinessProbe", ["52365", "/api/healthz", ""]),
        (gpu, "livenessProbe", ["52365", "/api/local_raylet_healthz"]),
        (gpu, "readinessProbe", ["52365", "/api/local_raylet_healthz", "8000"]),
    ):
        command = container[probe]["exec"]["command"]
        assert command == ["bash", "-c", script, "ready.sh", *words]
    assert {"name": "serve", "containerPort": 8000} in gpu["ports"]


@contextmanager
def web(pages: Mapping[str, tuple[int, str]]) -> Iterator[int]:
    """A server of fixed pages; its port."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages.get(self.path, (404, ""))
            if self.headers.get("Authorization") == "Bearer none":
                status = 401
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CLOSED = 1
"""A port where nothing listens."""


@pytest.mark.parametrize(
    ("agent", "serve", "ready"),
    [
        (200, 200, True),
        (200, 503, False),
        (503, 200, False),
        (200, None, True),  # no proxy on this pod
        (None, 200, False),  # Ray is not there
        (200, "not asked", True),
    ],
)
def test_readiness(agent, serve, ready):
    pages: list[Mapping[str, tuple[int, str]]] = [
        {"/healthz": (status, "")} if isinstance(status, int) else {} for status in (agent, serve)
    ]
    pages[1] = {"/readyz": pages[1].get("/healthz", (500, ""))}
    with web(pages[0]) as agent_port, web(pages[1]) as serve_port:
        words = [
            str(agent_port if agent else CLOSED),
            "/healthz",
            "" if serve == "not asked" else str(serve_port if serve else CLOSED),
        ]
        done = subprocess.run(
            ["bash", "-c", (CHART / "files" / "ready.sh").read_text(), "ready.sh", *words],
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert (done.returncode == 0) == ready, done.stdout + done.stderr
    assert ready or done.stdout.strip(), "a pod that is not ready says why"


def test_a_pod_waits_for_running_requests_but_not_for_ever():
    script = (CHART / "files" / "drain.py").read_text()

    def drain(seconds: str, in_flight: int | None) -> float:
        text = f"# HELP x\nlockstep_requests_in_flight {in_flight}.0\nlockstep_ready 1.0\n"
        with web({"/metrics": (200, text)}) as port:
            began = time.monotonic()
            words = [seconds, str(CLOSED if in_flight is None else port)]
            subprocess.run([sys.executable, "-c", script, *words], check=True, timeout=280)
            return time.monotonic() - began

    with ThreadPoolExecutor() as pool:
        busy, elsewhere, idle = pool.map(drain, ("6.5", "1", "60"), (3, None, 0))
    assert busy >= 6.5
    assert elsewhere >= 1
    assert 5 <= idle < 55


def test_the_charts_own_test_asks_for_models():
    script = (CHART / "files" / "ask_models.py").read_text()

    def ask(pages: Mapping[str, tuple[int, str]]) -> subprocess.CompletedProcess[str]:
        with web(pages) as port:
            return subprocess.run(
                [sys.executable, "-c", script, f"http://127.0.0.1:{port}"],
                capture_output=True,
                text=True,
                timeout=280,
            )

    models = (200, '{"data": [{"id": "llama"}]}')
    assert ask({"/readyz": (200, ""), "/v1/models": models}).stdout == "serves llama\n"
    assert "/readyz answered 503" in ask({"/readyz": (503, ""), "/v1/models": models}).stderr
    assert "/v1/models answered 401" in ask({"/readyz": (200, ""), "/v1/models": (401, "")}).stderr


# -- monitoring ------------------------------------------------------------------------------------


def test_monitoring_finds_the_pods_and_carries_our_files(rendered):
    answer = rendered["everything"]
    monitor = of_kind(answer, "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"]["ray.io/is-ray-node"] == "yes"
    for pod in ray_pods(serving(answer)):
        named = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= named
    dashboard = json.loads(of_kind(answer, "ConfigMap")["data"]["lockstep.json"])
    assert dashboard == json.loads((CHART / "dashboards" / "lockstep.json").read_text())
    rules = yaml.safe_load((CHART / "alerts" / "lockstep.yaml").read_text())
    assert of_kind(answer, "PrometheusRule")["spec"] == rules


# -- the notes, the examples, the image ------------------------------------------------------------


def test_the_notes_say_what_to_do_next(rendered):
    notes = rendered["everything"]["notes"]
    assert "8 ranks on 2 host(s), 4 GPU(s) each" in notes
    assert "svc/llama-serve-svc 8080" in notes
    assert "https://llm.example/v1" in notes
    assert "Everybody who reaches it may use it" in rendered["default"]["notes"]


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configs_are_accepted(path: Path):
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    application = config.applications[0]
    assert application.import_path == "deployments.app:build_app"
    assert {each.name for each in application.deployments} <= {Ingress.name, Driver.name}
    made = ServiceConfig.from_args(application.args)
    assert made.service.port == config.http_options.port
    # HTTP and /metrics are open to the same machines.
    assert made.service.host == config.http_options.host


def test_there_is_an_example_of_each_size():
    assert [path.stem for path in EXAMPLES] == ["cpu", "four_gpus", "one_gpu", "two_nodes"]


def test_the_dockerfile_passes_its_linter(rendered):
    done = subprocess.run(
        [str(BIN / "hadolint"), str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout == ""
    assert done.returncode == 0


def test_both_images_are_our_packages_and_an_ordinary_user():
    text = (ROOT / "Dockerfile").read_text()
    for target in ("cpu", "gpu"):
        stage = text.split(f"FROM app AS {target}\n")[1].split("\nFROM ")[0]
        for line in ("USER 1000:1000", 'ENTRYPOINT ["lockstep"]', "HEALTHCHECK NONE"):
            assert line in stage.splitlines()
    for package in ("deployments", "workers", "parallel", "kernels"):
        assert f"COPY {package} /app/{package}\n" in text
        assert f"!{package}\n" in (ROOT / ".dockerignore").read_text()
