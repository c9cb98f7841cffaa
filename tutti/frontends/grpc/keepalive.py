"""How long gRPC connections live, and how they are seen to: tritonserver's flags, and gRPC's names for them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Setting:
    """One flag. `name` is that of the channel argument `grpc.NAME`; the native server knows some by the same name.

    Of numbers, `least` is the lowest that servers take.
    """

    flag: str
    name: str
    unit: Literal["MS", "N", "BOOL"]
    help: str
    is_native: bool = False
    least: int = 0

    @property
    def dest(self) -> str:
        """Of the flag's value among options."""
        return self.flag[2:].replace("-", "_")


SETTINGS = (
    Setting(
        "--grpc-keepalive-time", "keepalive_time_ms", "MS",
        "ping a gRPC client that has been silent for so long (default: 7200000, 2 hours)", is_native=True, least=1,
    ),
    Setting(
        "--grpc-keepalive-timeout", "keepalive_timeout_ms", "MS",
        "close its connection where no answer has come after so long (default: 20000)", is_native=True, least=1,
    ),
    Setting(
        "--grpc-keepalive-permit-without-calls", "keepalive_permit_without_calls", "BOOL",
        "ping clients without calls, too (default: true, with grpcio false)", is_native=True,
    ),
    Setting(
        "--grpc-http2-max-pings-without-data", "http2.max_pings_without_data", "N",
        "of a connection without data, 0 for any number; with grpcio (default: 2)",
    ),
    Setting(
        "--grpc-http2-min-recv-ping-interval-without-data", "http2.min_recv_ping_interval_without_data_ms", "MS",
        "clients' pings that come faster are bad; with grpcio (default: 300000)",
    ),
    Setting(
        "--grpc-http2-max-ping-strikes", "http2.max_ping_strikes", "N",
        "bad pings that a connection may have, 0 for any number; with grpcio (default: 2)",
    ),
    Setting(
        "--grpc-max-connection-age", "max_connection_age_ms", "MS",
        "ask clients to connect anew after so long; with grpcio (default: never)",
    ),
    Setting(
        "--grpc-max-connection-age-grace", "max_connection_age_grace_ms", "MS",
        "what is inside then may take so long; with grpcio (default: any time)",
    ),
)  # fmt: skip


def settings_of(options: object) -> tuple[tuple[str, int], ...]:
    """(name, value) of the settings whose flags are among the options."""
    values = ((setting.name, getattr(options, setting.dest, None)) for setting in SETTINGS)
    return tuple((name, int(value)) for name, value in values if value is not None)


def native(settings: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Those of the settings that the native server has, by its names; it takes no number for what is true or false."""
    known = {setting.name: setting for setting in SETTINGS if setting.is_native}
    return {name: bool(value) if known[name].unit == "BOOL" else value for name, value in settings if name in known}
