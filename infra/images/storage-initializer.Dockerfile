# The storage initializer of KServe: it fills a model server's folder from a pack, and ends.
#
#   docker build -f infra/images/storage-initializer.Dockerfile -t modelpress-storage-initializer .
#
# It installs what `modelpress kserve-init` imports and no more: no orchestration, no training, torch for the CPU.
# tests/kserve holds that the command runs without the rest. The image itself was never built.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE infra/images/constraints.txt ./
COPY modelpress modelpress
RUN python -m venv /opt/modelpress
ENV PATH=/opt/modelpress/bin:$PATH
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
RUN pip install --no-cache-dir --constraint constraints.txt \
    boto3 \
    numba \
    numpy \
    onnx \
    onnxruntime \
    pydantic \
    pydantic-settings \
    pyyaml \
    rich \
    safetensors \
    typer \
    zstandard
RUN pip install --no-cache-dir --no-deps .

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/modelpress /opt/modelpress
# The decoders are compiled once, here: a container that starts has them. numba uses no cache that it may not write.
ENV PATH=/opt/modelpress/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/opt/modelpress/numba
RUN python -m modelpress.codec && chmod -R a+rwX /opt/modelpress/numba
# KServe's own initializer runs as this user; with Istio the webhook may choose another, which is no matter here.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["modelpress", "kserve-init"]
