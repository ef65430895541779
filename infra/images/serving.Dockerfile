# The server: it reads packs and answers. No orchestration, no training; torch and ONNX Runtime for the CPU.
#
#   docker build -f infra/images/serving.Dockerfile -t modelpress-serving:0.2.0 .
#
# It listens for others, so it needs keys: mount the file that `modelpress access create` writes, and name it in
# MODELPRESS_SERVING_KEYS_FILE. Without keys it does not start (docs/access.md).
#
# On a GPU take the worker's image: `modelpress serve --provider CUDAExecutionProvider`. Never built here.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/modelpress
ENV PATH=/opt/modelpress/bin:$PATH
COPY pyproject.toml README.md LICENSE infra/images/constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
RUN pip install --no-cache-dir --constraint constraints.txt \
    boto3 \
    cryptography \
    grpcio \
    httptools \
    httpx \
    numba \
    numpy \
    onnx \
    onnxruntime \
    orjson \
    packaging \
    protobuf \
    prometheus-client \
    psutil \
    pydantic \
    pydantic-settings \
    pyjwt \
    pyyaml \
    rich \
    safetensors \
    starlette \
    tokenizers \
    typer \
    uvicorn \
    uvloop \
    zstandard
COPY modelpress modelpress
COPY serving serving
RUN pip install --no-cache-dir --no-deps .
ENV NUMBA_CACHE_DIR=/opt/modelpress/numba \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m modelpress.codec && chmod -R a+rwX /opt/modelpress/numba

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home modelpress && install -d -o 10001 -g 10001 /data
COPY --from=build --chown=10001:10001 /opt/modelpress /opt/modelpress
COPY infra/images/with-secrets /usr/local/bin/with-secrets
WORKDIR /data
ENV PATH=/opt/modelpress/bin:$PATH \
    MODELPRESS_HOME=/data \
    MODELPRESS_SERVING_HOST=0.0.0.0 \
    MODELPRESS_SERVING_PORT=8080 \
    NUMBA_CACHE_DIR=/opt/modelpress/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/v2/health/live', timeout=4)"]
ENTRYPOINT []
CMD ["modelpress", "serve"]
