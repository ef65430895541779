# The worker: it runs the flows, on CPUs and on NVIDIA GPUs. It also deploys them, and serves with CUDA.
#
#   docker build -f infra/images/worker.Dockerfile -t modelpress-worker:0.2.0 .
#
# torch's wheels bring CUDA's libraries; the machine gives the driver (NVIDIA Container Toolkit). Never built here.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/modelpress
ENV PATH=/opt/modelpress/bin:$PATH
COPY pyproject.toml README.md LICENSE infra/images/constraints.txt ./
COPY modelpress modelpress
COPY tasks tasks
COPY flows flows
COPY registry registry
COPY serving serving
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo,docker,kubernetes]'
# The decoders are compiled once, here: a container that starts has them. numba uses no cache that it may not write.
ENV NUMBA_CACHE_DIR=/opt/modelpress/numba \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m modelpress.codec && chmod -R a+rwX /opt/modelpress/numba

FROM python:3.11.14-slim-bookworm
# Triton compiles the launcher of a GPU kernel at its first use, and needs a C compiler for it. Debian's, of this release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home modelpress && install -d -o 10001 -g 10001 /data
COPY --from=build --chown=10001:10001 /opt/modelpress /opt/modelpress
COPY infra/images/with-secrets /usr/local/bin/with-secrets
# Where deployments load the flows from, on every worker of this image.
WORKDIR /app
COPY flows flows
COPY configs configs
COPY infra/prefect.yaml infra/prefect.yaml
COPY infra/pools infra/pools
ENV PATH=/opt/modelpress/bin:$PATH \
    CC=gcc \
    MODELPRESS_CHECKOUT=/app \
    MODELPRESS_HOME=/data \
    NUMBA_CACHE_DIR=/opt/modelpress/numba \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_WORKER_WEBSERVER_HOST=0.0.0.0 \
    PREFECT_WORKER_WEBSERVER_PORT=8080
USER 10001:10001
# The worker's own health server: it fails when the worker has not polled for a while.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT []
CMD ["prefect", "worker", "start", "--pool", "cpu", "--type", "process", "--with-healthcheck"]
