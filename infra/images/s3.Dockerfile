# The S3 server of the tests, Debian 12's Ceph RGW, for a stack on one machine: its data is in memory.
#
#   docker build -f infra/images/s3.Dockerfile -t modelpress-s3:16.2 .
#
# Never built here; infra/s3/server.py, which it runs, is what the test suite runs.
FROM debian:12.12-slim
# Debian's own builds, of this release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ceph-mon ceph-osd python3 radosgw \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home s3
COPY infra/s3/server.py /opt/s3/server.py
USER 10001:10001
WORKDIR /tmp
EXPOSE 7480
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 7480), 4).close()"]
ENTRYPOINT ["python3", "/opt/s3/server.py", "run", "--listen", "0.0.0.0:7480"]
CMD ["--folder", "/tmp/s3"]
