"""What the scheduler and the device engine would make of a bare loop's times: they run in virtual time.

Where a measured rate is far below, the loss is in the host's work (protocols, processes, the interpreter), which the
prediction knows as two constants only; where both are below the bare loop's best, it is in the batches.
"""

from collections.abc import Sequence

from benchmarks.gpu.context import Figures
from tutti.devices.simulated import Costs
from tutti.serving.device_simulation import Workload, predict

# A card on PCIe 5 copies so many bytes a nanosecond, and a thread that waits for an event wakes so much later.
_BYTES_A_NS = 50.0
_WAKE_NS = 40_000
_HOST_NS = 150_000
_REQUEST_NS = 200_000


def rate(rows: Sequence[Figures], clients: int, request_rows: int, max_rows: int, row_bytes: tuple[int, int]) -> float:
    """Rows a second for so many clients; 0.0 where the bare loop's times of two batches are not there.

    `rows` are those of `limits`; `row_bytes` are what a row takes on its way in and out.
    """
    times = {int(row["batch"]): _alone_ns(row, sum(row_bytes)) for row in rows if _has_time(row)}
    if len(times) < 2:
        return 0.0
    least, most = min(times), max(times)
    row_ns = max(0.0, (times[most] - times[least]) / (most - least))
    workload = Workload(
        clients=clients,
        rows=request_rows,
        max_batch_size=max_rows,
        execution_ns=max(1, int(times[least] - row_ns * least)),
        row_ns=row_ns,
        bytes_in=row_bytes[0],
        bytes_out=row_bytes[1],
        host_ns=_HOST_NS,
        request_ns=_REQUEST_NS,
        costs=Costs(
            copy_ns=5_000,
            copy_in_ns_per_byte=1 / _BYTES_A_NS,
            copy_out_ns_per_byte=1 / _BYTES_A_NS,
            wake_ns=_WAKE_NS,
        ),
        seconds=max(0.5, 40 * times[most] / 1e9),
    )
    return predict(workload).rate * request_rows


def _has_time(row: Figures) -> bool:
    return "graph alone ms" in row or "alone ms" in row


def _alone_ns(row: Figures, row_bytes: int) -> float:
    """The execution of a batch: the bare call without its copies."""
    alone_ms = min(float(row[key]) for key in ("graph alone ms", "alone ms") if key in row)
    return max(1.0, alone_ms * 1e6 - int(row["batch"]) * row_bytes / _BYTES_A_NS)
