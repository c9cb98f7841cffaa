"""Why a device answers no more, and what its users are told then."""

from tutti.core.errors import DeviceLost
from tutti.devices.pipeline import Pipeline


class Loss:
    """Of one device. `reason` is "" while it works."""

    def __init__(self, device: str) -> None:
        self.reason = ""
        self._device = device

    def error(self, pipeline: Pipeline) -> DeviceLost:
        sentence = f"device {self._device} has failed ({self.reason}); its process is replaced, try again later"
        return DeviceLost(f"'{pipeline.name}': {sentence}")
