# syntax=docker/dockerfile:1
# An image of the server (docs/deploy.md). PyTorch's wheels bring CUDA's libraries; the host needs NVIDIA's driver and
# the NVIDIA Container Toolkit. On a machine without a GPU the image runs on the CPU.
#
#   docker build -t csm .
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v csm-data:/data csm --model sesame/csm-1b --max-streams 32

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/csm
COPY deploy/constraints.txt /src/deploy/constraints.txt
# The dependencies are a layer of their own: a change of the code does not download PyTorch again.
RUN /opt/csm/bin/pip install --constraint /src/deploy/constraints.txt torch torchaudio moshi
COPY pyproject.toml README.md LICENSE /src/
COPY csm /src/csm
COPY kernels /src/kernels
COPY weights /src/weights
RUN /opt/csm/bin/pip install --constraint /src/deploy/constraints.txt "/src[serve]"

FROM python:3.11.13-slim-bookworm
# A C++ compiler: Triton builds its launchers when a kernel is first used, and the CPU's ops are built likewise.
# The base image pins the Debian release; a pinned package version would vanish with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 csm \
    && useradd --uid 10001 --gid csm --no-create-home --shell /usr/sbin/nologin csm \
    && install --directory --owner csm --group csm /data
COPY --from=build /opt/csm /opt/csm
# /data keeps downloaded weights, compiled kernels, self-check results and voices from one container to the next.
ENV PATH=/opt/csm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    CSM_HOME=/data/csm \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads 6.6 GB: /health answers once the model is loaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["csm", "serve", "--host", "0.0.0.0", "--port", "8000", "--voices", "/data/csm/voices"]
CMD ["--model", "sesame/csm-1b"]
