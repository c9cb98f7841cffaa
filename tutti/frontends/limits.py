"""How large requests may be, and what a pattern of headers may begin with.

Known to the command, which shows the defaults, and to every front-end.
"""

from dataclasses import dataclass

# Before a pattern of headers, as Triton's library of regular expressions has it.
CASE_MATTERS = "(?-i)"


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes."""

    max_input_size: int = 64 * 1024 * 1024
    max_grpc_message_size: int = 2**31 - 1
    # Of all requests and answers together that a process holds; what is beyond is refused.
    max_inflight_bytes: int = 256 * 1024 * 1024
