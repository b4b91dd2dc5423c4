{{- define "aod.fullname" -}}
{{- if contains "agent-on-demand" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-agent-on-demand" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{/* Labels of a component: (dict "root" $ "name" "gateway") */}}
{{- define "aod.selector" -}}
app.kubernetes.io/name: agent-on-demand
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{- define "aod.labels" -}}
{{ include "aod.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "aod.image" -}}
{{ printf "%s/%s:%s" .root.Values.image.repository .name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end }}

{{/* The Secret of a component, with a file for each of its secrets. */}}
{{- define "aod.secret" -}}
{{- $own := (index .root.Values .name | default dict).existingSecret -}}
{{ $own | default (printf "%s-%s" (include "aod.fullname" .root) .name) }}
{{- end }}

{{- define "aod.services" -}}
gateway: { secrets: [NATS_PASSWORD] }
auth: { secrets: [NATS_PASSWORD, DATABASE_URL] }
{{- $shared := or .Values.trial.enabled (index .Values "credential-vault" "sharedSpritesToken") }}
credential-vault: { secrets: [NATS_PASSWORD, DATABASE_URL, FIELD_ENCRYPTION_KEY{{ if $shared }}, SPRITES_API_KEY{{ end }}] }
scheduler: { secrets: [NATS_PASSWORD, DATABASE_URL, AOD_DEPLOYMENT_ID] }
sprite-runner: { secrets: [NATS_PASSWORD] }
{{- if include "aod.modelGatewayUrl" . }}
model-gateway: { secrets: [NATS_PASSWORD] }
{{- end }}
{{- end }}

{{/* Where sandboxes reach the model gateway; empty: providers' keys are put into sandboxes. */}}
{{- define "aod.modelGatewayUrl" -}}
{{- $values := index .Values "model-gateway" -}}
{{- if $values.enabled -}}
{{- if $values.url }}{{ $values.url }}{{ else if .Values.trial.enabled }}http://{{ include "aod.fullname" . }}-model-gateway:8780{{ end -}}
{{- end -}}
{{- end }}

{{/* Not empty for components that read and write files. */}}
{{- define "aod.hasFiles" -}}
{{- if and .root.Values.files.enabled (has .name (list "gateway" "scheduler" "sprite-runner")) }}true{{ end -}}
{{- end }}

{{/* Not empty for components that mount the volume of files. */}}
{{- define "aod.hasFilesVolume" -}}
{{- if and (include "aod.hasFiles" .) (not .root.Values.files.s3.bucket) }}true{{ end -}}
{{- end }}

{{/* Not empty for components that use a bucket. */}}
{{- define "aod.hasBucket" -}}
{{- if and (include "aod.hasFiles" .) .root.Values.files.s3.bucket }}true{{ end -}}
{{- end }}

{{- define "aod.bucketPort" -}}
{{- $url := .Values.files.s3.endpoint | default "https://aws" | urlParse -}}
{{ $url.host | splitList ":" | rest | last | default (eq $url.scheme "http" | ternary "80" "443") }}
{{- end }}

{{- define "aod.filesPath" -}}
/var/lib/aod/files
{{- end }}

{{- define "aod.filesClaim" -}}
{{ .Values.files.existingClaim | default (printf "%s-files" (include "aod.fullname" .)) }}
{{- end }}

{{- define "aod.natsUrl" -}}
{{- if .Values.trial.enabled }}nats://{{ include "aod.fullname" . }}-nats:4222{{ else }}{{ required "nats.url: where NATS is (or trial.enabled)" .Values.nats.url }}{{ end -}}
{{- end }}

{{- define "aod.natsPort" -}}
{{ (include "aod.natsUrl" . | splitList "," | first | urlParse).host | splitList ":" | rest | first | default "4222" }}
{{- end }}

{{- define "aod.spritesBaseUrl" -}}
{{- if .Values.trial.enabled }}http://{{ include "aod.fullname" . }}-local-sprites:8778{{ else }}{{ index .Values "sprite-runner" "spritesBaseUrl" }}{{ end -}}
{{- end }}

{{- define "aod.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "aod.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/* Settings of a service that come from values. */}}
{{- define "aod.settings" -}}
{{- $values := index .root.Values .name -}}
{{- $settings := dict "NATS_URL" (include "aod.natsUrl" .root) "AOD_LOG_JSON" (toString .root.Values.logs.json) "RUST_LOG" .root.Values.logs.level "AOD_STOP_GRACE_SECONDS" "25" -}}
{{- if .root.Values.nats.caSecret }}{{ $_ := set $settings "NATS_CA_FILE" "/nats-ca/ca.crt" }}{{ end -}}
{{- if .root.Values.traces.endpoint }}{{ $_ := set $settings "OTEL_EXPORTER_OTLP_ENDPOINT" .root.Values.traces.endpoint }}{{ end -}}
{{- if and (has .name (list "gateway" "credential-vault")) (not .root.Values.trial.enabled) }}{{ $_ := set $settings "AOD_ENV" "production" }}{{ end -}}
{{- if include "aod.hasFilesVolume" . }}{{ $_ := set $settings "AOD_FILES_URL" (printf "file://%s" (include "aod.filesPath" .root)) }}{{ end -}}
{{- if include "aod.hasBucket" . }}
{{- with .root.Values.files.s3 }}
{{- $_ := set $settings "AOD_FILES_URL" (printf "s3://%s/%s" .bucket .prefix | trimSuffix "/") }}
{{- $_ := set $settings "AOD_FILES_S3_REGION" .region }}
{{- $_ := set $settings "AOD_FILES_S3_PATH_STYLE" (toString .pathStyle) }}
{{- if .endpoint }}{{ $_ := set $settings "AOD_FILES_S3_ENDPOINT" .endpoint }}{{ end }}
{{- end }}
{{- end }}
{{- if eq .name "gateway" }}
{{- /* Until every proxy has heard that this pod goes. */}}
{{- $_ := set $settings "AOD_DRAIN_SECONDS" "10" }}
{{- $_ := set $settings "AOD_TRUSTED_PROXIES" (toString $values.trustedProxies) }}
{{- /* By its name in the cluster, for `helm test` and others there; and as the world calls it. */}}
{{- $own := printf "%s-gateway" (include "aod.fullname" .root) }}
{{- $hosts := concat (list $own (printf "%s.%s.svc" $own .root.Release.Namespace)) $values.allowedHosts $values.httpRoute.hostnames }}
{{- if $values.ingress.enabled }}{{ $hosts = append $hosts $values.ingress.host }}{{ end }}
{{- $_ := set $settings "ALLOWED_HOSTS" (ternary "*" ($hosts | uniq | join ",") .root.Values.trial.enabled) }}
{{- if .root.Values.trial.enabled }}{{ $_ := set $settings "ENABLE_SHELL_RUNTIME" "true" }}{{ end }}
{{- end }}
{{- if eq .name "sprite-runner" }}
{{- $_ := set $settings "SPRITES_BASE_URL" (include "aod.spritesBaseUrl" .root) }}
{{- $_ := set $settings "AOD_RUNNER_CONCURRENCY" (toString $values.concurrency) }}
{{- with include "aod.modelGatewayUrl" .root }}{{ $_ := set $settings "AOD_MODEL_GATEWAY_URL" . }}{{ end }}
{{- end }}
{{- if has .name (list "sprite-runner" "model-gateway") }}
{{- if and .root.Values.trial.enabled .root.Values.trial.scriptedModel }}
{{- $model := printf "http://%s-scripted-model:8779" (include "aod.fullname" .root) }}
{{- range list "ANTHROPIC" "OPENAI" "GOOGLE" }}{{ $_ := set $settings (printf "AOD_MODEL_BASE_URL_%s" .) $model }}{{ end }}
{{- end }}
{{- end }}
{{- $settings := mergeOverwrite $settings (deepCopy .root.Values.env) (deepCopy $values.env) }}
{{- range $key, $value := $settings }}
- { name: {{ $key }}, value: {{ toString $value | quote }} }
{{- end }}
{{- end }}
