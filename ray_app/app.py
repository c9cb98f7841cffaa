"""The composition root on Ray: the gateway's and the pools' deployments, bound into one Serve application."""

from pathlib import Path
from typing import Any

from ray_app import environment

environment.apply()  # before ray.serve is imported

import ray  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402
from ray import serve  # noqa: E402

from ray_app.gateway import Gateway, GatewayOptions  # noqa: E402
from ray_app.placement import PoolSpec, plan_pools  # noqa: E402
from ray_app.replica import Replica  # noqa: E402
from tutti.frontends.api import Limits  # noqa: E402
from tutti.frontends.server import Addresses  # noqa: E402

SLOTS_PER_REPLICA = 2
_HEALTH_CHECK_PERIOD_S = 1.0


class Arguments(BaseModel):
    """Arguments of the application, as `args:` in serve.yaml. Names as the flags of `tutti serve`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_repository: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    http_max_input_size: int = Limits().max_input_size
    grpc_max_message_size: int = Limits().max_grpc_message_size
    gpu_replicas: int | None = None
    cpu_replicas: int = 1


def build(arguments: Arguments) -> Any:
    """The application. Raises ConfigError when the cluster cannot hold the replicas asked for."""
    pools = plan_pools(ray.cluster_resources().get("GPU", 0), arguments.gpu_replicas, arguments.cpu_replicas)
    repository = str(Path(arguments.model_repository).resolve())
    options = GatewayOptions(
        model_repository=repository,
        addresses=Addresses(arguments.host, arguments.http_port, arguments.grpc_port, arguments.metrics_port),
        limits=Limits(arguments.http_max_input_size, arguments.grpc_max_message_size),
        slots=SLOTS_PER_REPLICA * max(pool.replicas for pool in pools),
    )
    handles = {pool.name: _deployment(pool).bind(repository, pool.name) for pool in pools}
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=100,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    )
    return gateway.bind(options, **handles)


def _deployment(pool: PoolSpec) -> Any:
    return serve.deployment(
        Replica,
        name=pool.name,
        num_replicas=pool.replicas,
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus},
        max_ongoing_requests=10_000,  # the gateway's slots are the limit
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=10.0,
    )
