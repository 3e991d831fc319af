"""What the chart may emit of kinds that Kubernetes itself has no schema for: strict and small.

Only the fields that the chart uses are listed, so a misspelt one is refused, and so is a new one
until it has been looked up in KubeRay's API (ray.io/v1, 1.7) and added here. None of them is behind
a feature gate. Pod templates are left open: the renderer checks them as pods.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {"type": "object"}


def fields(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def each(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def document(spec: Schema) -> Schema:
    return fields(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion=TEXT,
        kind=TEXT,
        metadata=ANY,
        spec=spec,
    )


PARAMS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
SECRET = fields("name", "key", name=TEXT, key=TEXT)

CLUSTER = fields(
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields("mode", mode={"enum": ["token", "disabled"]}, secretName=TEXT),
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        redisAddress=TEXT,
        redisPassword=fields("valueFrom", valueFrom=fields("secretKeyRef", secretKeyRef=SECRET)),
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=fields("rayStartParams", "template", rayStartParams=PARAMS, template=ANY),
    workerGroupSpecs=each(
        fields(
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "numOfHosts",
            "rayStartParams",
            "template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts={"type": "integer", "minimum": 1},
            rayStartParams=PARAMS,
            template=ANY,
        )
    ),
)

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayService"): document(
        fields(
            "serveConfigV2",
            "rayClusterConfig",
            upgradeStrategy=fields("type", type={"enum": ["None", "NewCluster"]}),
            serveConfigV2=TEXT,
            rayClusterConfig=CLUSTER,
        )
    ),
    ("ray.io/v1", "RayJob"): document(
        fields(
            "entrypoint",
            "rayClusterSpec",
            entrypoint=TEXT,
            entrypointNumCpus={"type": "number"},
            submissionMode={"enum": ["K8sJobMode"]},
            backoffLimit=COUNT,
            activeDeadlineSeconds=COUNT,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=COUNT,
            submitterPodTemplate=ANY,
            rayClusterSpec=CLUSTER,
        )
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): document(
        fields(
            "selector",
            "podMetricsEndpoints",
            selector=fields("matchLabels", matchLabels=PARAMS),
            podTargetLabels=each(TEXT),
            podMetricsEndpoints=each(fields("port", port=TEXT, interval=TEXT)),
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): document(
        fields(
            "groups",
            groups=each(
                fields(
                    "name",
                    "rules",
                    name=TEXT,
                    interval=TEXT,
                    rules=each(
                        {
                            **fields(
                                "expr",
                                alert=TEXT,
                                record=TEXT,
                                expr=TEXT,
                                labels=PARAMS,
                                annotations=PARAMS,
                                **{"for": TEXT, "keep_firing_for": TEXT},
                            ),
                            "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                        }
                    ),
                )
            ),
        )
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): document(
        fields(
            "parentRefs",
            "rules",
            parentRefs=each(fields("name", name=TEXT, namespace=TEXT, sectionName=TEXT)),
            hostnames=each(TEXT),
            rules=each(
                fields(
                    "backendRefs",
                    matches=each(
                        fields("path", path=fields("type", "value", type=TEXT, value=TEXT))
                    ),
                    timeouts=fields("request", request=TEXT),
                    backendRefs=each(fields("name", "port", name=TEXT, port=COUNT)),
                )
            ),
        )
    ),
}
