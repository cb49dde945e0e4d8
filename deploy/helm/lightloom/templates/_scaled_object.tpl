{{/* dict root, entry. Every gateway says the same of the queues, hence max. */}}
{{- define "lightloom.scaledObject" -}}
{{- $scaling := .entry.values.autoscaling }}
{{- $which := printf "{namespace=%q,stage=%q,model=%q,expert=%q}" .root.Release.Namespace .entry.stage .entry.model .entry.expert }}
{{- $address := required "keda.prometheusAddress: autoscaling needs the address of Prometheus" .root.Values.keda.prometheusAddress }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .entry.name }}
  labels:
    {{- include "lightloom.labels" (dict "root" .root "component" .entry.component "model" .entry.model "expert" .entry.expert) | nindent 4 }}
spec:
  scaleTargetRef:
    {{- if gt (int .entry.hosts) 1 }}
    apiVersion: leaderworkerset.x-k8s.io/v1
    kind: LeaderWorkerSet
    {{- else }}
    apiVersion: apps/v1
    kind: Deployment
    {{- end }}
    name: {{ .entry.name }}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  pollingInterval: {{ .root.Values.keda.pollingInterval }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: {{ $scaling.scaleDownStabilizationSeconds }}
          policies: [{type: Pods, value: 1, periodSeconds: 60}]
  triggers:
    # A metric that is missing is no reason to scale in.
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ $address | quote }}
        query: {{ printf "max(lightloom_queued_seconds%s)" $which | quote }}
        threshold: {{ $scaling.queuedSeconds | quote }}
        ignoreNullValues: "false"
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ $address | quote }}
        query: {{ printf "max(lightloom_running_requests%s)" $which | quote }}
        threshold: {{ $scaling.runningRequests | quote }}
        ignoreNullValues: "false"
{{- end }}
