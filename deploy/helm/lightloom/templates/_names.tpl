{{- define "lightloom.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{/* A stage as it stands in names: text-encoder. */}}
{{- define "lightloom.dashed" -}}{{ . | replace "_" "-" }}{{- end }}

{{/* The stages that run: the YAML of a list under `names`. */}}
{{- define "lightloom.stageNames" -}}
names: [text_encoder, dit, vae{{ if .Values.interpolation.model.source }}, interpolation{{ end }}]
{{- end }}

{{/* What selects the pods of a component: dict root, component, model and expert (may be left out or ""). */}}
{{- define "lightloom.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
lightloom/model: {{ . }}
{{- end }}
{{- with .expert }}
lightloom/expert: {{ . }}
{{- end }}
{{- end }}

{{- define "lightloom.labels" -}}
{{ include "lightloom.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* A Secret's keys as files: dict name (of the volume), secret, keys. Readable by the group that pods run in. */}}
{{- define "lightloom.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    items:
      {{- range .keys }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
    defaultMode: 0440
{{- end }}

{{- define "lightloom.image" -}}
{{ .root.Values.image.repository }}/{{ .component }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Every stage of every model, its values over the stage's defaults, and the interpolator of all models: the YAML of a
     list under `stages`. Denoisers that hold one expert each are workloads of their own; `expert` is "" of the others. */}}
{{- define "lightloom.stages" -}}
stages:
{{- $tls := include "lightloom.stagesHaveTls" . | eq "yes" }}
{{- range $name, $model := .Values.models }}
{{- range $stage := list "text_encoder" "dit" "vae" }}
{{- $of := mergeOverwrite (deepCopy (get $.Values.stages $stage)) (deepCopy (dig "stages" $stage dict $model)) }}
{{- $component := include "lightloom.dashed" $stage }}
{{- range $expert, $own := (and (eq $stage "dit") $model.experts) | default (dict "" dict) }}
{{- $values := mergeOverwrite (deepCopy $of) (deepCopy $own) }}
{{- if $expert }}
{{- if $values.engine.offload_experts }}
{{- fail (printf "models.%s: engine.offload_experts does not go with experts: each denoiser holds one of them" $name) }}
{{- end }}
{{- $_ := set $values.engine "expert" $expert }}
{{- end }}
{{- $full := list (include "lightloom.name" $) $component $name (include "lightloom.dashed" $expert) | compact | join "-" }}
{{- if gt (len $full) 52 }}
{{- fail (printf "models.%s: the name %s of its pods is longer than 52 characters: shorten the release's or the model's" $name $full) }}
{{- end }}
  - {{ dict "model" $name "expert" $expert "stage" $stage "component" $component "section" $model.model "limits" ($model.limits | default dict) "values" $values "tls" $tls "hosts" ($values.hosts | default 1 | int) "name" $full | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.interpolation.model.source }}
{{- $values := omit .Values.interpolation "model" "limits" }}
  - {{ dict "model" "" "expert" "" "stage" "interpolation" "component" "interpolation" "section" .Values.interpolation.model "limits" .Values.interpolation.limits "values" $values "tls" $tls "hosts" 1 "name" (printf "%s-interpolation" (include "lightloom.name" .)) | toJson }}
{{- end }}
{{- end }}
