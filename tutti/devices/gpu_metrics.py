"""GPUs on the metrics page, on Triton's names, as NVML reads them."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tutti.devices.nvml import Gpu, Nvml, nvml

ENERGY = "nv_energy_consumption"
_LABELS = ("gpu_uuid",)
INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class _Reading:
    """One gauge: `function` of pynvml, and what its result is in the gauge's unit."""

    name: str
    text: str
    function: str
    convert: Callable[[Any], float]


_GAUGES = (
    _Reading(
        "nv_gpu_utilization", "GPU utilization rate (0.0 - 1.0)", "nvmlDeviceGetUtilizationRates", lambda x: x.gpu / 100
    ),
    _Reading("nv_gpu_memory_total_bytes", "GPU total memory", "nvmlDeviceGetMemoryInfo", lambda x: x.total),
    _Reading("nv_gpu_memory_used_bytes", "GPU used memory", "nvmlDeviceGetMemoryInfo", lambda x: x.used),
    _Reading("nv_gpu_power_usage", "GPU power usage in watts", "nvmlDeviceGetPowerUsage", lambda x: x / 1000),
    _Reading("nv_gpu_power_limit", "GPU power limit in watts", "nvmlDeviceGetPowerManagementLimit", lambda x: x / 1000),
)


class GpuMetrics:
    """What this process's GPUs do. `sample` reads it, `collect` shows what was read last.

    A value that a GPU does not give is left out, and a family without any value too.
    """

    def __init__(
        self, source: Nvml = nvml, clock: Callable[[], float] = time.monotonic, interval_s: float = INTERVAL_S
    ) -> None:
        self._source = source
        self._clock = clock
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._read_at: float | None = None
        self._values: dict[str, list[tuple[str, float]]] = {}
        # What each GPU had used when it was first read, in mJ: the counter begins with this process.
        self._first_mj: dict[str, int] = {}

    def sample(self) -> None:
        """Read all values, unless that was done within `interval_s`. Some ms for each GPU: call it in a thread."""
        with self._lock:
            now = self._clock()
            if self._read_at is not None and now - self._read_at < self._interval_s:
                return
            self._read_at = now
            self._values = self._read()

    def collect(self) -> Iterator[Metric]:
        """The families of the last sample, none before the first."""
        values = self._values
        for gauge in _GAUGES:
            if gauge.name in values:
                yield _filled(GaugeMetricFamily(gauge.name, gauge.text, labels=_LABELS), values[gauge.name])
        if ENERGY in values:
            text = "GPU energy consumption in joules since the first sample"
            yield _filled(CounterMetricFamily(ENERGY, text, labels=_LABELS), values[ENERGY])

    def _read(self) -> dict[str, list[tuple[str, float]]]:
        values: dict[str, list[tuple[str, float]]] = {}
        for gpu in self._source.gpus():
            for gauge in _GAUGES:
                reading = self._source.read(gauge.function, gpu.handle)
                if reading is not None:
                    values.setdefault(gauge.name, []).append((gpu.uuid, gauge.convert(reading)))
            joules = self._joules(gpu)
            if joules is not None:
                values.setdefault(ENERGY, []).append((gpu.uuid, joules))
        return values

    def _joules(self, gpu: Gpu) -> float | None:
        used_mj = self._source.read("nvmlDeviceGetTotalEnergyConsumption", gpu.handle)
        if used_mj is None:
            return None
        return float(used_mj - self._first_mj.setdefault(gpu.uuid, used_mj)) / 1000


def _filled(family: Any, values: list[tuple[str, float]]) -> Metric:
    for uuid, number in values:
        family.add_metric([uuid], number)
    filled: Metric = family
    return filled
