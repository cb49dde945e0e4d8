{{/* What gateways read out of Secrets: YAML of a list under `secrets`. Each is a folder /etc/lightloom-<name>. */}}
{{- define "lightloom.gatewaySecrets" -}}
{{- $pair := list "tls.crt" "tls.key" }}
{{- $s3 := empty .Values.artifacts.s3.bucket | ternary dict .Values.artifacts.s3 }}
secrets:
{{- with .Values.redis }}
{{- if and .internal.enabled .internal.tlsSecret (not (and .tlsSecret .clientCertificate)) }}
{{- fail "redis.internal.tlsSecret: this Redis asks for certificates, so it needs redis.tlsSecret and redis.clientCertificate: true" }}
{{- end }}
  - name: redis
    secret: {{ required "redis.existingSecret: name a Secret with the key `url`" .existingSecret }}
    keys: {{ .sentinelPassword | ternary (list "url" "sentinel-password") (list "url") | toJson }}
{{- if .tlsSecret }}
  - name: redis-tls
    secret: {{ .tlsSecret }}
    keys: {{ .clientCertificate | ternary (append $pair "ca.crt") (list "ca.crt") | toJson }}
{{- else if .clientCertificate }}
{{- fail "redis.clientCertificate: it is tls.crt and tls.key of redis.tlsSecret, which is empty" }}
{{- end }}
{{- end }}
{{- with .Values.gateway.keysSecret }}
  - {name: keys, secret: {{ . }}, keys: [keys.jsonl]}
{{- end }}
{{- with .Values.tls.frontSecret }}
  - {name: tls, secret: {{ . }}, keys: {{ $.Values.tls.clientCertificates | ternary (append $pair "ca.crt") $pair | toJson }}}
{{- end }}
{{- if include "lightloom.stagesHaveTls" . }}
  - {name: stage-tls, secret: {{ .Values.tls.gatewaySecret }}, keys: {{ append $pair "ca.crt" | toJson }}}
{{- end }}
{{- with $s3.credentialsSecret }}
  - {name: s3, secret: {{ . }}, keys: [credentials]}
{{- end }}
{{- with $s3.caSecret }}
  - {name: s3-ca, secret: {{ . }}, keys: [ca.crt]}
{{- end }}
{{- end }}
