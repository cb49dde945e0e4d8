{{/* Nested mappings of plain values as TOML: JSON's scalars and lists are TOML's too. dict section (list), table. */}}
{{- define "lightloom.toml" -}}
{{- with .section }}
[{{ join "." . }}]
{{- end }}
{{- range $key, $value := .table }}
{{- if not (kindIs "map" $value) }}
{{ regexMatch "^[A-Za-z0-9_-]+$" $key | ternary $key (toJson $key) }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- $section := .section }}
{{- range $key, $value := .table }}
{{- if kindIs "map" $value }}
{{ include "lightloom.toml" (dict "section" (append $section $key) "table" $value) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Config of the gateway: what users add, under what the chart decides. */}}
{{- define "lightloom.gatewayConfig" -}}
{{- $name := include "lightloom.name" . }}
{{- $stages := dict }}
{{- range $stage := (include "lightloom.stageNames" . | fromYaml).names }}
{{- $_ := set $stages $stage (printf "dns:///%s-%s:50051" $name (include "lightloom.dashed" $stage)) }}
{{- end }}
{{- $access := dict }}
{{- if .Values.gateway.keysSecret }}
{{- $_ := set $access "keys_file" "/etc/lightloom-keys/keys.jsonl" }}
{{- else if .Values.gateway.allowAnonymous }}
{{- $_ := set $access "allow_anonymous" true }}
{{- else }}
{{- fail "gateway.keysSecret: name a Secret with the key `keys.jsonl` (made by `lightloom key create`), or set gateway.allowAnonymous: true if all who reach the Service may use it" }}
{{- end }}
{{- $listen := dict "host" "0.0.0.0" "http_port" 8080 "grpc_port" 8081 "drain_s" .Values.gateway.drainSeconds }}
{{- if .Values.tls.frontSecret }}
{{- /* The kubelet's gRPC probes know no TLS. */}}
{{- $_ := set $listen "health_port" 50052 }}
{{- end }}
{{- $own := dict "access" $access "gateway" $listen "redis" (include "lightloom.gatewayRedis" .Values.redis | fromYaml) "store" (include "lightloom.gatewayStore" .Values.artifacts.s3 | fromYaml) "stages" $stages }}
{{- if .Values.tls.frontSecret }}
{{- $tls := dict "cert" "/etc/lightloom-tls/tls.crt" "key" "/etc/lightloom-tls/tls.key" }}
{{- $_ := set $own "tls" (.Values.tls.clientCertificates | ternary (set $tls "ca" "/etc/lightloom-tls/ca.crt") $tls) }}
{{- else if .Values.tls.clientCertificates }}
{{- fail "tls.clientCertificates: it is ca.crt of tls.frontSecret that must have signed them, and that is empty" }}
{{- end }}
{{- if include "lightloom.stagesHaveTls" . }}
{{- $_ := set $own "stage_tls" (merge (dict "server_name" .Values.tls.stageName) (include "lightloom.certificates" "/etc/lightloom-stage-tls" | fromYaml)) }}
{{- end }}
{{- $fitting := dict }}
{{- with .Values.redis.internal }}
{{- if .enabled }}
{{- /* Each model has its queues: together, they have two fifths of what Redis takes. */}}
{{- $bytes := div (mul .maxmemoryMiB 1048576 2) (mul 5 (len $.Values.models | max 1)) }}
{{- $_ := set $fitting "gateway" (dict "max_queued_bytes" $bytes) }}
{{- end }}
{{- end }}
{{- include "lightloom.toml" (dict "section" list "table" (mergeOverwrite $fitting (deepCopy .Values.gateway.config) $own)) | trim }}
{{- end }}

{{- define "lightloom.gatewayRedis" -}}
url_file: /etc/lightloom-redis/url
{{- if .sentinelPassword }}
sentinel_password_file: /etc/lightloom-redis/sentinel-password
{{- end }}
{{- if .tlsSecret }}
tls:
  ca: /etc/lightloom-redis-tls/ca.crt
  {{- if .clientCertificate }}
  cert: /etc/lightloom-redis-tls/tls.crt
  key: /etc/lightloom-redis-tls/tls.key
  {{- end }}
{{- end }}
{{- end }}

{{- define "lightloom.gatewayStore" -}}
{{- if .bucket }}
path: {{ printf "s3://%s/%s" .bucket .prefix | trimSuffix "/" }}
endpoint_url: {{ .endpointUrl | quote }}
{{- else }}
path: /artifacts
{{- end }}
{{- end }}

{{/* A [tls] section out of a folder with what cert-manager makes. */}}
{{- define "lightloom.certificates" -}}
ca: {{ . }}/ca.crt
cert: {{ . }}/tls.crt
key: {{ . }}/tls.key
{{- end }}

{{/* "yes" if gateways and stages show each other certificates. */}}
{{- define "lightloom.stagesHaveTls" -}}
{{- if and .Values.tls.gatewaySecret .Values.tls.stageSecret }}yes{{ end }}
{{- if ne (empty .Values.tls.gatewaySecret) (empty .Values.tls.stageSecret) }}
{{- fail "tls.gatewaySecret and tls.stageSecret go together: gateways and stages show each other certificates, or none does" }}
{{- end }}
{{- end }}

{{/* Config of a stage: an entry of lightloom.stages. */}}
{{- define "lightloom.stageConfig" -}}
{{- $service := merge (dict "host" "0.0.0.0" "port" 50051 "metrics_port" 9090 "name" .name) .values.service }}
{{- $table := dict "service" $service "model" (merge (dict "name" (.model | default .stage)) .section) "engine" .values.engine "limits" .limits }}
{{- if .tls }}
{{- $_ := set $service "health_port" 50052 }}
{{- $_ := set $table "tls" (include "lightloom.certificates" "/etc/lightloom-tls" | fromYaml) }}
{{- end }}
{{- if eq .stage "dit" }}
{{- $parallel := deepCopy .values.parallel }}
{{- if gt (int .hosts) 1 }}
{{- $_ := set $parallel "agent_token_file" "/etc/lightloom-agent/token" }}
{{- end }}
{{- $table = merge $table (dict "features" .values.features "parallel" $parallel) }}
{{- end }}
{{- include "lightloom.toml" (dict "section" list "table" $table) | trim }}
{{- end }}
