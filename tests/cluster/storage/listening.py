"""A server that writes down what S3 clients send, with or without a certificate."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BEGUN = b"""<InitiateMultipartUploadResult>
<Bucket>bucket</Bucket><Key>folder/key</Key><UploadId>1</UploadId>
</InitiateMultipartUploadResult>"""
LISTED = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"


@dataclass
class Ear:
    """A server that writes down what arrives, has no objects, begins uploads, refuses the rest."""

    url: str = ""
    heard: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def header(self, part: str) -> list[str]:
        return [
            value for _, headers in self.heard for name, value in headers.items() if part in name
        ]


@contextlib.contextmanager
def listening(certificate: Path | None = None, *, late_s: float = 0) -> Iterator[Ear]:
    """``late_s``: how far the clock of the server is behind."""
    ear = Ear()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() - late_s)

        def handle_expect_100(self) -> bool:
            return True

        def refuse(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            ear.heard.append((self.path, headers))
            self.close_connection = True
            answer = LISTED if "list-type=2" in self.path else b""
            if self.path.endswith("?uploads"):
                answer = BEGUN
            self.send_response(200 if answer else 403)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = refuse

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that does not trust the certificate

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        ear.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield ear
        finally:
            server.shutdown()
            thread.join()


def write_certificate(path: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path
