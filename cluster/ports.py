"""Free ports on loopback."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterable

# On Linux, Ray replaces 127.0.0.1 by the machine's public address, but accepts the next address.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def free_ports(names: Iterable[str], *, host: str = LOOPBACK) -> dict[str, int]:
    """A free port of ``host`` for each name; all differ, because all are held at the same time."""
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in names:
            listener = stack.enter_context(socket.socket())
            listener.bind((host, 0))
            ports[name] = listener.getsockname()[1]
        return ports
