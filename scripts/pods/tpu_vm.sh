#!/usr/bin/env bash
# A run on a Cloud TPU slice of TPU VMs (gcloud, queued resources). Edit the MY_ words, then:
#
#   scripts/pods/tpu_vm.sh request     ask for the slice; it waits in a queue
#   scripts/pods/tpu_vm.sh state       ACTIVE: it is there; SUSPENDED: it was preempted, so release and request
#   scripts/pods/tpu_vm.sh install     mount the shared folder and install, on every host
#   scripts/pods/tpu_vm.sh train       start the run on every host, or go on with it
#   scripts/pods/tpu_vm.sh log         what the first host prints
#   scripts/pods/tpu_vm.sh stop        SIGTERM: save and end
#   scripts/pods/tpu_vm.sh release     give the slice back
set -euo pipefail

PROJECT=MY_PROJECT
ZONE=MY_ZONE
TPU=MY_TPU
NFS=MY_NFS                           # server:/share, such as a Filestore: the workdir must be one folder for all hosts
TYPE=v5litepod-256                   # 64 hosts with 4 chips each
RUNTIME=v2-alpha-tpuv5-lite          # the VM image for v5e; v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
TIER=(--spot)                        # cheap, and taken away at any time; empty: on demand

on_hosts() {  # the same command on every host
  gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" --worker="${2:-all}" --command="$1"
}

queue() {
  local verb="$1"
  shift
  gcloud compute tpus queued-resources "$verb" "$TPU" --project="$PROJECT" --zone="$ZONE" "$@"
}

case "${1:-}" in
  request)
    queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${TIER[@]}" ;;
  state)
    queue describe --format="value(state.state)" ;;
  install)
    on_hosts "sudo mkdir -p /shared && (mountpoint -q /shared || sudo mount -t nfs $NFS /shared)"
    # A checkout of this project is at /shared/gaze_jax; each host has its own environment.
    on_hosts "python3 -m venv ~/gaze && ~/gaze/bin/pip install -q -c /shared/gaze_jax/constraints.txt '/shared/gaze_jax[tpu,video]'" ;;
  train)
    # On each host again.sh starts the run again while its status says so; nohup, since the ssh session ends.
    on_hosts 'cd /shared/gaze_jax && PATH=~/gaze/bin:$PATH nohup scripts/pods/again.sh /shared/gaze_jax/scripts/pods/run.sh > ~/run.log 2>&1 < /dev/null & sleep 1' ;;
  log)
    on_hosts 'tail -n 50 -f ~/run.log' 0 ;;
  stop)
    on_hosts 'pkill -TERM -f scripts/pods/again.sh' ;;
  release)
    queue delete --force ;;
  *)
    sed -n '2,10p' "$0" >&2
    exit 2 ;;
esac
