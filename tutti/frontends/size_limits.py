"""How large requests may be, and what a pattern of headers may begin with.

Known to the command, which shows the defaults, and to every front-end.
"""

from dataclasses import dataclass, replace

# Before a pattern of headers, as Triton's library of regular expressions has it.
CASE_MATTERS = "(?-i)"


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes."""

    max_input_size: int = 64 * 1024 * 1024
    max_grpc_message_size: int = 2**31 - 1
    # All requests and answers that are held, together; what would exceed it is refused.
    max_inflight_bytes: int = 256 * 1024 * 1024
    # Settings of gRPC's connections, by the names in keepalive.SETTINGS.
    grpc_settings: tuple[tuple[str, int], ...] = ()

    def of_each(self, processes: int) -> "Limits":
        """What each of several front-end processes may hold: its share of all, but no less than one request."""
        least = min(self.max_input_size, self.max_inflight_bytes)
        return replace(self, max_inflight_bytes=max(least, self.max_inflight_bytes // processes))
