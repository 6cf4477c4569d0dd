#!/usr/bin/env bash
# The run itself: the same command on every host, at every start. Edit it; all launchers of this folder call it.
#
# A workdir belongs to one config, so a change of anything but the mesh, and what logs and saves, needs a new one.
set -euo pipefail

# Compiled programs, so that a restart begins in seconds instead of minutes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-/shared/programs}"

# checkpoint_every: a machine that is taken away without notice costs at most so many steps.
# exec: signals reach the run, not this script.
exec gaze-jax train --config=cambrian_video:4b \
  --config.init_from=/shared/runs/image \
  --config.data.path=/shared/data/mix.jsonl \
  --config.mesh.data=4 --config.mesh.fsdp=64 --config.batch_size=256 \
  --config.checkpoint_every=200 --config.keep_checkpoints=3 \
  --workdir=/shared/runs/video \
  --distributed --heartbeat_seconds=600
