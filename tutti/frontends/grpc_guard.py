"""Breaks with gRPC clients whose messages grow beyond what the server may hold, while they come.

The native server receives each message whole before it tells of it. So the system is asked: how much has come on each
connection, beyond the calls that it has brought. Nothing is asked while the process does not grow. Knows nothing of
HTTP/2; Linux only.
"""

import contextlib
import ctypes
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_log = logging.getLogger(__name__)

_INTERVAL_S = 0.02
_WATCHING_INTERVAL_S = 0.002
# The process may grow by so much before anything is looked at.
GROWTH_BYTES = 32 * 1024 * 1024
# Connections are watched for so long after the last one that had more than this under way.
_CALM_BYTES = 1024 * 1024
_CALM_S = 1.0
# Where linux/tcp.h has tcpi_bytes_received.
_BYTES_RECEIVED_AT = 128
_U64 = struct.Struct("=Q")
# How an address begins: its family, and of IP the port.
_ADDRESS = struct.Struct("=HH")
_libc = ctypes.CDLL(None)
# How long a look may take that is under way when the guard is to end.
_LAST_LOOK_S = 5.0


@dataclass(slots=True)
class Connection:
    """`received` bytes have come, of which `taken` are known to be of calls, or of before it was watched."""

    peer: str
    received: int
    taken: int

    @property
    def under_way(self) -> int:
        return max(0, self.received - self.taken)


class Watch:
    """Which connection is to be broken with. Pure: told what has come on each, and what calls were of."""

    def __init__(self, limit: int) -> None:
        """Bytes that all messages under way may have, with what is held besides."""
        self._limit = limit
        self._connections: dict[str, Connection] = {}

    def __bool__(self) -> bool:
        return bool(self._connections)

    @property
    def is_calm(self) -> bool:
        return all(connection.under_way < _CALM_BYTES for connection in self._connections.values())

    def end(self) -> None:
        self._connections.clear()

    def took(self, peer: str, size: int) -> None:
        """A call of so many bytes has come from a peer."""
        connection = self._connections.get(peer)
        if connection is not None:
            connection.taken += size

    def saw(self, received: dict[str, int], held: int) -> str:
        """What has come on each connection until now; returns the peer that is to go, "" for none."""
        known = self._connections
        self._connections = {
            peer: Connection(peer, size, known[peer].taken if peer in known else size)
            for peer, size in received.items()
        }
        if not self._connections:
            return ""
        largest = max(self._connections.values(), key=lambda connection: connection.under_way)
        total = held + sum(connection.under_way for connection in self._connections.values())
        return largest.peer if total > self._limit and largest.under_way > _CALM_BYTES else ""


class Guard:
    """A thread that watches the connections to one port of this process."""

    def __init__(self, limit: int, held: Callable[[], int]) -> None:
        """`held()` says how much is held besides. Raises OSError where the system does not tell."""
        self._watch = Watch(limit)
        self._held = held
        self._port = 0
        self._has_ended = threading.Event()
        self._lock = threading.Lock()
        self._memory = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 as long as the guard lives
        self._base = self._resident_bytes()
        self._calm_since = 0.0
        self._thread = threading.Thread(target=self._run, name="grpc-guard", daemon=True)

    @property
    def is_watching(self) -> bool:
        """Whether it has to be told of calls."""
        return bool(self._watch)

    def start(self, port: int) -> None:
        self._port = port
        self._thread.start()

    def stop(self) -> None:
        self._has_ended.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_LOOK_S)
        if not self._thread.is_alive():
            self._memory.close()

    def took(self, peer: str, size: int) -> None:
        with self._lock:
            self._watch.took(peer, size)

    def took_unknown(self) -> None:
        """Calls have come, nobody knows from whom: begin anew."""
        with self._lock:
            self._watch.end()

    def _run(self) -> None:
        pause_s = _INTERVAL_S
        while not self._has_ended.wait(pause_s):
            begin = time.monotonic()
            try:
                self._look(begin)
            except Exception:
                _log.exception("connections could not be looked at")
            least_s = _WATCHING_INTERVAL_S if self.is_watching else _INTERVAL_S
            pause_s = max(least_s, 4 * (time.monotonic() - begin))

    def _look(self, now: float) -> None:
        resident = self._resident_bytes()
        self._base = min(self._base, resident)
        if not self._watch and resident < self._base + GROWTH_BYTES:
            return
        come: dict[str, int] = {}
        for peer, one in _connections(self._port):
            with contextlib.suppress(OSError):  # it is gone
                come[peer] = received(one)
        with self._lock:
            largest = self._watch.saw(come, self._held())
            is_calm = self._watch.is_calm
        if largest:
            _log.warning("%s: its gRPC messages are larger than what is left of --max-inflight-bytes", largest)
            self._break_with(largest)
        if not is_calm or not self._calm_since:
            self._calm_since = now
        elif now - self._calm_since > _CALM_S:
            self._calm_since = 0.0
            self._base = resident
            with self._lock:
                self._watch.end()

    def _resident_bytes(self) -> int:
        return int(os.pread(self._memory.fileno(), 256, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _break_with(self, peer: str) -> None:
        for name, one in _connections(self._port):
            if name == peer:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


def _connections(port: int) -> Iterator[tuple[str, socket.socket]]:
    """This process's connections on a port of its own, by their peers as the native server names them.

    Each is to be used before the next one is asked for: they are the server's own, no copies, for which there may be
    no descriptors left.
    """
    for name in os.listdir("/proc/self/fd"):
        one: socket.socket | None = None
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:") or _port_of(int(name)) != port:
                continue
            one = socket.socket(fileno=int(name))
            yield peer_name(one.getpeername()), one
        except OSError:  # without a peer, or gone
            continue
        finally:
            if one is not None:
                one.detach()


def _port_of(descriptor: int) -> int:
    """A socket's own port; -1 where it has none.

    Asked of the system itself: with a default timeout, which any library may set, Python makes each socket that it
    looks at one that does not wait, and it may be somebody's who does.
    """
    size = ctypes.c_uint32(_ADDRESS.size)
    address = ctypes.create_string_buffer(_ADDRESS.size)
    if _libc.getsockname(descriptor, address, ctypes.byref(size)) or size.value < _ADDRESS.size:
        return -1
    family, port = _ADDRESS.unpack(address.raw)
    return socket.ntohs(port) if family in (socket.AF_INET, socket.AF_INET6) else -1


def peer_name(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def received(connection: socket.socket) -> int:
    """How many bytes have come on a TCP connection. Raises OSError where the system does not tell."""
    size = _BYTES_RECEIVED_AT + _U64.size
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    return int(_U64.unpack_from(told, _BYTES_RECEIVED_AT)[0]) if len(told) == size else 0
