"""Metrics of the machine's processors and memory under Triton's names, read at a scrape.

Knows Linux's /proc only: elsewhere there are none.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

_PROC = Path("/proc")
# Columns of /proc/stat's first line: the times of doing nothing, of which the rest is waiting for devices.
_IDLE, _WAITING = 3, 4


class HostMetrics:
    """The processors' utilization since the last scrape, from 0 to 1, and the memory; `proc` is where Linux tells."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._busy = self._all = 0
        self._utilization = 0.0

    def collect(self) -> Iterator[Metric]:
        """No families where the system does not tell."""
        try:
            with self._lock:
                utilization = self._look()
            total, used = self._memory()
        except (OSError, ValueError, KeyError, IndexError):
            return
        yield GaugeMetricFamily("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", utilization)
        yield GaugeMetricFamily("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", total)
        yield GaugeMetricFamily("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", used)

    def _look(self) -> float:
        ticks = [int(word) for word in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        everything = sum(ticks)
        busy = everything - ticks[_IDLE] - ticks[_WAITING]
        passed = everything - self._all
        if passed > 0:  # two scrapes within one tick see the same
            self._utilization = min(1.0, max(0.0, (busy - self._busy) / passed))
        self._busy, self._all = busy, everything
        return self._utilization

    def _memory(self) -> tuple[int, int]:
        """(total, used) in bytes."""
        lines = (self._proc / "meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return kib["MemTotal"] * 1024, (kib["MemTotal"] - kib["MemAvailable"]) * 1024
