"""What would keep an application from serving, told before Ray is started, which takes its time. Imports no Ray."""

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tutti.app import front_end_setup
from tutti.backends import completion
from tutti.core.errors import ConfigError, reason
from tutti.ray_app.options import Options
from tutti.ray_app.placement import PoolSpec, home
from tutti.repository.model_config import ModelConfig

CONNECT_TIMEOUT_S = 5.0
# What every head answers, and how long that may take.
_ASK_HEAD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_ANSWER_TIMEOUT_S = 10.0
# Gateways of one machine, those of an update among them, take the first free port from the metrics port on.
METRICS_PORTS = 16


def files_and_flags(options: Options, gpus: float | None) -> None:
    """Raises ConfigError naming the flag, the file or the model. `gpus` of the cluster are None where unknown yet."""
    front_end_setup.check(options)
    if gpus is not None:
        models(options, options.pool_specs(gpus))
    elif options.pools is not None:
        specs = options.model_copy(update={"autoscaled_cluster": True}).pool_specs(
            0
        )  # the number of GPUs does not matter here
        models(options, specs)
    else:
        models(options, ())


def models(options: Options, pools: Sequence[PoolSpec]) -> dict[str, ModelConfig]:
    """The configurations of what is served, by name. Raises ConfigError for one that cannot be read, or has no pool.

    Not where the others are to be served all the same, nor for pools where there are none yet.
    """
    folders, failures = completion.open_models(Path(options.model_repository), options.start_models())
    configs = {folder.config.name: folder.config for folder in folders}
    problems = [str(error) for error in failures.values()]
    for config in configs.values() if pools else ():
        try:
            home(config, pools, lambda name, _: _config(configs, name))
        except ConfigError as error:
            problems.append(str(error))
    if problems and options.exit_on_error:
        raise ConfigError("; ".join(problems))
    return configs


def _config(configs: dict[str, ModelConfig], name: str) -> ModelConfig:
    if name not in configs:
        raise ConfigError(f"model '{name}' is not there")
    return configs[name]


def machine(options: Options) -> None:
    """What a gateway on this machine needs of it: raises ConfigError for a port that another process has, or a file."""
    front_end_setup.check_written(options)
    try:
        replace(front_end_setup.addresses(options), metrics_ports=METRICS_PORTS).check_free()
    except OSError as error:
        raise ConfigError(f"cannot listen: {reason(error)}") from None


def address(text: str) -> None:
    """Raises ConfigError where no cluster answers at its address: Ray would try for minutes."""
    where = f"--ray-address {text}"
    host, colon, port = text.rpartition(":")
    if "/" in text or not colon or not port.isdecimal():
        raise ConfigError(f"{where}: expected HOST:PORT of the cluster's head, as 'ray start --head' says, or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            pass
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"{where}: no cluster answers there: {reason(error)}") from None
    if os.environ.get("RAY_USE_TLS", "0") in ("", "0") and not _is_head(text):
        raise ConfigError(f"{where}: what listens there is not the head of a Ray cluster")


def _is_head(target: str) -> bool:
    """Whether a cluster's head answers; one that asks for a token does."""
    import grpc

    no_head = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ASK_HEAD)(b"", timeout=_ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code() not in no_head
    return True
