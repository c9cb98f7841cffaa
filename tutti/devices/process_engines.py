"""The engines of this process, one for each device that something runs on."""

import threading

from tutti.devices import health
from tutti.devices.engine import DeviceEngine
from tutti.devices.simulated import Costs, SimulatedDevice, simulated_gpus
from tutti.devices.simulated_timeline import LiveTimeline

_lock = threading.Lock()
_engines: dict[str, DeviceEngine] = {}


def engine_of(name: str) -> DeviceEngine:
    """The engine of the device, as "cuda:0"; made when it is first asked for."""
    with _lock:
        engine = _engines.get(name)
        if engine is None:
            engine = _engines[name] = _simulated(name) if simulated_gpus() else _cuda(name)
    return engine


def engines() -> list[DeviceEngine]:
    """The engines of all devices that something has run on."""
    with _lock:
        return list(_engines.values())


def _simulated(name: str) -> DeviceEngine:
    return DeviceEngine(SimulatedDevice(LiveTimeline(), Costs(), name), health.health)


def _cuda(name: str) -> DeviceEngine:
    from tutti.devices.cuda import CudaDevice

    return DeviceEngine(CudaDevice(int(name.partition(":")[2])), health.health)
