"""TLS for gRPC, with the certificate that HTTP has, and its change without a restart."""

from __future__ import annotations

import grpc

from serving.tls import Certificate, Pem


def credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """What grpcio asks at each handshake whether there is another certificate by now."""
    used = certificate.pem

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        if certificate.pem is used:
            return None
        used = certificate.pem
        return _configuration(used)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used),
        newer,  # type: ignore[arg-type]  # None: nothing new, says grpcio's documentation
        used.client_ca is not None,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.client_ca)
