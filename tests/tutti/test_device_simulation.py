"""The scheduler over the device engine in virtual time: what it would serve, by costs."""

import dataclasses

import pytest

from tutti.devices.simulated import Costs
from tutti.scheduling.captured_sizes import CapturedSizes
from tutti.serving.device_simulation import Workload, predict

# An accelerator whose execution takes 2 ms and 0.02 ms a row; 55 GB/s in and out.
COSTS = Costs(copy_ns=5_000, copy_in_ns_per_byte=1 / 55, copy_out_ns_per_byte=1 / 55, wake_ns=30_000)
ACCELERATOR = Workload(
    clients=64,
    rows=1,
    max_batch_size=64,
    execution_ns=2_000_000,
    row_ns=20_000,
    bytes_in=1536,
    bytes_out=40,
    costs=COSTS,
    seconds=1.0,
)


def test_one_client_waits_for_hardly_more_than_its_execution() -> None:
    alone = predict(dataclasses.replace(ACCELERATOR, clients=1))
    assert alone.p50_ms == pytest.approx(2.02 + 0.1, abs=0.15)
    assert alone.batch_rows == 1


def test_many_clients_keep_the_device_busy() -> None:
    crowd = predict(dataclasses.replace(ACCELERATOR, clients=512))
    assert crowd.busy > 0.97
    assert crowd.batch_rows > 60
    assert crowd.rate > 0.95 * 64 / 3.28e-3


@pytest.mark.parametrize("clients", [8, 16, 64])
def test_clients_that_wait_for_answers_are_not_split_into_groups_that_take_turns(clients: int) -> None:
    crowd = predict(dataclasses.replace(ACCELERATOR, clients=clients))
    assert crowd.batch_rows > 0.95 * clients
    one_batch_ms = 2 + 0.02 * clients
    assert crowd.rate > 0.9 * clients / one_batch_ms * 1000


def test_clients_are_not_waited_for_where_executions_take_a_time_for_each_row() -> None:
    processor = dataclasses.replace(ACCELERATOR, execution_ns=100_000, row_ns=400_000)
    assert predict(processor).busy > 0.98


def test_copies_that_take_longer_than_executions_decide() -> None:
    large = dataclasses.replace(ACCELERATOR, clients=256, bytes_in=4_000_000, execution_ns=200_000, row_ns=1000)
    assert predict(large).rate == pytest.approx(55e9 / 4_000_000, rel=0.06)


# A vision transformer in CUDA graphs: 0.5 ms and 0.1 ms a picture, requests of 4 that are on their way for 3 ms.
CAPTURED = dataclasses.replace(
    ACCELERATOR,
    rows=4,
    max_batch_size=256,
    execution_ns=500_000,
    row_ns=99_000,
    host_row_ns=20_000,
    request_ns=3_000_000,
    spread=0.5,
    captured=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    seconds=0.6,
)


@pytest.mark.parametrize(("clients", "gain"), [(1, 1.0), (4, 0.99), (16, 1.1), (64, 1.4)])
def test_batches_are_cut_at_captured_sizes_where_that_pays(
    clients: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = dataclasses.replace(CAPTURED, clients=clients)
    made = predict(workload)
    monkeypatch.setattr(CapturedSizes, "cut", lambda self, calls, limit, is_busy: limit)
    whole = predict(workload)
    assert made.rate >= gain * whole.rate
    assert made.p50_ms <= 1.01 * whole.p50_ms
