"""Renders the chart with real Helm and checks what comes out, without a cluster.

    .helm-venv/bin/python tests/helm/render.py CHART < cases.jsonl

Each line in is `{"name": ..., "values": {...}, "check": true}`. Each line out is `{"name",
"documents", "hooks", "notes", "problems"}`, or `{"name", "refused"}` with Helm's reason; without
`check`, which takes most of the time, nothing is looked for problems.

helm-sdkpy installs only, it has no dry run: so it installs into a stand-in for the Kubernetes API
on the loopback address, and the release is read back from the Secret in which Helm records it.
"""

import asyncio
import base64
import gzip
import json
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import helm_sdkpy
import jsonschema
import kubernetes_validate
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ray_schema import SCHEMAS

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KUBERNETES = "1.32.0"
RESOURCES = {
    "v1": "ConfigMap Pod Secret Service ServiceAccount",
    "networking.k8s.io/v1": "Ingress NetworkPolicy",
    "policy/v1": "PodDisruptionBudget",
    "ray.io/v1": "RayJob RayService",
    "monitoring.coreos.com/v1": "PodMonitor PrometheusRule",
    "gateway.networking.k8s.io/v1": "HTTPRoute",
}
"""What the stand-in says it knows: what the chart may emit."""

Json = dict[str, Any]


def plural(kind: str) -> str:
    low = kind.lower()
    if low.endswith("y"):
        return low[:-1] + "ies"
    return low + ("es" if low.endswith("s") else "s")


class FakeApi(ThreadingHTTPServer):
    """Says what it knows, has nothing, and takes everything it is given."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.written: list[bytes] = []
        self.pages = dict(discovery())
        self.lists = {plural(kind) for kinds in RESOURCES.values() for kind in kinds.split()}
        threading.Thread(target=self.serve_forever, daemon=True).start()


def discovery() -> Any:
    yield "/version", {"major": "1", "minor": "32", "gitVersion": f"v{KUBERNETES}"}
    yield "/api", {"kind": "APIVersions", "versions": ["v1"]}
    groups = []
    for version, kinds in RESOURCES.items():
        group, _, short = version.rpartition("/")
        yield (
            f"/apis/{version}" if group else f"/api/{version}",
            {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": version,
                "resources": [
                    {
                        "name": plural(kind),
                        "singularName": kind.lower(),
                        "namespaced": True,
                        "kind": kind,
                        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                    }
                    for kind in kinds.split()
                ],
            },
        )
        if group:
            named = {"groupVersion": version, "version": short}
            groups.append({"name": group, "versions": [named], "preferredVersion": named})
    yield "/apis", {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True  # an answer's second packet waits 40 ms for the first's ack
    server: FakeApi

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        page = self.server.pages.get(path)
        if page is None and path.rpartition("/")[2] in self.server.lists:
            page = {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []}
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound"}
        body = json.dumps(page or {**missing, "code": 404}).encode()
        self._send(200 if page else 404, "application/json", body)

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.written.append(body)
        code = 201 if self.command == "POST" else 200
        self._send(code, self.headers.get("Content-Type", "application/json"), body)

    do_POST = do_PUT = do_PATCH = _take

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def release(written: list[bytes]) -> Json:
    """Helm's record: gzipped JSON in base64, in a Secret that is JSON or protobuf."""
    record = next(body for body in written if b"sh.helm.release.v1" in body)
    if record.startswith(b"k8s\0"):
        found = re.search(rb"H4sI[A-Za-z0-9+/=]+", record)
        assert found is not None, "Helm keeps its releases in another way than it did"
        packed = found[0]
    else:
        packed = base64.b64decode(json.loads(record)["data"]["release"])
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def documents(text: str) -> list[Json]:
    return [each for each in yaml.load_all(text, Loader) if each]


def pods(document: Json) -> list[Json]:
    """Pod templates inside a Ray object, as pods."""
    spec = document["spec"]
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or {}
    groups = [cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", [])]
    found = [group["template"] for group in groups if group]
    if "submitterPodTemplate" in spec:
        found.append(spec["submitterPodTemplate"])
    named = {"name": document["metadata"]["name"]}
    return [
        {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": named | pod.get("metadata", {})}
        for pod in found
    ]


def problems(document: Json) -> list[str]:
    kind = document["apiVersion"], document["kind"]
    name = f"{kind[1]} {document['metadata']['name']}"
    if kind not in SCHEMAS:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{name}: {list(error.path)}: {error.message[:300]}"]
        return []
    found = [
        f"{name}: {error.json_path}: {error.message[:300]}"
        for error in jsonschema.Draft202012Validator(SCHEMAS[kind]).iter_errors(document)
    ]
    if document["apiVersion"] == "ray.io/v1" and not found:
        found += [each for pod in pods(document) for each in problems(pod)]
    return found


def render(chart: str, case: Json, api: FakeApi, kubeconfig: str) -> Json:
    api.written.clear()
    configuration = helm_sdkpy.Configuration(namespace="default", kubeconfig=kubeconfig)
    install = helm_sdkpy.actions.Install(configuration)
    try:
        asyncio.run(install.run("rel", chart, values=case["values"], wait=False, timeout=10))
    except Exception as error:
        return {"refused": str(error)}
    record = release(api.written)
    manifest = documents(record["manifest"])
    hooks = [each for hook in record.get("hooks") or [] for each in documents(hook["manifest"])]
    checked = (*manifest, *hooks) if case.get("check") else ()
    return {
        "documents": manifest,
        "hooks": hooks,
        "notes": record["info"].get("notes", ""),
        "problems": [problem for each in checked for problem in problems(each)],
    }


def main() -> None:
    api = FakeApi()
    url = f"http://127.0.0.1:{api.server_address[1]}"
    with tempfile.TemporaryDirectory() as folder:
        kubeconfig = Path(folder, "kubeconfig")
        kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [{"name": "fake", "cluster": {"server": url}}],
                    "users": [{"name": "fake", "user": {}}],
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                }
            )
        )
        for line in sys.stdin:
            case = json.loads(line)
            done = render(sys.argv[1], case, api, str(kubeconfig))
            print(json.dumps({"name": case["name"], **done}), flush=True)


if __name__ == "__main__":
    main()
