"""What leaves this machine is verified TLS. S3 has its test in tests/faults; here: links, KMS, and the doctor."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from modelpress import keys
from modelpress.cipher import LocalKey, secrets
from modelpress.cipher.wrapping import make_key_file
from modelpress.doctor import Finding, _keys, _mlflow, _transport
from modelpress.errors import StoreUnavailableError
from modelpress.settings import Settings
from modelpress.store import open_store
from modelpress.store.kms import KmsKey
from modelpress.store.links import Link, Links
from tests.cipher.kms_server import KmsServer
from tests.conftest import OpenS3, S3Server
from tests.faults.proxy import FaultProxy


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody but its file vouches for, and its key behind it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path / "certificate.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    return path


@pytest.fixture
def context(certificate: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate)
    return made


@pytest.fixture
def kms() -> Iterator[KmsServer]:
    server = KmsServer()
    yield server
    server.close()


@pytest.mark.s3
def test_links_over_tls_are_followed_only_to_a_server_that_is_vouched_for(
    open_s3: OpenS3,
    s3_server: S3Server,
    context: ssl.SSLContext,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with FaultProxy(s3_server.endpoint, context) as proxy:
        writer = open_s3("writer", s3_endpoint_url=proxy.endpoint)
        writer.put(keys.blob("0" * 64), b"content")
        url = writer.link(keys.blob("0" * 64), 60)
        assert url.startswith("https://")
        link = Link.model_validate({"url": url, "size_bytes": 7, "modified": datetime.now(UTC)})
        objects = {keys.blob("0" * 64): link}
        expires = datetime.now(UTC) + timedelta(seconds=60)
        Links(name="demo", pack="0" * 64, expires=expires, objects=objects).write(tmp_path / "links.json")
        settings = Settings.model_validate({"s3_attempts": 1})
        place = f"links+file://{tmp_path}/links.json"
        assert open_store(place, settings).get(keys.blob("0" * 64)) == b"content"
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StoreUnavailableError, match="CERTIFICATE_VERIFY_FAILED") as refused:
            open_store(place, settings).get(keys.blob("0" * 64))
        assert "X-Amz" not in str(refused.value)


def test_kms_over_tls_is_asked_only_where_it_is_vouched_for(
    kms: KmsServer, context: ssl.SSLContext, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s", "AWS_CA_BUNDLE": certificate}.items():
        monkeypatch.setenv(name, str(value))
    kms.rights = {"A": {"Encrypt", "Decrypt"}}
    store = open_store(str(tmp_path / "store"))
    with FaultProxy(kms.endpoint, context) as proxy:
        settings = Settings.model_validate({"kms_endpoint_url": proxy.endpoint, "s3_attempts": 1})
        made = secrets.current(store, "demo", [KmsKey("alias/one", settings)])
        assert secrets.find(store, "demo", made[0], [KmsKey("alias/one", settings)]) == made[1]
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(StoreUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            secrets.find(store, "demo", made[0], [KmsKey("alias/one", settings)])


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("http://10.0.0.7:9000", "warn"),
        ("http://storage.example.org", "warn"),
        ("http://localhost.example.org", "warn"),
        ("https://storage.example.org", "ok"),
        ("http://127.0.0.1:9000", "ok"),
        ("http://[::1]:9000", "ok"),
        ("http://localhost:9000", "ok"),
        ("", "ok"),
    ],
)
def test_the_doctor_warns_of_what_leaves_in_clear(address: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    finding = _transport(Settings.model_validate({"s3_endpoint_url": address, "tracking_uri": "", "key": ""}))
    assert finding.status == status
    assert ("MODELPRESS_S3_ENDPOINT_URL" in finding.found) == (status == "warn")


def test_the_doctor_names_keys_and_whoever_else_can_read_them(tmp_path: Path) -> None:
    key_id = make_key_file(tmp_path / "key")
    settings = Settings.model_validate({"key_file": str(tmp_path / "key")})
    assert _keys(settings) == Finding("keys", "ok", f"{LocalKey.algorithm} key {key_id}")
    (tmp_path / "key").chmod(0o644)
    finding = _keys(settings)
    assert (finding.status, finding.fix) == ("warn", f"chmod 600 {tmp_path / 'key'}")
    assert _keys(Settings.model_validate({"key_file": "", "key": "", "kms_key_id": ""})).found.startswith("none")


def test_the_doctor_shows_no_login_of_an_address() -> None:
    finding = _mlflow(Settings.model_validate({"tracking_uri": "http://name:password@127.0.0.1:9"}))
    assert finding.status == "fail"
    assert "password" not in finding.found
