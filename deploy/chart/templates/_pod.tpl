{{/* The arguments of the container: `serve` with its flags. Takes root and role: server or worker. */}}
{{- define "shoal.args" -}}
{{- $values := .root.Values -}}
{{- $layout := $values.layout -}}
- serve
- {{ $values.model | quote }}
{{- if eq .role "server" }}
- --host
- {{ $values.listen | quote }}
- --port
- "8000"
- --shutdown-timeout
- {{ $values.shutdownTimeout | quote }}
{{- if $values.servedModelName }}
- --served-model-name
- {{ $values.servedModelName | quote }}
{{- end }}
{{- end }}
- --tensor-parallel-size
- {{ $layout.tensorParallel | quote }}
- --pipeline-parallel-size
- {{ $layout.pipelineParallel | quote }}
- --data-parallel-size
- {{ $layout.dataParallel | quote }}
{{- if $layout.expertParallel }}
- --enable-expert-parallel
{{- end }}
{{- if gt (int $values.hosts) 1 }}
{{- if gt (int $layout.dataParallel) 1 }}
- --data-parallel-size-local
- {{ div $layout.dataParallel $values.hosts | quote }}
- --data-parallel-address
- $(LWS_LEADER_ADDRESS)
- --data-parallel-rpc-port
- "29550"
{{- else }}
- --nnodes
- $(LWS_GROUP_SIZE)
- --node-rank
- $(LWS_WORKER_INDEX)
- --master-addr
- $(LWS_LEADER_ADDRESS)
{{- end }}
{{- if eq .role "worker" }}
- --headless
{{- end }}
{{- end }}
{{- range $values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A pod template. Takes root and role: server or worker. */}}
{{- define "shoal.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $ranks := int (include "shoal.ranksPerHost" $root) -}}
{{- $drain := add $values.preStopSeconds $values.shutdownTimeout -}}
metadata:
  labels:
    {{- include "shoal.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  # Services named shoal would set variables such as SHOAL_PORT, which would be taken for options.
  enableServiceLinks: false
  automountServiceAccountToken: false
  {{- with $values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  # The time before the drain, the drain, and what clients and processes need to end.
  terminationGracePeriodSeconds: {{ add $drain 20 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: shoal
      image: {{ printf "%s:%s" $values.image.repository (default $root.Chart.AppVersion $values.image.tag) | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if and (eq .role "worker") (gt (int $values.layout.dataParallel) 1) }}
      # The number of the first replica of this host. Two dollar signs are one for Kubernetes.
      command:
        - tini
        - --
        - sh
        - -c
        - exec shoal-entrypoint "$@" --data-parallel-start-rank $$((LWS_WORKER_INDEX * {{ div $values.layout.dataParallel $values.hosts }}))
        - sh
      {{- end }}
      args:
        {{- include "shoal.args" . | nindent 8 }}
      env:
        - name: HF_HOME
          value: /models
        - name: HOME
          value: /tmp
        {{- if gt (int $values.hosts) 1 }}
        - name: SHOAL_CLUSTER_KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "shoal.clusterSecret" $root }}
              key: {{ $values.clusterKey.key }}
        {{- end }}
        {{- if and $values.apiKey.existingSecret (eq .role "server") }}
        - name: SHOAL_API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ $values.apiKey.existingSecret }}
              key: {{ $values.apiKey.key }}
        {{- end }}
        {{- with $values.hfToken }}
        {{- if .existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .existingSecret }}
              key: {{ .key }}
        {{- end }}
        {{- end }}
        {{- with $values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if eq .role "server" }}
      ports:
        - name: http
          containerPort: 8000
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 6
        failureThreshold: {{ max 1 (div $values.probes.startupSeconds 5) }}
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 6
        failureThreshold: {{ max 1 (div $values.probes.livenessSeconds 10) }}
      readinessProbe:
        httpGet: {path: {{ include "shoal.readinessPath" $root }}, port: http}
        periodSeconds: 5
        timeoutSeconds: 6
        failureThreshold: 2
      {{- end }}
      lifecycle:
        preStop:
          exec:
            # Load balancers need time to see that this pod ends. A worker stays until its leader has drained.
            command: [sleep, {{ ternary $values.preStopSeconds $drain (eq .role "server") | quote }}]
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      {{- $resources := deepCopy $values.resources }}
      {{- if $values.gpu.enabled }}
      {{- $resources = merge (dict "limits" (dict $values.gpu.resourceName $ranks)) $resources }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - name: models
          mountPath: /models
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
  volumes:
    - name: models
      {{- if include "shoal.claim" $root }}
      persistentVolumeClaim:
        claimName: {{ include "shoal.claim" $root }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.sharedMemory }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
