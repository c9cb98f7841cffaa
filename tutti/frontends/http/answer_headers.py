"""What an HTTP answer says of its own request: the id by which logs know it, and where its time went. Pure.

`x-request-id` is the client's own, where it may be a header, else one of this process; `server-timing` is in
milliseconds. Both are written for every answer, so what a batch's answers share is made once for all of them.
"""

import itertools
import os
import re
import time
from functools import lru_cache

from tutti.core.types import Times
from tutti.observing.statistics import BatchTimes

ID_HEADER = b"x-request-id"
TIMING_HEADER = b"server-timing"

_MAY_BE_ID = re.compile(rb"[!-~]{1,128}")
# Ids begin with the process and its start, so that no two processes make the same, even if they share a number.
_PREFIX = b"%x-%x-" % (os.getpid(), time.time_ns() // 1_000_000 & 0xFFFFFF)
_numbers = itertools.count(1)
_PLACES = tuple([b"%x\r\n\r\n" % place for place in range(256)])


def id_of(sent: bytes) -> bytes:
    """What a client has sent as its request's id, where it may come back: no more than 128 visible characters of ASCII.

    Else b"".
    """
    return sent if _MAY_BE_ID.fullmatch(sent) else b""


def new_id() -> bytes:
    return b"%b%x" % (_PREFIX, next(_numbers))


def new_ids() -> bytes:
    """The beginning of the ids of a batch: each goes on with a number of its own."""
    return b"%b%x." % (_PREFIX, next(_numbers))


def place(number: int) -> bytes:
    """How an id of a batch goes on, to the end of the answer's head."""
    return _PLACES[number] if number < len(_PLACES) else b"%x\r\n\r\n" % number


def request_id(body_id: str) -> bytes:
    """The header's value for a request that came without: the id in its body, where it has one, else a new one."""
    return (id_of(body_id.encode("utf-8", "replace")) if body_id else b"") or b"%b%x" % (_PREFIX, next(_numbers))


# Times are told in hundredths of milliseconds. Quick requests take few different times, so their texts are kept.


@lru_cache(maxsize=8192)
def _ms(hundredths: int) -> bytes:
    return b"%.2f" % (hundredths / 100)


def _phases(queue_ns: int, compute_ns: int, total_ns: int) -> bytes:
    shown = _ms(queue_ns // 10_000), _ms(compute_ns // 10_000), _ms(total_ns // 10_000)
    return b"queue;dur=%b, compute;dur=%b, total;dur=%b" % shown


def timing(arrived_ns: int, times: Times | None, now_ns: int) -> bytes:
    """The header's value, milliseconds: queue and compute as far as they are known, and all until now."""
    passed_ns = now_ns - arrived_ns if arrived_ns else 0
    if type(times) is BatchTimes:  # the usual case; it is called at least once for each batch
        start_ns = times.start_ns
        return _phases(start_ns - arrived_ns, times.end_ns - start_ns, passed_ns)
    if times is None:
        return total(passed_ns)
    spent = times.spent(arrived_ns)
    if spent.is_cached:
        return b"cache;desc=hit, " + total(passed_ns)
    return _phases(spent.queue_ns, spent.compute_ns, passed_ns)


def total(passed_ns: int) -> bytes:
    """The header's value where no more is known than how long it took."""
    return b"total;dur=%b" % _ms(passed_ns // 10_000)
