{{- define "shoal.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The pods that serve HTTP: all of a Deployment, the leaders of a LeaderWorkerSet. */}}
{{- define "shoal.server" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Ranks of one host. Fails if the layout cannot be shared out over the hosts. */}}
{{- define "shoal.ranksPerHost" -}}
{{- $hosts := int .Values.hosts -}}
{{- $layout := .Values.layout -}}
{{- $ranks := mul $layout.tensorParallel $layout.pipelineParallel $layout.dataParallel -}}
{{- if mod $ranks $hosts -}}
{{- fail (printf "the layout has %d ranks, which %d hosts cannot share equally: change layout or hosts" $ranks $hosts) -}}
{{- end -}}
{{- if and (gt (int $layout.dataParallel) 1) (mod $layout.dataParallel $hosts) -}}
{{- fail (printf "%d replicas cannot be shared out equally over %d hosts: make layout.dataParallel a multiple of hosts, or 1 for one replica over all hosts" (int $layout.dataParallel) $hosts) -}}
{{- end -}}
{{- div $ranks $hosts -}}
{{- end -}}

{{- define "shoal.clusterSecret" -}}
{{- default (printf "%s-cluster" (include "shoal.fullname" .)) .Values.clusterKey.existingSecret -}}
{{- end -}}

{{- define "shoal.claim" -}}
{{- if .Values.cache.existingClaim -}}
{{- .Values.cache.existingClaim -}}
{{- else if .Values.cache.create -}}
{{- printf "%s-models" (include "shoal.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "shoal.readinessPath" -}}
{{- if .Values.probes.readinessPath -}}
{{- .Values.probes.readinessPath -}}
{{- else if gt (int .Values.layout.dataParallel) 1 -}}
/health
{{- else -}}
/ready
{{- end -}}
{{- end -}}
