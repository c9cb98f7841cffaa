"""The ports of front-end processes: what may hold them, and what may not. And what they log."""

import asyncio
import itertools
import socket

import pytest

from tutti.frontends.processes.pool import FrontEnds
from tutti.frontends.processes.worker_task import Logging
from tutti.frontends.size_limits import Limits
from tutti.observing.logs import Logs

_OPTIONS = {
    "alone": (socket.SO_REUSEADDR,),
    "shared": (socket.SO_REUSEPORT,),
    "both": (socket.SO_REUSEADDR, socket.SO_REUSEPORT),
}


def listener(options: tuple[int, ...]) -> socket.socket:
    one = socket.socket()
    for option in options:
        one.setsockopt(socket.SOL_SOCKET, option, 1)
    one.bind(("127.0.0.1", 0))
    one.listen()
    return one


@pytest.mark.parametrize("before", _OPTIONS)
def test_a_port_whose_last_server_closed_connections_may_be_taken(before: str) -> None:
    """They stay with the kernel for a minute, with the options of the server's socket."""
    with listener(_OPTIONS[before]) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        with server.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
            assert client.recv(1) == b""
    client.close()
    if before == "alone":  # it is held, in earnest
        with socket.socket() as plain, pytest.raises(OSError, match="in use"):
            plain.bind(("127.0.0.1", port))
    front_ends = FrontEnds(2)
    assert front_ends.reserve("127.0.0.1", port) == port
    asyncio.run(front_ends.stop())


@pytest.mark.parametrize("other", _OPTIONS)
def test_a_port_where_another_server_listens_may_not(other: str) -> None:
    with listener(_OPTIONS[other]) as server, pytest.raises(OSError, match="in use"):
        FrontEnds(2).reserve("127.0.0.1", server.getsockname()[1])


@pytest.mark.parametrize(("processes", "share"), [(1, 400), (2, 200), (4, 100), (8, 100)])
def test_each_process_may_hold_its_share_but_at_least_one_request(processes: int, share: int) -> None:
    limits = Limits(max_input_size=100, max_inflight_bytes=400)
    assert limits.of_each(processes).max_inflight_bytes == share


@pytest.mark.parametrize("kinds", list(itertools.product([True, False], repeat=3)))
def test_front_end_processes_log_what_the_flags_say(kinds: tuple[bool, bool, bool]) -> None:
    settings = Logs(2, "", "json", kinds).settings()
    assert Logging(settings).logs().settings() == settings
