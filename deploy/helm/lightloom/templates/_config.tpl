{{/* Nested mappings of plain values as TOML: JSON's scalars and lists are TOML's too. dict section (list), table. */}}
{{- define "lightloom.toml" -}}
{{- with .section }}
[{{ join "." . }}]
{{- end }}
{{- range $key, $value := .table }}
{{- if not (kindIs "map" $value) }}
{{ $key }} = {{ toJson $value }}
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
{{- range $stage := list "text_encoder" "dit" "vae" }}
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
{{- $own := dict "access" $access "gateway" (dict "host" "0.0.0.0" "http_port" 8080 "grpc_port" 50050) "redis" (dict "url_file" "/etc/lightloom-redis/url") "store" (dict "path" "/artifacts") "stages" $stages }}
{{- include "lightloom.toml" (dict "section" list "table" (mergeOverwrite (deepCopy .Values.gateway.config) $own)) | trim }}
{{- end }}

{{/* Config of a stage: an entry of lightloom.stages. */}}
{{- define "lightloom.stageConfig" -}}
{{- $service := merge (dict "host" "0.0.0.0" "port" 50051 "metrics_port" 9090 "name" .name) .values.service }}
{{- $table := dict "service" $service "model" (merge (dict "name" .model) .section) "engine" .values.engine "limits" .limits }}
{{- if eq .stage "dit" }}
{{- $parallel := deepCopy .values.parallel }}
{{- if gt (int .hosts) 1 }}
{{- $_ := set $parallel "agent_token_file" "/etc/lightloom-agent/token" }}
{{- end }}
{{- $table = merge $table (dict "features" .values.features "parallel" $parallel) }}
{{- end }}
{{- include "lightloom.toml" (dict "section" list "table" $table) | trim }}
{{- end }}
