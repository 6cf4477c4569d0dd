#!/usr/bin/env bash
# A run on GKE through xpk, which makes a JobSet of it. Edit the MY_ words, then:
#
#   scripts/pods/gke_xpk.sh create     start the run, or go on with it
#   scripts/pods/gke_xpk.sh list       what runs
#   scripts/pods/gke_xpk.sh delete     SIGTERM: save and end
#
# Before, once: docs/pods.md (a cluster, MY_STORAGE mounted at /shared, and an image).
set -euo pipefail

PROJECT=MY_PROJECT
ZONE=MY_ZONE
CLUSTER=MY_CLUSTER
IMAGE=MY_IMAGE                       # docker build --build-arg DEVICE=tpu
STORAGE=MY_STORAGE                   # of "xpk storage create"
RUN=MY_RUN                           # small letters, digits and hyphens

where=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")

case "${1:-}" in
  create)
    # xpk starts everything again at 42 and 127 to 255; 75 is added, and 1 to 4 end the workload: they need you.
    # exec: xpk passes SIGTERM on to the first process of the command.
    # The time for a save after SIGTERM; a Spot VM gives its pods 15 seconds by default, whatever is asked here.
    xpk workload create "${where[@]}" --workload="$RUN" \
      --tpu-type=v5litepod-256 --num-slices=1 \
      --docker-image="$IMAGE" --storage="$STORAGE" \
      --max-restarts=100 --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=300 \
      --command="exec /shared/gaze_jax/scripts/pods/run.sh" ;;
  list)
    xpk workload list "${where[@]}" ;;
  delete)
    xpk workload delete "${where[@]}" --workload="$RUN" ;;
  *)
    sed -n '2,6p' "$0" >&2
    exit 2 ;;
esac
