"""A KMS that speaks the JSON protocol of AWS's over HTTP, with real encryption inside: Encrypt, Decrypt, their errors.

Written from https://docs.aws.amazon.com/kms/latest/APIReference/API_Encrypt.html and API_Decrypt.html. It checks no
signature of a request; it is told by access key who may do what.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ACCOUNT = "arn:aws:kms:us-east-1:111122223333:key/"
KEY_ID = re.compile(r"key/([0-9a-f-]+)$")


class RefusedError(Exception):
    """An error as KMS answers it."""

    def __init__(self, code: str, status: int = 400) -> None:
        super().__init__(code)
        self.code, self.status = code, status


class KmsServer:
    """Keys `one` and `two` under aliases; `rights`: operations by access key; `failing`: HTTP 500 so often."""

    def __init__(self) -> None:
        self.keys = {alias: (f"{ACCOUNT}{alias}-0000", AESGCM(os.urandom(32))) for alias in ("one", "two")}
        self.rights: dict[str, set[str]] = {}
        self.failing = 0
        self.requests: list[tuple[str, dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

            def do_POST(self) -> None:
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                operation = self.headers["X-Amz-Target"].removeprefix("TrentService.")
                who = self.headers["Authorization"].split("Credential=")[1].split("/")[0]
                try:
                    status, answer = 200, server.answer(operation, who, document)
                except RefusedError as refusal:
                    status, answer = refusal.status, {"__type": refusal.code, "message": f"refused: {refusal.code}"}
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, operation: str, who: str, document: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((operation, document))
        if self.failing:
            self.failing -= 1
            raise RefusedError("KMSInternalException", 500)
        if operation not in self.rights.get(who, set()):
            raise RefusedError("AccessDeniedException")
        arn, cipher = self._key(document["KeyId"])
        context = json.dumps(document.get("EncryptionContext", {}), sort_keys=True).encode()
        if operation == "Encrypt":
            nonce = os.urandom(12)
            plain = base64.b64decode(document["Plaintext"])
            if len(plain) > 4096:
                raise RefusedError("ValidationException")
            blob = arn.encode() + b"\0" + nonce + cipher.encrypt(nonce, plain, context)
            return {"KeyId": arn, "CiphertextBlob": base64.b64encode(blob).decode()}
        named, _, rest = base64.b64decode(document["CiphertextBlob"]).partition(b"\0")
        if named not in [arn.encode() for arn, _ in self.keys.values()]:
            raise RefusedError("InvalidCiphertextException")
        if named != arn.encode():
            raise RefusedError("IncorrectKeyException")
        try:
            plain = cipher.decrypt(rest[:12], rest[12:], context)
        except InvalidTag:
            raise RefusedError("InvalidCiphertextException") from None
        return {"KeyId": arn, "Plaintext": base64.b64encode(plain).decode()}

    def _key(self, key_id: str) -> tuple[str, AESGCM]:
        for alias, (arn, cipher) in self.keys.items():
            if key_id in (f"alias/{alias}", arn):
                return arn, cipher
        raise RefusedError("NotFoundException")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
