"""A second verifier of signatures, written from FORMAT.md alone: no line of modelpress."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_der_public_key

from tests.golden.second_reader import need, sha256, strict_json


def encode(payload_type, payload):
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def check_signature(store: Path, name: str, digest: str, public_key: bytes):
    """Raises unless the key signed the pack."""
    key_id = hashlib.sha256(public_key).hexdigest()
    data = (store / "packs" / name / f"{digest}.sigs" / f"{key_id}.json").read_bytes()
    need(len(data) <= 16384, "length")
    envelope = strict_json(data)
    need(set(envelope) == {"payload", "payloadType", "signatures"}, "fields of the envelope")
    ((key, text),) = [(one["keyid"], one["sig"]) for one in envelope["signatures"]]
    need(key == key_id, "key")
    path = f"packs/{name}/{digest}.json"
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicate": {"name": name},
        "predicateType": "urn:modelpress:pack:v1",
        "subject": [{"digest": {"sha256": digest}, "name": path}],
    }
    payload = base64.b64decode(envelope["payload"], validate=True)
    need(payload == json.dumps(statement, sort_keys=True, separators=(",", ":")).encode(), "statement")
    need(envelope["payloadType"] == "application/vnd.in-toto+json", "payload type")
    load_der_public_key(public_key).verify(base64.b64decode(text, validate=True), encode(envelope["payloadType"], payload))


def read_log(store: Path, name: str, alias: str, public_key: bytes):
    """All entries; raises unless the chain holds and the key signed the newest."""
    entries, previous = [], None
    for path in sorted((store / "packs" / name / "refs" / alias).glob("*.json")):
        data = path.read_bytes()
        entry = strict_json(data)
        need(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() == data, "spelling")
        need(path.name == f"{entry['number']:08d}.json" and entry["number"] == len(entries) + 1, "number")
        need((entry["name"], entry["alias"], entry["previous"]) == (name, alias, previous), "name or chain")
        need(entry["format_version"] == (2 if "signature" in entry else 1), "format version")
        entries.append(entry)
        previous = sha256(data)
    rest = {key: value for key, value in entries[-1].items() if key != "signature"}
    payload = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    signed = encode("application/vnd.modelpress.pointer+json", payload)
    load_der_public_key(public_key).verify(base64.b64decode(entries[-1]["signature"]["sig"], validate=True), signed)
    return entries
