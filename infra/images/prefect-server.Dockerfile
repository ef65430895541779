# Prefect's server: the API with the UI, or the services behind it, or the migration of the database.
#
#   docker build -f infra/images/prefect-server.Dockerfile -t modelpress-prefect-server:3.8.8 .
#
# Never built here.
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/prefect
ENV PATH=/opt/prefect/bin:$PATH
COPY infra/images/constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt prefect==3.8.8 prefect-redis==0.3.0

FROM python:3.11.14-slim-bookworm
RUN useradd --uid 10001 --user-group --create-home prefect
COPY --from=build /opt/prefect /opt/prefect
COPY infra/images/with-secrets /usr/local/bin/with-secrets
WORKDIR /home/prefect
# The UI's files are copied at the start, to a place that may be written.
ENV PATH=/opt/prefect/bin:$PATH \
    PREFECT_HOME=/tmp/prefect \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_API_HOST=0.0.0.0 \
    PREFECT_SERVER_API_PORT=4200 \
    DO_NOT_TRACK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 4200
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:4200/api/ready', timeout=4)"]
ENTRYPOINT []
CMD ["prefect", "server", "start"]
