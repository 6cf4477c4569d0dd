# The gaze-jax command with the versions of constraints.txt.
#   docker build --tag gaze-jax .                            for CPUs
#   docker build --tag gaze-jax --build-arg DEVICE=cuda .    for NVIDIA GPUs; DEVICE=tpu for TPUs
#   docker run --rm --user "$(id -u):$(id -g)" --env HOME=/tmp --volume "$PWD":/work gaze-jax generate --help
# With a GPU add --gpus all. PyTorch is not in it, so convert --verify is not either.
FROM python:3.11-slim

ARG DEVICE=cpu

# g++ compiles the decoding of CPUs, and is not needed afterwards.
RUN --mount=type=bind,target=/source,rw \
    case "$DEVICE" in \
      cpu) extras=video,plot ;; \
      cuda|tpu) extras=video,plot,"$DEVICE" ;; \
      *) echo "DEVICE=$DEVICE must be cpu, cuda or tpu." >&2; exit 1 ;; \
    esac \
    && apt-get update && apt-get install --yes --no-install-recommends g++ \
    && pip install --no-cache-dir --constraint /source/constraints.txt "/source[$extras]" \
    && apt-get purge --yes --auto-remove g++ && rm -rf /var/lib/apt/lists/*

# Not as root; --user says who owns what is written into the folder that is mounted here.
RUN useradd --create-home gaze
USER gaze
WORKDIR /work

ENTRYPOINT ["gaze-jax"]
CMD ["--help"]
