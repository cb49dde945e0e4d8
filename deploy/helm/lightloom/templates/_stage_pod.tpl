{{/* The pod of a stage. dict root, entry (of lightloom.stages), agent (whether it only lends its devices). */}}
{{- define "lightloom.stagePod" -}}
{{- $root := .root }}
{{- $entry := .entry }}
{{- $values := .entry.values }}
{{- $component := .entry.component }}
{{- $several := gt (int .entry.hosts) 1 }}
metadata:
  labels:
    {{- include "lightloom.labels" (dict "root" $root "component" (ternary (printf "%s-agent" $component) $component .agent) "model" .entry.model "expert" .entry.expert) | nindent 4 }}
    {{- if $several }}
    lightloom/group: {{ .entry.name }}
    {{- end }}
  annotations:
    checksum/config: {{ include "lightloom.stageConfig" .entry | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "lightloom.name" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $root.Values.preStopSeconds (ceil $values.service.drain_timeout_s) 15 }}
  {{- include "lightloom.podSettings" (dict "root" $root "values" $values "component" $component "model" .entry.model "expert" .entry.expert) | nindent 2 }}
  containers:
    - name: {{ ternary "agent" $component .agent }}
      image: {{ include "lightloom.image" (dict "root" $root "component" $component) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- if .agent }}
      command: [python, -m, {{ .entry.stage }}_svc.agent]
      args: [--listen, "0.0.0.0:50100", --token-file, /etc/lightloom-agent/token, --drain-timeout-s, {{ $values.service.drain_timeout_s | quote }}]
      ports:
        - {name: agent, containerPort: 50100}
      {{- else }}
      command: [python, -m, {{ .entry.stage }}_svc]
      args:
        - --config
        - /etc/lightloom/{{ .entry.stage }}.toml
        {{- if $several }}
        - --set
        - parallel.hosts=[{{ range $index := untilStep 1 (int .entry.hosts) 1 }}{{ if gt $index 1 }}, {{ end }}"$(POD_NAME)-{{ $index }}.{{ $entry.name }}:50100"{{ end }}]
        - --set
        - parallel.leader_address=$(POD_IP)
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- end }}
      ports:
        - {name: grpc, containerPort: 50051}
        {{- if .entry.tls }}
        - {name: health, containerPort: 50052}
        {{- end }}
        - {name: metrics, containerPort: 9090}
      {{- $port := ternary 50052 50051 .entry.tls }}
      {{- $service := printf "lightloom.v1.%s" (get (dict "text_encoder" "TextEncoder" "dit" "Dit" "vae" "Vae" "interpolation" "Interpolation") .entry.stage) }}
      {{- include "lightloom.probes" (dict "ready" (dict "grpc" (dict "port" $port "service" $service)) "live" (dict "grpc" (dict "port" $port "service" "live")) "startSeconds" $values.service.start_timeout_s) | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop: {sleep: {seconds: {{ $root.Values.preStopSeconds }}}}
      resources:
        {{- toYaml $values.resources | nindent 8 }}
      {{- include "lightloom.containerSecurity" $root | nindent 6 }}
      volumeMounts:
        {{- if not .agent }}
        - {name: config, mountPath: /etc/lightloom, readOnly: true}
        {{- if .entry.tls }}
        - {name: tls, mountPath: /etc/lightloom-tls, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if $several }}
        - {name: agent-token, mountPath: /etc/lightloom-agent, readOnly: true}
        {{- end }}
        {{- if $root.Values.modelVolume.source }}
        - {name: models, mountPath: {{ $root.Values.modelVolume.mountPath }}, readOnly: true}
        {{- end }}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- if not .agent }}
    - name: config
      configMap: {name: {{ .entry.name }}}
    {{- if .entry.tls }}
    {{- include "lightloom.secretVolume" (dict "name" "tls" "secret" $root.Values.tls.stageSecret "keys" (list "tls.crt" "tls.key" "ca.crt")) | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- if $several }}
    {{- $secret := required (printf "models.%s: a replica over several hosts needs stages.dit.agentTokenSecret, a Secret with the key `token`" .entry.model) $values.agentTokenSecret }}
    {{- include "lightloom.secretVolume" (dict "name" "agent-token" "secret" $secret "keys" (list "token")) | nindent 4 }}
    {{- end }}
    {{- with $root.Values.modelVolume.source }}
    - name: models
      {{- toYaml . | nindent 6 }}
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.shmSize }}}
{{- end }}

{{/* What pods of gateways and stages have in common. dict root, values, component, model, expert. */}}
{{- define "lightloom.podSettings" -}}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "lightloom.selector" (dict "root" $.root "component" $.component "model" $.model "expert" $.expert) | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "lightloom.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* dict ready and live (what to ask), startSeconds. Weights that load and ranks that start again are no reason to restart. */}}
{{- define "lightloom.probes" -}}
startupProbe:
  {{- toYaml .ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ div (add (ceil .startSeconds) 60) 5 }}
readinessProbe:
  {{- toYaml .ready | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 1
livenessProbe:
  {{- toYaml .live | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
