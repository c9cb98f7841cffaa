"""Breaks with gRPC clients whose messages grow beyond what the server may hold, and with those that do not read.

The native server receives each message whole before it tells of it, and keeps each answer until its client has read it,
without a word. So the system is asked: how much has come on each connection, beyond the calls that it has brought, and
how much of its answers has been taken. Nothing is asked while the process does not grow and no large answer is under
way. Knows nothing of HTTP/2; Linux only.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tutti.frontends.freed_memory import Freed
from tutti.frontends.grpc.unread_answers import Unread
from tutti.frontends.held_bytes import COUNTED_BYTES, STALLED_S, WRITE_TIMEOUT_S, Holding

_log = logging.getLogger(__name__)

_INTERVAL_S = 0.02
_WATCHING_INTERVAL_S = 0.002
# Until the process has grown by so much, no connection is looked at.
GROWTH_BYTES = 32 * 1024 * 1024
# Watching ends when for so long no connection has had more than this under way.
_CALM_BYTES = 1024 * 1024
_CALM_S = 1.0
# Where linux/tcp.h has tcpi_bytes_acked and tcpi_bytes_received.
_BYTES_ACKED_AT = 120
_BYTES_RECEIVED_AT = 128
_U64 = struct.Struct("=Q")
# How an address begins: its family, and of IP the port.
_ADDRESS = struct.Struct("=HH")
_libc = ctypes.CDLL(None)
# How long `stop` waits for a look that is under way.
_LAST_LOOK_S = 5.0
# The least that a call has besides its message: headers, and a frame's head for each part of it.
_HEADERS_BYTES = 64
_FRAMES_SHARE = 1024
_INT = struct.Struct("=i")
# After an answer to an unknown peer, calls are asked for their peers for so long.
_NAMES_PEERS_S = 600.0
# At most one part in so many of all that may be held may be owed to unknown peers.
_UNKNOWN_SHARE = 2


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
    """Decides which connection to break with, from what has come on each and from the calls made of it. Pure."""

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
            connection.taken += size + _HEADERS_BYTES + size // _FRAMES_SHARE

    def saw(self, received: dict[str, int], held: int, streamed: int = 0) -> str:
        """What has come on each connection until now, and since the last time on streams, nobody knows on which.

        Returns the peer that is to go, "" for none.
        """
        known = self._connections
        self._connections = {
            peer: Connection(peer, size, min(known[peer].taken, size) if peer in known else size)
            for peer, size in received.items()
        }
        if not self._connections:
            return ""
        for connection in sorted(self._connections.values(), key=lambda connection: -connection.under_way):
            credit = min(streamed, connection.under_way)
            connection.taken += credit
            streamed -= credit
        largest = max(self._connections.values(), key=lambda connection: connection.under_way)
        total = held + sum(connection.under_way for connection in self._connections.values())
        return largest.peer if total > self._limit and largest.under_way > _CALM_BYTES else ""


class Guard:
    """A thread that watches the connections to one port of this process.

    What is owed to clients counts in `holding`. The two halves share nothing but that: a peer may be in both.
    """

    def __init__(self, limit: int, holding: Holding, under_way: Callable[[], int], sees_streams: bool = True) -> None:
        """`limit` is for messages under way with all that is held; `under_way()` says how many bytes of answers the
        native server has, at most. Without `sees_streams` the holding is not told of theirs, since another process has
        them. Raises OSError where the system does not tell.
        """
        self._watch = Watch(limit)
        self._limit = limit
        self._sees_streams = sees_streams
        self._holding = holding
        self._under_way = under_way
        self._unread = Unread()
        self._unread_lock = threading.Lock()
        self._names_peers_until = 0.0
        self._streamed = 0
        self._files: dict[str, int] = {}
        self._port = 0
        self._has_ended = threading.Event()
        self._lock = threading.Lock()
        self._freed = Freed()
        self._base = self._freed.resident_bytes()
        self._calm_since = 0.0
        self._thread = threading.Thread(target=self._run, name="grpc-guard", daemon=True)

    @property
    def is_watching(self) -> bool:
        """Whether `took` has to be told of each call."""
        return bool(self._watch)

    @property
    def needs_peers(self) -> bool:
        """Whether calls should say whom they are from, whatever it costs."""
        return bool(self._watch) or time.monotonic() < self._names_peers_until

    @property
    def is_owing(self) -> bool:
        """Whether `may_give` has to be asked for small answers, too."""
        return bool(self._unread)

    def start(self, port: int) -> None:
        self._port = port
        self._thread.start()

    def stop(self) -> None:
        self._has_ended.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_LOOK_S)

    def took(self, peer: str, size: int) -> None:
        with self._lock:
            self._watch.took(peer, size)

    def took_unknown(self) -> None:
        """Calls have come from unknown peers: begin to count anew, and have the next calls name theirs."""
        self._names_peers_until = time.monotonic() + _NAMES_PEERS_S
        with self._lock:
            self._watch.end()

    def may_give(self, peer: str, size: int) -> bool:
        """An answer is about to be given to a peer, "" where nobody knows: whether there is room. It counts then.

        It breaks with clients that do not read, where that makes room for the next ones.
        """
        now = time.monotonic()
        with self._unread_lock:
            if size >= COUNTED_BYTES:
                self._names_peers_until = now + _NAMES_PEERS_S  # a call with a deadline hides its peer
            if not peer and size >= COUNTED_BYTES:
                most = self._holding.limit // _UNKNOWN_SHARE
                if self._unread.unknown + size > most:
                    self._look_at_unread(now)
                if self._unread.unknown and self._unread.unknown + size > most:
                    return False
            if size < COUNTED_BYTES:
                self._holding.change(size)
            elif not self._holding.take(size):
                self._look_at_unread(now)
                if not self._holding.take(size):
                    self._make_room(size, now)
                    return False
            taken = self._taken(peer) if peer else None
            if peer and taken is None:
                self._holding.give(size)
            else:
                self._unread.gives(peer, size, taken or 0, now)
        return True

    def _make_room(self, size: int, now: float) -> None:
        wanted = self._holding.held + size - self._holding.limit
        for peer in self._unread.stalled(now, STALLED_S):
            if wanted <= 0:
                return
            wanted -= self._end_unread(peer, now)

    def _end_unread(self, peer: str, now: float) -> int:
        """Break with a client; returns what is owed to it, which counts until the native server has let it go."""
        _log.warning("%s: it does not read its gRPC answers", peer)
        with contextlib.suppress(OSError), _borrowed(self._file(peer)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        return self._unread.waits(peer, now)

    def _look_at_unread(self, now: float) -> None:
        peers = self._unread.peers
        if not all(map(self._is_there, peers)):  # looked up once for all of them, if any has gone
            self._files = self._found()
        for peer in peers:
            taken = self._taken(peer) if self._is_there(peer) else None
            self._holding.give(self._unread.saw(peer, taken, now))
        self._holding.give(self._unread.forgive(max(0, self._under_way())))

    def _taken(self, peer: str) -> int | None:
        """How many bytes for a peer the system has taken; None for one that has gone."""
        try:
            with _borrowed(self._file(peer)) as connection:
                return taken(connection)
        except OSError:
            return None

    def _file(self, peer: str) -> int:
        """The descriptor of a peer's connection. Raises OSError when it has gone."""
        if not self._is_there(peer):
            self._files = self._found()
        if peer not in self._files:
            raise ConnectionError("it has gone")
        return self._files[peer]

    def _is_there(self, peer: str) -> bool:
        """Whether its connection is where it was found; a descriptor's number may be another's by now."""
        known = self._files.get(peer, -1)
        return known >= 0 and _port_of(known) == self._port and _peer_of(known) == peer

    def _found(self) -> dict[str, int]:
        return {peer: connection.fileno() for peer, connection in _connections(self._port)}

    def _run(self) -> None:
        pause_s = _INTERVAL_S
        while not self._has_ended.wait(pause_s):
            begin = time.monotonic()
            try:
                self._look(begin)
                if self._unread:
                    with self._unread_lock:
                        self._look_at_unread(begin)
                        for peer in self._unread.stalled(begin, WRITE_TIMEOUT_S):
                            self._end_unread(peer, begin)
            except Exception:
                _log.exception("connections could not be looked at")
            least_s = _WATCHING_INTERVAL_S if self.is_watching else _INTERVAL_S
            pause_s = max(least_s, 4 * (time.monotonic() - begin))

    def _look(self, now: float) -> None:
        before, self._streamed = self._streamed, self._holding.streamed
        resident = self._freed.give_back(self._holding.held, now)
        self._base = min(self._base, resident)
        if not self._watch and resident < self._base + GROWTH_BYTES:
            return
        come: dict[str, int] = {}
        for peer, connection in _connections(self._port):
            with contextlib.suppress(OSError):  # it is gone
                come[peer] = received(connection)
        with self._lock:
            largest = self._watch.saw(come, self._holding.held, self._streamed - before)
            is_calm = self._watch.is_calm
        if largest and not self._sees_streams and resident - self._base < self._limit // 2:
            with self._lock:
                self._watch.end()  # the bytes were a stream's, whose messages are in another process
        elif largest:
            _log.warning("%s: its gRPC messages are larger than what is left of --max-inflight-bytes", largest)
            self._break_with(largest)
        if not is_calm or not self._calm_since:
            self._calm_since = now
        elif now - self._calm_since > _CALM_S:
            self._calm_since = 0.0
            self._base = resident
            with self._lock:
                self._watch.end()

    def _break_with(self, peer: str) -> None:
        for name, connection in _connections(self._port):
            if name == peer:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket over a descriptor that the server keeps. Raises OSError when the connection has gone."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def _peer_of(descriptor: int) -> str:
    """ "" for one that has gone, or is no connection."""
    try:
        with _borrowed(descriptor) as connection:
            return peer_name(connection.getpeername())
    except (OSError, ValueError):  # a Unix socket has no address of two parts
        return ""


def _connections(port: int) -> Iterator[tuple[str, socket.socket]]:
    """This process's connections on a port of its own, by their peers as the native server names them.

    Each is to be used before the next one is asked for: they are the server's own, no copies, for which there may be
    no descriptors left.
    """
    for name in os.listdir("/proc/self/fd"):
        connection: socket.socket | None = None
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:") or _port_of(int(name)) != port:
                continue
            connection = socket.socket(fileno=int(name))
            yield peer_name(connection.getpeername()), connection
        except OSError:  # without a peer, or gone
            continue
        finally:
            if connection is not None:
                connection.detach()


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
    return _told(connection, _BYTES_RECEIVED_AT)


def taken(connection: socket.socket) -> int:
    """How many bytes a process has written to a TCP connection. Raises OSError where the system does not tell."""
    # The acknowledged bytes are read first: bytes acknowledged between the two are then missed, never counted twice.
    acknowledged = _told(connection, _BYTES_ACKED_AT)
    return acknowledged + int(_INT.unpack(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(_INT.size)))[0])


def _told(connection: socket.socket, offset: int) -> int:
    size = offset + _U64.size
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    return int(_U64.unpack_from(info, offset)[0]) if len(info) == size else 0
