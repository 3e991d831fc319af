{{/*
Pods of a Ray cluster. The templates here take a dict: root, role (head or worker), prefix ("" for
the service, "batch-" for the batch).
*/}}

{{- define "lockstep.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "lockstep.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Ray reads these when it starts, so they are on every container that runs anything of Ray's. */}}
{{- define "lockstep.rayEnv" -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S, value: "60"}
- {name: RAY_AUTH_MODE, value: {{ .Values.rayAuth.mode | quote }}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, value: "1"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "0"}
- {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "60"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
- {name: PYTHONPATH, value: /app}
- {name: HOME, value: /home/lockstep}
- {name: LOCKSTEP_CACHE_DIR, value: /home/lockstep/.cache/lockstep}
{{- range $name, $value := .Values.nccl.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Requests and limits with the devices of a host in both: Kubernetes wants them equal. */}}
{{- define "lockstep.resources" -}}
{{- $values := .root.Values -}}
{{- $devices := dict -}}
{{- if eq .role "worker" -}}
{{- $gpus := include "lockstep.gpusPerHost" .root | int -}}
{{- if gt $gpus 0 -}}
{{- $_ := set $devices $values.worker.gpuResource (toString $gpus) -}}
{{- end -}}
{{- if $values.rdma.enabled -}}
{{- $_ := set $devices $values.rdma.resourceName (toString (int $values.rdma.count)) -}}
{{- end -}}
{{- end -}}
{{- $given := eq .role "head" | ternary $values.head $values.worker -}}
requests:
  {{- merge (dict) ($given.resources.requests | default dict) $devices | toYaml | nindent 2 }}
limits:
  {{- merge (dict) ($given.resources.limits | default dict) $devices | toYaml | nindent 2 }}
{{- end }}

{{- define "lockstep.topologySpread" -}}
{{- $root := .root -}}
{{- $labels := dict "app.kubernetes.io/instance" $root.Release.Name "app.kubernetes.io/part-of" "lockstep" "app.kubernetes.io/component" (printf "%s%s" .prefix .role) -}}
{{- $given := eq .role "head" | ternary $root.Values.head.topologySpreadConstraints $root.Values.worker.topologySpreadConstraints -}}
{{- if and (not $given) (eq .role "worker") (gt (int $root.Values.engine.num_nodes) 1) -}}
{{- $given = list (dict "maxSkew" 1 "topologyKey" "kubernetes.io/hostname" "whenUnsatisfiable" "DoNotSchedule") -}}
{{- end -}}
{{- $filled := list -}}
{{- range $given -}}
{{- $filled = append $filled (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels))) -}}
{{- end -}}
{{- if $filled -}}
{{- toYaml $filled -}}
{{- end -}}
{{- end }}

{{/* NOTE: liveness asks this pod's Ray only. The Serve port reaches ingresses of other pods too. */}}
{{- define "lockstep.probes" -}}
{{- $probes := .root.Values.probes -}}
{{- $script := .root.Files.Get "files/ready.sh" -}}
{{- $path := eq .role "head" | ternary "/api/healthz" "/api/local_raylet_healthz" -}}
{{- $servePort := "" -}}
{{- if and (eq .role "worker") (eq .prefix "") -}}
{{- $servePort = toString (int .root.Values.engine.port) -}}
{{- end -}}
livenessProbe:
  {{- toYaml $probes.liveness | nindent 2 }}
  exec:
    command: {{ list "bash" "-c" $script "ready.sh" "52365" $path | toJson }}
readinessProbe:
  {{- toYaml $probes.readiness | nindent 2 }}
  exec:
    command: {{ list "bash" "-c" $script "ready.sh" "52365" $path $servePort | toJson }}
{{- end }}

{{- define "lockstep.mounts" -}}
- {name: shm, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/lockstep}
{{- if and (eq .role "worker") (ne .root.Values.model.source "image") }}
- name: model
  mountPath: {{ .root.Values.model.mountPath }}
  readOnly: true
  {{- if and (eq .root.Values.model.source "pvc") .root.Values.model.pvc.subPath }}
  subPath: {{ .root.Values.model.pvc.subPath | quote }}
  {{- end }}
{{- end }}
{{- if and (eq .prefix "") .root.Values.auth.enabled }}
- {name: api-keys, mountPath: /etc/lockstep, readOnly: true}
{{- end }}
{{- if and (eq .prefix "batch-") .root.Values.batch.apiKeySecret }}
- {name: batch-key, mountPath: /etc/lockstep-batch, readOnly: true}
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lockstep.volumes" -}}
{{- $values := .root.Values -}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $values.shm.size | quote }}}
- name: tmp
  emptyDir: {sizeLimit: {{ $values.tmp.size | quote }}}
- name: home
  emptyDir: {sizeLimit: {{ $values.cache.size | quote }}}
{{- if eq .role "worker" }}
{{- if eq $values.model.source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ $values.model.pvc.claimName | quote }}, readOnly: true}
{{- else if eq $values.model.source "hostPath" }}
- name: model
  hostPath: {path: {{ $values.model.hostPath.path | quote }}, type: Directory}
{{- else if eq $values.model.source "initContainer" }}
- name: model
  emptyDir: {sizeLimit: {{ $values.model.initContainer.sizeLimit | quote }}}
{{- end }}
{{- end }}
{{- if and (eq .prefix "batch-") $values.batch.apiKeySecret }}
- name: batch-key
  secret:
    secretName: {{ $values.batch.apiKeySecret | quote }}
    items:
      - {key: {{ $values.batch.apiKeySecretKey | quote }}, path: api-key}
{{- end }}
{{- if and (eq .prefix "") $values.auth.enabled }}
- name: api-keys
  secret:
    secretName: {{ $values.auth.existingSecret | quote }}
    items:
      - {key: {{ $values.auth.secretKey | quote }}, path: api-keys}
{{- end }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lockstep.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $given := eq .role "head" | ternary $values.head $values.worker -}}
metadata:
  labels:
    {{- include "lockstep.podSelector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .prefix }}{{ .role }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "lockstep.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ int $values.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "lockstep.podSecurity" . | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- if and (eq .role "worker") $values.rdma.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- with $given.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $given.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $given.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "lockstep.topologySpread" . }}
  topologySpreadConstraints:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $given.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- if and (eq .role "worker") (eq $values.model.source "initContainer") }}
  initContainers:
    - name: model
      image: {{ $values.model.initContainer.image | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- with $values.model.initContainer.command }}
      command: {{ toJson . }}
      {{- end }}
      {{- with $values.model.initContainer.args }}
      args: {{ toJson . }}
      {{- end }}
      {{- with $values.model.initContainer.env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "lockstep.containerSecurity" . | nindent 8 }}
      resources:
        requests: {cpu: "1", memory: 2Gi}
        limits: {memory: 2Gi}
      volumeMounts:
        - {name: model, mountPath: {{ $values.model.mountPath }}}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "lockstep.image" $root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "lockstep.containerSecurity" . | nindent 8 }}
        {{- if and (eq .role "worker") $values.rdma.enabled }}
          add: [IPC_LOCK]
        {{- end }}
      env:
        {{- include "lockstep.rayEnv" $root | nindent 8 }}
      ports:
        {{- if eq .role "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        {{- if eq .prefix "" }}
        - {name: serve, containerPort: {{ int $values.engine.port }}}
        {{- if gt (int $values.engine.metrics_port) 0 }}
        - {name: engine-metrics, containerPort: {{ int $values.engine.metrics_port }}}
        {{- end }}
        {{- end }}
      resources:
        {{- include "lockstep.resources" . | nindent 8 }}
      {{- include "lockstep.probes" . | nindent 6 }}
      {{- if eq .prefix "" }}
      lifecycle:
        preStop:
          exec:
            command: {{ list "python" "-c" ($root.Files.Get "files/drain.py") (toString (int $values.engine.drain_s)) (toString (int $values.engine.metrics_port)) | toJson }}
      {{- end }}
      volumeMounts:
        {{- include "lockstep.mounts" . | nindent 8 }}
  volumes:
    {{- include "lockstep.volumes" . | nindent 4 }}
{{- end }}
