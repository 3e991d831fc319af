"""Values to render: what must be valid, and what must be refused with which words."""

from typing import Any

import msgspec

from deployments.config import ServiceSettings, fields
from workers.config import EngineConfig

Values = dict[str, Any]

IMAGE_DIGEST = "sha256:" + "0123456789abcdef" * 4


def every_setting() -> Values:
    """Each setting that the chart takes, with a value: its default, or 1 where that is unset."""
    given: Values = {}
    for kind in (EngineConfig, ServiceSettings):
        made = kind()
        for name in fields(kind):
            if name not in ("api_keys", "api_keys_file"):
                value = getattr(made, name)
                given[name] = msgspec.to_builtins(1 if value is None else value)
    return given


EVERYTHING: Values = {
    "nameOverride": "fleet",
    "fullnameOverride": "llama",
    "image": {
        "repository": "registry.example/lockstep",
        "tag": "1.2.3",
        "digest": IMAGE_DIGEST,
        "pullPolicy": "Always",
    },
    "imagePullSecrets": ["pull"],
    "serviceAccount": {"create": True, "name": "engine", "annotations": {"team": "serving"}},
    "rayVersion": "2.60.1",
    "service": {"enabled": True, "upgradeStrategy": "NewCluster"},
    "engine": {
        **every_setting(),
        "model": "/weights/llama",
        "served_model_name": "llama",
        "tp_size": 4,
        "dp_size": 2,
        "num_nodes": 2,
        "num_ingress": 4,
        "port": 8080,
        "metrics_port": 9500,
        "max_model_len": 4096,
        "max_num_seqs": 1_000_000,
        "max_num_batched_tokens": 2_000_000,
        "drain_s": 90,
        "host": "::",
        "allowed_hosts": ["llm.example"],
        "cluster_wait_s": 60,
        "otlp_endpoint": "https://collector.example/otlp",
    },
    "auth": {"enabled": True, "existingSecret": "api", "secretKey": "keys"},
    "rayAuth": {"mode": "token", "existingSecret": "ray-token"},
    "model": {
        "source": "pvc",
        "mountPath": "/weights",
        "pvc": {"claimName": "models", "subPath": "llama"},
    },
    "head": {
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "head", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "high",
    },
    "worker": {
        "gpusPerHost": 4,
        "gpuResource": "example.com/gpu",
        "resources": {"requests": {"cpu": "30", "memory": "1Ti"}, "limits": {"memory": "1Ti"}},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"podAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}
        ],
        "priorityClassName": "higher",
    },
    "shm": {"size": "64Gi"},
    "tmp": {"size": "50Gi"},
    "cache": {"size": "30Gi"},
    "rdma": {"enabled": True, "resourceName": "rdma/ib", "count": 8, "hostNetwork": False},
    "nccl": {"env": {"NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "eth0"}},
    "gcsFaultTolerance": {
        "enabled": True,
        "redisAddress": "redis.example:6380",
        "existingSecret": "redis",
        "secretKey": "password",
        "storageNamespace": "llama",
    },
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"a": "b"},
        "host": "llm.example",
        "path": "/v1",
        "tls": [{"hosts": ["llm.example"], "secretName": "tls"}],
    },
    "httpRoute": {
        "enabled": True,
        "annotations": {"a": "b"},
        "parentRefs": [{"name": "gateway", "namespace": "infra", "sectionName": "https"}],
        "hostnames": ["llm.example"],
    },
    "networkPolicy": {
        "enabled": True,
        "clients": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}],
        "operator": [{"namespaceSelector": {"matchLabels": {"name": "kuberay"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "podDisruptionBudget": {"enabled": True},
    "podMonitor": {
        "enabled": True,
        "interval": "5s",
        "labels": {"release": "prometheus"},
        "rayMetrics": False,
    },
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "grafanaDashboard": {
        "enabled": True,
        "labels": {"dashboards": "yes"},
        "annotations": {"folder": "llm"},
    },
    "terminationGracePeriodSeconds": 200,
    "probes": {
        "liveness": {
            "initialDelaySeconds": 31,
            "periodSeconds": 11,
            "timeoutSeconds": 6,
            "failureThreshold": 13,
        },
        "readiness": {
            "initialDelaySeconds": 6,
            "periodSeconds": 6,
            "timeoutSeconds": 6,
            "failureThreshold": 4,
        },
    },
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraVolumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    "extraVolumeMounts": [{"name": "data", "mountPath": "/data"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"cost": "llm"},
    "batch": {
        "enabled": True,
        "input": "/data/in.jsonl",
        "output": "/data/out.jsonl",
        "errors": "/data/errors.jsonl",
        "extraArgs": ["--concurrency", "64"],
        "backoffLimit": 5,
        "activeDeadlineSeconds": 7200,
        "ttlSecondsAfterFinished": 60,
    },
}
"""Every optional part on, and every value not its default."""

VALID: dict[str, Values] = {
    "default": {},
    "cpu": {"engine": {"device": "cpu", "tp_size": 2}},
    "four GPUs": {
        "engine": {"tp_size": 2, "dp_size": 2, "otlp_endpoint": "http://[fd00::2]:4318"},
        "nameOverride": "fleet",
        "image": {"tag": "nightly"},
    },
    "several hosts": {"engine": {"tp_size": 8, "dp_size": 2, "num_nodes": 2}},
    "rdma": {
        "engine": {"tp_size": 16, "num_nodes": 2},
        "rdma": {"enabled": True, "count": 8},
        "nccl": {"env": {"NCCL_IB_HCA": "mlx5"}},
    },
    "host network": {
        "engine": {"tp_size": 16, "num_nodes": 2},
        "rdma": {"enabled": True, "hostNetwork": True},
        "networkPolicy": {"enabled": False},
    },
    "batch alone": {
        "service": {"enabled": False},
        "batch": {"enabled": True, "input": "s3://b/in.jsonl", "output": "s3://b/out.jsonl"},
    },
    "batch of a service": {
        "batch": {
            "enabled": True,
            "input": "/data/in.jsonl",
            "output": "/data/out.jsonl",
            "url": "http://rel-lockstep-serve-svc:8000",
            "apiKeySecret": "nightly",
            "apiKeySecretKey": "key",
        },
    },
    "model of a host": {"model": {"source": "hostPath", "hostPath": {"path": "/mnt/models"}}},
    "model of an image": {
        "model": {
            "source": "initContainer",
            "initContainer": {
                "image": "models/llama:1",
                "command": ["cp"],
                "args": ["-r", "/model/.", "/models"],
                "env": [{"name": "A", "value": "b"}],
                "sizeLimit": "20Gi",
            },
        }
    },
    "no extras": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
        "rayAuth": {"mode": "disabled"},
        "engine": {"metrics_port": -1},
    },
    "everything": EVERYTHING,
}

BATCH = {"batch": {"enabled": True, "input": "/in.jsonl", "output": "/out.jsonl"}}

REFUSED: dict[str, tuple[Values, str]] = {
    "too many GPUs": (
        {"engine": {"tp_size": 4}, "worker": {"gpusPerHost": 8}},
        "worker.gpusPerHost=8: tp_size=4 x dp_size=1 needs 4 ranks, a GPU each, and num_nodes=1 "
        "hosts of 8 GPUs have 8; set it to 4 or leave it null",
    ),
    "too few GPUs": (
        {"engine": {"tp_size": 8, "dp_size": 2, "num_nodes": 2}, "worker": {"gpusPerHost": 4}},
        "worker.gpusPerHost=4: tp_size=8 x dp_size=2 needs 16 ranks",
    ),
    "uneven": (
        {"engine": {"tp_size": 3, "num_nodes": 2}},
        "tp_size=3 x dp_size=1 needs 3 ranks, which do not spread evenly over num_nodes=2 hosts",
    ),
    "GPUs on a CPU": (
        {"engine": {"device": "cpu"}, "worker": {"gpusPerHost": 1}},
        "worker.gpusPerHost=1: engine.device is cpu, which needs none",
    ),
    "hosts without an ingress": (
        {"engine": {"tp_size": 2, "num_nodes": 2, "num_ingress": 1}},
        "engine.num_ingress=1: the Serve service sends requests to every host",
    ),
    "one port twice": (
        {"engine": {"port": 9464}},
        "engine.port and engine.metrics_port are both 9464",
    ),
    "nothing": ({"service": {"enabled": False}}, "nothing to install"),
    "batch without files": (
        {"batch": {"enabled": True, "input": "/in.jsonl"}},
        "name the files in batch.input and batch.output",
    ),
    "a key for nobody": (
        {"batch": {**BATCH["batch"], "apiKeySecret": "nightly"}},
        "batch.apiKeySecret=nightly, but batch.url is empty",
    ),
    "shell in a batch": (
        {"batch": {**BATCH["batch"], "output": "/out.jsonl;reboot"}},
        'batch: "/out.jsonl;reboot" holds characters that a shell reads as its own',
    ),
    "shell in a batch's model": (
        {**BATCH, "engine": {"model": "$(reboot)"}},
        'batch: "$(reboot)" holds characters that a shell reads as its own',
    ),
    "keys without a secret": (
        {"auth": {"enabled": True}},
        "name the Secret with the API keys in auth.existingSecret",
    ),
    "a secret without keys": (
        {"auth": {"existingSecret": "api"}},
        "auth.enabled is false: nobody would be asked for a key",
    ),
    "a token for nobody": (
        {"rayAuth": {"mode": "disabled", "existingSecret": "t"}},
        "rayAuth.mode is disabled: Ray would take anybody",
    ),
    "grace equal to drain": (
        {"engine": {"drain_s": 120}},
        "terminationGracePeriodSeconds=120: engine.drain_s=120 and 30 seconds to stop need at "
        "least 150",
    ),
    "grace a second short": (
        {"engine": {"drain_s": 91}},
        "need at least 121",
    ),
    "no claim": ({"model": {"source": "pvc"}}, "name the claim in model.pvc.claimName"),
    "no folder": ({"model": {"source": "hostPath"}}, "name the folder in model.hostPath.path"),
    "no copier": (
        {"model": {"source": "initContainer"}},
        "name the image in model.initContainer.image",
    ),
    "model elsewhere": (
        {
            "model": {"source": "pvc", "pvc": {"claimName": "m"}},
            "engine": {"model": "/models2/llama"},
        },
        "engine.model=/models2/llama is not under model.mountPath=/models",
    ),
    "host network without RDMA": (
        {"rdma": {"hostNetwork": True}},
        "rdma.hostNetwork is true, but rdma.enabled is false",
    ),
    "host network with a policy": (
        {"rdma": {"enabled": True, "hostNetwork": True}},
        "NetworkPolicy does not reach such pods",
    ),
    "no Redis": ({"gcsFaultTolerance": {"enabled": True}}, "name Redis in"),
    "ingress to nothing": (
        {"service": {"enabled": False}, **BATCH, "ingress": {"enabled": True, "host": "a.example"}},
        "there is nothing to route to",
    ),
    "ingress without a host": ({"ingress": {"enabled": True}}, "name the host in ingress.host"),
    "route without a gateway": ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    "metrics off but scraped": (
        {"podMonitor": {"enabled": True}, "engine": {"metrics_port": -1}},
        "engine.metrics_port=-1 cannot be scraped",
    ),
    # What the schema refuses, in Helm's words.
    "misspelt setting": ({"engine": {"tp_sise": 2}}, "additional properties 'tp_sise' not allowed"),
    "misspelt part": ({"podmonitor": {}}, "additional properties 'podmonitor' not allowed"),
    "keys in values": ({"engine": {"api_keys": ["k"]}}, "'api_keys' not allowed"),
    "no such strategy": ({"service": {"upgradeStrategy": "Recreate"}}, "value must be one of"),
    "no such device": ({"engine": {"device": "tpu"}}, "value must be one of"),
    "no rank": ({"engine": {"tp_size": 0}}, "minimum"),
    "text for a number": ({"engine": {"tp_size": "two"}}, "got string, want"),
    "no collector": ({"engine": {"otlp_endpoint": "collector:4317"}}, "'/engine/otlp_endpoint'"),
    "size without sense": ({"shm": {"size": "lots"}}, "'/shm/size'"),
    "half a digest": ({"image": {"digest": "sha256:12"}}, "'/image/digest'"),
    "foreign variable": ({"nccl": {"env": {"LD_PRELOAD": "x"}}}, "'LD_PRELOAD' not allowed"),
    "no operator": ({"networkPolicy": {"operator": []}}, "'/networkPolicy/operator'"),
}

if "enable_dp_attention" in fields(EngineConfig):
    VALID["DP attention"] = {
        "engine": {"tp_size": 8, "dp_size": 4, "num_nodes": 2, "enable_dp_attention": True}
    }
    REFUSED["DP attention on too many GPUs"] = (
        {
            "engine": {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True},
            "worker": {"gpusPerHost": 8},
        },
        "tp_size=4 with enable_dp_attention needs 4 ranks",
    )
    REFUSED["DP attention that does not divide"] = (
        {"engine": {"tp_size": 4, "dp_size": 3, "enable_dp_attention": True}},
        "enable_dp_attention wants dp_size=3 to divide tp_size=4",
    )
