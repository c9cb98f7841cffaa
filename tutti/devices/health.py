"""Which devices of this process have failed for good, and why.

After a device-side assert, an illegal access or a hang every further call of the process on that device fails until the
process ends: the error sticks to its context. So the first report of a device stands, and whoever can replace the
process is told of it once.
"""

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

Listener = Callable[[str, str], None]
"""`listener(device, reason)`, called once for a device, from the thread that saw it fail. Must not raise."""


class DeviceHealth:
    """The devices of one process, by names as "cuda:0". Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._listeners: list[Listener] = []

    def fail(self, device: str, reason: str) -> None:
        """The device answers no more, because of `reason`. Later reports of it are consequences, and are dropped."""
        with self._lock:
            if device in self._reasons:
                return
            self._reasons[device] = reason
            listeners = list(self._listeners)
        _log.error("device %s has failed: %s", device, reason)
        for listener in listeners:
            listener(device, reason)

    def reason(self, device: str) -> str:
        """Why the device has failed; "" while it works."""
        return self._reasons.get(device, "")

    def failures(self) -> dict[str, str]:
        """Every device that has failed, and why."""
        return dict(self._reasons)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` of each device that fails from now on, and of those that have; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)
            known = dict(self._reasons)
        for device, reason in known.items():
            listener(device, reason)
        return lambda: self._listeners.remove(listener)


# A context belongs to the process, and so does this.
health = DeviceHealth()
