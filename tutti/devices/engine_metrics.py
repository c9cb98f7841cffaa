"""What devices' engines have done, for the metrics page.

Reads what the engines have counted. No device is asked and no lock is taken: a device that hangs does not hold up the
page that tells of it.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tutti.devices import health
from tutti.devices.engine import DeviceEngine
from tutti.devices.process_engines import engines


def collect() -> Iterator[Metric]:
    """The families of this process's devices; none where nothing runs on any."""
    in_use, failed = engines(), health.health.failures()
    devices = sorted({engine.device.name for engine in in_use} | set(failed))
    if not devices:
        return
    busy = CounterMetricFamily("tutti_device_busy_seconds", "Time that a device has executed", labels=["device"])
    pinned = GaugeMetricFamily(
        "tutti_device_pinned_bytes", "Pinned host memory of a device's engine", labels=["device"]
    )
    of_models = CounterMetricFamily(
        "tutti_device_model_seconds", "Time that a device has executed a model", labels=["device", "model"]
    )
    for engine in in_use:
        device = engine.device.name
        busy.add_metric([device], engine.busy_ns / 1e9)
        pinned.add_metric([device], engine.arena.bytes)
        for model, ns in dict(engine.model_ns).items():
            of_models.add_metric([device, model], ns / 1e9)
    yield from (busy, of_models, pinned)
    state = GaugeMetricFamily("tutti_device_failed", "1 once the device answers no more", labels=["device"])
    for device in devices:
        state.add_metric([device], float(device in failed))
    yield state
    yield _memory(in_use)
    # Triton has one pool for all devices, and so has its page.
    arenas = [engine.arena for engine in in_use]
    yield GaugeMetricFamily(
        "nv_pinned_memory_pool_total_bytes",
        "Pinned memory pool total memory size, in bytes",
        sum(arena.bytes for arena in arenas),
    )
    yield GaugeMetricFamily(
        "nv_pinned_memory_pool_used_bytes",
        "Pinned memory pool used memory size, in bytes",
        sum(arena.used_bytes for arena in arenas),
    )


def _memory(in_use: list[DeviceEngine]) -> Metric:
    family = GaugeMetricFamily(
        "tutti_model_device_memory_bytes",
        "Memory of a model's weights on a device, where that is known",
        labels=["model", "version", "device"],
    )
    for engine in in_use:
        held: dict[tuple[str, str], dict[int, int]] = {}
        for pipeline in engine.pipelines():
            if pipeline.memory:
                held.setdefault((pipeline.name, pipeline.version), {}).update(pipeline.memory)
        for (model, version), sizes in sorted(held.items()):
            family.add_metric([model, version, engine.device.name], sum(sizes.values()))
    return family
