"""No test reaches out: the guard of conftest.py stops each way to another machine."""

import os
import socket
import urllib.request

import pytest

ELSEWHERE = ("192.0.2.1", 80)  # an address that is set apart for documents

pytestmark = pytest.mark.skipif("NETWORK" in os.environ, reason="the network is allowed")


@pytest.mark.parametrize(
    "reach",
    [
        lambda tcp, udp: socket.create_connection(("example.com", 443)),
        lambda tcp, udp: tcp.connect(ELSEWHERE),
        lambda tcp, udp: tcp.connect_ex(ELSEWHERE),
        lambda tcp, udp: udp.sendto(b"x", ELSEWHERE),
        lambda tcp, udp: urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPHandler()
        ).open("http://example.com/"),
    ],
    ids=["name", "connect", "connect_ex", "sendto", "urllib"],
)
def test_another_machine_is_out_of_reach(reach):
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.settimeout(1)
        with pytest.raises(pytest.fail.Exception, match=r"to \('.*: tests use no network"):
            reach(tcp, udp)


def test_this_machine_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port), 5) as client, server.accept()[0] as end:
            client.sendall(b"x")
            assert end.recv(1) == b"x"
