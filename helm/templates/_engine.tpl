{{/* What follows from the engine's settings. Numbers come back as text: pipe them into `int`. */}}

{{- define "lockstep.ranks" -}}
{{- if .Values.engine.enable_dp_attention -}}
{{ int .Values.engine.tp_size }}
{{- else -}}
{{ mul (int .Values.engine.tp_size) (int .Values.engine.dp_size) }}
{{- end -}}
{{- end }}

{{- define "lockstep.ranksPerHost" -}}
{{ div (include "lockstep.ranks" . | int) (int .Values.engine.num_nodes) }}
{{- end }}

{{/* GPUs of one host: the only place that says how many. */}}
{{- define "lockstep.gpusPerHost" -}}
{{- if ne .Values.worker.gpusPerHost nil -}}
{{ int .Values.worker.gpusPerHost }}
{{- else if eq (.Values.engine.device | default "auto") "cpu" -}}
0
{{- else -}}
{{ include "lockstep.ranksPerHost" . }}
{{- end -}}
{{- end }}

{{- define "lockstep.model" -}}
{{- if .Values.engine.model -}}
{{ .Values.engine.model }}
{{- else if ne .Values.model.source "image" -}}
{{ .Values.model.mountPath }}
{{- end -}}
{{- end }}

{{/*
Settings as they are passed on, as JSON: only those that are set. Every host has an ingress where
there are several, because the Serve service sends requests to every ready pod. Where hosts are
listed the Serve service's own name is one of them: the chart's test asks under it.
*/}}
{{- define "lockstep.settings" -}}
{{- $settings := dict -}}
{{- range $name, $value := omit .Values.engine "model" -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $settings $name $value -}}
{{- end -}}
{{- end -}}
{{- with include "lockstep.model" . -}}
{{- $_ := set $settings "model" . -}}
{{- end -}}
{{- if and (gt (int .Values.engine.num_nodes) 1) (not (hasKey $settings "num_ingress")) -}}
{{- $_ := set $settings "num_ingress" (int .Values.engine.num_nodes) -}}
{{- end -}}
{{- with .Values.engine.allowed_hosts -}}
{{- $_ := set $settings "allowed_hosts" (append . (include "lockstep.serveService" $)) -}}
{{- end -}}
{{- if .Values.auth.enabled -}}
{{- $_ := set $settings "api_keys_file" "/etc/lockstep/api-keys" -}}
{{- end -}}
{{- toJson $settings -}}
{{- end }}

{{/* Settings that are passed to the service only: a batch speaks no HTTP. */}}
{{- define "lockstep.serviceSettings" -}}
host port metrics_port num_ingress api_keys_file allowed_hosts max_ongoing_requests resume_wait_s drain_s otlp_endpoint
{{- end }}

{{- define "lockstep.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: {{ .Values.engine.host | toJson }}
  port: {{ int .Values.engine.port }}
applications:
  - name: lockstep
    route_prefix: /
    import_path: deployments.app:build_app
    args:
    {{- range $name, $value := include "lockstep.settings" . | fromJson }}
      {{ $name }}: {{ toJson $value }}
    {{- end }}
    {{- if gt (int .Values.engine.num_nodes) 1 }}
    deployments:
      - name: Ingress
        max_replicas_per_node: {{ include "lockstep.ingressesPerHost" . }}
    {{- end }}
{{- end }}

{{- define "lockstep.ingressesPerHost" -}}
{{- $num := int (.Values.engine.num_ingress | default .Values.engine.num_nodes) -}}
{{- $hosts := int .Values.engine.num_nodes -}}
{{ div (add $num (sub $hosts 1)) $hosts }}
{{- end }}

{{/* One line for `ray job submit`: engine flags, or the address of a running service. */}}
{{- define "lockstep.batchCommand" -}}
{{- $words := list "python" "-m" "deployments.batch" "-i" .Values.batch.input "-o" .Values.batch.output -}}
{{- with .Values.batch.errors -}}
{{- $words = concat $words (list "--errors" .) -}}
{{- end -}}
{{- if .Values.batch.url -}}
{{- $words = concat $words (list "--url" .Values.batch.url) -}}
{{- if .Values.batch.apiKeySecret -}}
{{- $words = concat $words (list "--api-key-file" "/etc/lockstep-batch/api-key") -}}
{{- end -}}
{{- else -}}
{{- $settings := include "lockstep.settings" . | fromJson -}}
{{- range splitList " " (include "lockstep.serviceSettings" .) -}}
{{- $settings = omit $settings . -}}
{{- end -}}
{{- range $name, $value := $settings -}}
{{- $words = append $words (printf "--%s" (replace "_" "-" $name)) -}}
{{- $words = append $words (kindIs "string" $value | ternary $value (toJson $value)) -}}
{{- end -}}
{{- end -}}
{{- range concat $words .Values.batch.extraArgs -}}
{{- /* The line passes through two shells, so what either would read as its own is refused. */ -}}
{{- if not (regexMatch "^[A-Za-z0-9._/:@=+,%-]*$" .) -}}
{{- fail (printf "batch: %q holds characters that a shell reads as its own; use letters, digits and . _ / : @ = + , %% -" .) -}}
{{- end -}}
{{- end -}}
{{- join " " (concat $words .Values.batch.extraArgs) -}}
{{- end }}
