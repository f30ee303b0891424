{{- define "yuan-grpc.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "yuan-grpc.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "yuan-grpc.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "yuan-grpc.selectorLabels" -}}
app.kubernetes.io/name: {{ include "yuan-grpc.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "yuan-grpc.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "yuan-grpc.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "yuan-grpc.metadata" -}}
name: {{ include "yuan-grpc.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "yuan-grpc.labels" . | nindent 2 }}
{{- end }}

{{- define "yuan-grpc.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "yuan-grpc.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "yuan-grpc.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "yuan-grpc.cacheClaim" -}}
{{- if .Values.cache.existingClaim }}
{{- .Values.cache.existingClaim }}
{{- else if .Values.cache.create }}
{{- printf "%s-cache" (include "yuan-grpc.fullname" .) }}
{{- end }}
{{- end }}

{{/* The arguments after `yuan-grpc serve --host 0.0.0.0`, which is the entry point of the image. */}}
{{- define "yuan-grpc.args" -}}
- --port={{ .Values.server.port }}
- --grace-seconds={{ .Values.server.graceSeconds }}
- --withdraw-seconds={{ .Values.server.withdrawSeconds }}
- --log-level={{ .Values.server.logLevel }}
- --log-format={{ .Values.server.logFormat }}
{{- if gt (int .Values.server.frontends) 1 }}
- --frontends={{ .Values.server.frontends }}
{{- end }}
{{- if .Values.server.loadReports }}
- --load-reports
{{- end }}
{{- if .Values.server.vllmEngine }}
- --vllm-engine
{{- end }}
{{- if .Values.http.enabled }}
- --http-port={{ .Values.http.port }}
{{- end }}
{{- if .Values.metrics.enabled }}
- --metrics-port={{ .Values.metrics.port }}
{{- end }}
{{- if .Values.tls.secretName }}
- --tls-cert-file=/etc/yuan-grpc/tls/tls.crt
- --tls-key-file=/etc/yuan-grpc/tls/tls.key
- --unix-socket=/tmp/yuan-grpc.sock
{{- if .Values.tls.requireClientCertificate }}
- --tls-client-ca-file=/etc/yuan-grpc/tls/ca.crt
{{- end }}
{{- else }}
- --allow-plaintext
{{- end }}
{{- if .Values.tokens.secretName }}
- --token-file=/etc/yuan-grpc/tokens/{{ .Values.tokens.key }}
{{- end }}
{{- if .Values.model.name }}
- --model={{ .Values.model.name }}
{{- end }}
{{- if .Values.lora.existingClaim }}
- --enable-lora
- --lora-folder={{ .Values.lora.mountPath }}
{{- end }}
{{- with .Values.server.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A probe of a service of grpc.health.v1. The kubelet does not speak TLS: the command uses a unix socket then. */}}
{{- define "yuan-grpc.probe" -}}
{{- if .root.Values.tls.secretName -}}
exec:
  command: [yuan-grpc, probe, {{ .service }}, --address, "unix:/tmp/yuan-grpc.sock"]
{{- else -}}
grpc:
  port: {{ .root.Values.server.port }}
  service: {{ .service }}
{{- end }}
{{- end }}
