#!/usr/bin/env bash
# Runs this host's node of a Ray cluster in a container named `node`, which ends with this script.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/run_cluster.sh IMAGE HEAD_IP --head|--worker HF_HOME [DOCKER_ARGUMENT...]

  IMAGE            an image with shoal and Ray (deploy/Dockerfile with --build-arg EXTRAS=hf,ray)
  HEAD_IP          the address of the head's host, as other hosts reach it
  --head|--worker  start the head on one host, and a worker on each of the others
  HF_HOME          this host's folder for models from the hub
  DOCKER_ARGUMENT  further arguments of `docker run`, such as -e GLOO_SOCKET_IFNAME=eth1

Then, on any of the hosts:
  docker exec -it node shoal serve MODEL -tp 8 -pp 2 --distributed-executor-backend ray --host 0.0.0.0
TEXT
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

case "${1:-}" in -h | --help) usage && exit ;; esac
[ $# -ge 4 ] || refuse "4 arguments are needed, got $#"
image=$1 head_ip=$2 kind=$3 hf_home=$4
shift 4

case "$kind" in
    --head) start="ray start --block --head --port=6379 --node-ip-address=$head_ip" ;;
    --worker) start="ray start --block --address=$head_ip:6379" ;;
    *) refuse "the third argument must be --head or --worker, got $kind" ;;
esac
[[ $head_ip =~ ^[0-9A-Za-z.:-]+$ ]] || refuse "HEAD_IP must be an address or a name, got $head_ip"
[ -d "$hf_home" ] || refuse "HF_HOME must be a folder, and $hf_home is none"
hf_home=$(cd "$hf_home" && pwd)
command -v docker >/dev/null || refuse "there is no docker on PATH"
if docker container inspect node >/dev/null 2>&1; then
    refuse "a container named node exists on this host: end its script, or run 'docker rm -f node'"
fi

devices=()
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    devices=(--gpus all)
fi
environment=(-e HF_HOME=/huggingface)
for name in SHOAL_CLUSTER_KEY HF_TOKEN; do # the values stay out of the command line, which other users can see
    if [ -n "${!name:-}" ]; then environment+=(-e "$name"); fi
done

# In the background, so that the trap does not have to wait for it when a signal comes.
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'docker rm -f node >/dev/null 2>&1 || true' EXIT
docker run --name node --network host --shm-size 10gb "${devices[@]}" -v "$hf_home:/huggingface" "${environment[@]}" \
    "$@" --entrypoint /bin/bash "$image" -c "$start" &
wait $!
