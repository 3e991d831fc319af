{{/*
The Ray cluster of a RayService or a RayJob. Takes a dict: root, prefix ("" or "batch-"), workers
(whether it has hosts with GPUs).
*/}}
{{- define "lockstep.cluster" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
rayVersion: {{ $values.rayVersion | quote }}
authOptions:
  mode: {{ $values.rayAuth.mode }}
  {{- with $values.rayAuth.existingSecret }}
  secretName: {{ . | quote }}
  {{- end }}
{{- if and $values.gcsFaultTolerance.enabled (eq .prefix "") }}
gcsFaultToleranceOptions:
  redisAddress: {{ $values.gcsFaultTolerance.redisAddress | quote }}
  {{- with $values.gcsFaultTolerance.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ . | quote }}, key: {{ $values.gcsFaultTolerance.secretKey | quote }}}
  {{- end }}
  {{- with $values.gcsFaultTolerance.storageNamespace }}
  externalStorageNamespace: {{ . | quote }}
  {{- end }}
{{- end }}
headGroupSpec:
  rayStartParams:
    # The head offers nothing to actors: one that ran there would end with it.
    num-cpus: "0"
    # Ray Client runs any code it is sent; nothing of ours uses it.
    ray-client-server-port: "0"
  template:
    {{- include "lockstep.pod" (dict "root" $root "role" "head" "prefix" .prefix) | nindent 4 }}
{{- if .workers }}
workerGroupSpecs:
  - groupName: gpu
    replicas: 1
    minReplicas: 1
    maxReplicas: 1
    numOfHosts: {{ int $values.engine.num_nodes }}
    rayStartParams:
      # Ray's count of CPUs decides what may be placed here, not how much it may use: room for the
      # ranks, the driver, the ingresses and a batch's entry point, whatever the pod's CPU request.
      num-cpus: {{ add (include "lockstep.ranksPerHost" $root | int) (include "lockstep.ingressesPerHost" $root | int) 2 | toString | quote }}
    template:
      {{- include "lockstep.pod" (dict "root" $root "role" "worker" "prefix" .prefix) | nindent 6 }}
{{- end }}
{{- end }}
