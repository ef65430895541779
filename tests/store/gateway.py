"""A gateway in front of the S3 server, for the tests of what a store makes of unfit answers."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.conftest import S3Server


class Proxy:
    """A small gateway in front of the S3 server: a real server behind it that answers unfitly.

    With `drop_header`, requests go on without that header, signed anew (it is part of the signature). Of the answers
    to ranged GETs, the first `cut` break off in the middle; of those to PUTs, the first `lost` never arrive.
    """

    def __init__(self, server: S3Server, *, drop_header: str = "", cut: int = 0, lost: int = 0) -> None:
        upstream, proxy = urlsplit(server.endpoint).netloc, self
        self.cut, self.gets, self.lost = cut, 0, lost

        def sign_anew(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, str]:
            kept = {
                name: headers[name] for name in headers if name.lower() in ("content-type", "range", "if-none-match")
            }
            kept.pop(drop_header, None)
            request = AWSRequest(method, server.endpoint + path, kept, body)
            S3SigV4Auth(Credentials(*server.writer), "s3", server.region).add_auth(request)
            return dict(request.headers.items())

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                if drop_header:
                    headers = sign_anew(self.command, self.path, body, headers)
                connection = http.client.HTTPConnection(upstream, timeout=30)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                if self.command == "PUT" and proxy.lost:
                    proxy.lost -= 1
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                connection.close()
                if self.command == "GET" and "Content-Range" in answer.headers:
                    proxy.gets += 1
                    if proxy.gets <= proxy.cut:
                        self.wfile.write(content[: len(content) // 2])
                        self.close_connection = True
                        return
                if self.command != "HEAD":
                    self.wfile.write(content)

        for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{verb}", Handler._pass_on)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
