# The gaze-jax command with the versions of constraints.txt.
#   docker build --tag gaze-jax .                            for CPUs
#   docker build --tag gaze-jax --build-arg DEVICE=cuda .    for NVIDIA GPUs; DEVICE=tpu for TPUs
#   docker run --rm --volume "$PWD":/work gaze-jax generate --help
FROM python:3.11-slim

ARG DEVICE=cpu

COPY . /source
RUN case "$DEVICE" in \
      cpu) extras=video,plot ;; \
      cuda|tpu) extras=video,plot,"$DEVICE" ;; \
      *) echo "DEVICE=$DEVICE must be cpu, cuda or tpu." >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --constraint /source/constraints.txt "/source[$extras]" \
    && rm -r /source

# Not as root: checkpoints and answers are written into the folder that is mounted here.
RUN useradd --create-home gaze
USER gaze
WORKDIR /work

ENTRYPOINT ["gaze-jax"]
CMD ["--help"]
