"""moto's S3 server on loopback, a second implementation beside SeaweedFS."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from cluster.ports import LOOPBACK


@contextlib.contextmanager
def moto_server() -> Iterator[Mapping[str, str]]:
    """Runs in this process; gives the variables that its clients need."""
    from moto.server import ThreadedMotoServer  # takes a second

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "moto",
            "AWS_SECRET_ACCESS_KEY": "moto-secret",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.stop()
