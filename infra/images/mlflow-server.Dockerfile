# MLflow's server, with logins, a PostgreSQL database and artifacts in S3.
#
#   docker build -f infra/images/mlflow-server.Dockerfile -t modelpress-mlflow-server:3.17.2 .
#
# Never built here.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/mlflow
ENV PATH=/opt/mlflow/bin:$PATH
COPY infra/images/constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt 'mlflow[auth]==3.17.2' psycopg2-binary==2.9.13 boto3

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home mlflow
COPY --from=build /opt/mlflow /opt/mlflow
COPY infra/images/with-secrets /usr/local/bin/with-secrets
WORKDIR /tmp
ENV PATH=/opt/mlflow/bin:$PATH \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT []
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
