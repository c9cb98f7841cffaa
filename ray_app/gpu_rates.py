"""What a GPU would serve of a model by itself: the scheduler and the device engine in virtual time, with told times.

The times are the model's `tutti.gpu_latency_ms`, "ROWS:MILLISECONDS,...", as the GPU kit's `limits` measures them.
Without them nothing is said: what executions took where a model was exported says nothing of a GPU.
"""

import math
from collections.abc import Sequence

from tutti.backends import graph_buckets
from tutti.core.dtypes import NUMPY
from tutti.devices.simulated import Costs
from tutti.repository.model_config import ModelConfig, TensorSpec
from tutti.serving.device_simulation import Workload, predict

# A card on PCIe 5; threads that wait for it; a request's way through the server, as measured with 16 cores.
_BYTES_A_NS = 50.0
_COPY_NS = 5_000
_WAKE_NS = 40_000
_HOST_NS = 150_000
_REQUEST_NS = 400_000
# So many clients send requests of a sixteenth of a batch each: together they fill two batches.
_CLIENTS = 32


def said(config: ModelConfig) -> str:
    """As "9,800 rows/s of 128 a batch on a GPU by itself, one request in 1.9 ms"; "" where no times are told.

    Raises ConfigError for times that are none.
    """
    times = config.gpu_latency_ns
    if len(times) < 2 or config.max_batch_size < 1:
        return ""
    rows = max(1, config.max_batch_size * 2 // _CLIENTS)
    crowd = predict(_workload(config, _CLIENTS, rows))
    alone = predict(_workload(config, 1, 1))
    one_ms = alone.p50_ms + _REQUEST_NS / 1e6
    rates = f"{crowd.rate * rows:,.0f} rows/s of {crowd.batch_rows:,.0f} a batch on a GPU by itself"
    return f"{rates}, one request in {one_ms:.1f} ms"


def _workload(config: ModelConfig, clients: int, rows: int) -> Workload:
    times = config.gpu_latency_ns
    least, most = min(times), max(times)
    row_ns = max(0.0, (times[most] - times[least]) / (most - least))
    execution_ns = max(1, int(times[least] - row_ns * least))
    longest_ns = execution_ns + row_ns * config.max_batch_size
    return Workload(
        clients=clients,
        rows=rows,
        max_batch_size=config.max_batch_size,
        execution_ns=execution_ns,
        row_ns=row_ns,
        bytes_in=_row_bytes(config.inputs),
        bytes_out=_row_bytes(config.outputs),
        host_ns=_HOST_NS,
        request_ns=_REQUEST_NS,
        captured=_captured(config),
        costs=Costs(
            copy_ns=_COPY_NS,
            copy_in_ns_per_byte=1 / _BYTES_A_NS,
            copy_out_ns_per_byte=1 / _BYTES_A_NS,
            wake_ns=_WAKE_NS,
        ),
        seconds=max(0.1, 40 * longest_ns / 1e9),
    )


def _row_bytes(specs: Sequence[TensorSpec]) -> int:
    """Of tensors with a variable dimension as if that were 1; of BYTES nothing."""
    known = [spec for spec in specs if spec.datatype != "BYTES"]
    return sum(math.prod(abs(dim) for dim in spec.dims) * NUMPY[spec.datatype].itemsize for spec in known)


def _captured(config: ModelConfig) -> tuple[int, ...]:
    if not graph_buckets.are_wanted(config):
        return ()
    return tuple(sorted({bucket.rows for bucket in graph_buckets.plan(config).buckets}))
