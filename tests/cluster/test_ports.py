"""Free ports on loopback."""

from __future__ import annotations

import socket

from cluster.ports import LOOPBACK, free_ports


def test_every_name_gets_a_free_port_of_its_own() -> None:
    names = [f"listener-{number}" for number in range(50)]
    ports = free_ports(names)
    assert list(ports) == names
    assert len(set(ports.values())) == len(names)
    for port in list(ports.values())[:5]:
        with socket.socket() as listener:
            listener.bind((LOOPBACK, port))
