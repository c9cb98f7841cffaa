"""The application's arguments: one set for the command, for serve.yaml and for the gateway."""

import hashlib
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tutti import SERVER_NAME
from tutti.ray_app.placement import PoolSpec, check_pools, plan_pools

# The most replicas of a pool: a larger number is a typing error.
MOST_REPLICAS = 1_000_000


class PoolOptions(BaseModel):
    """One pool of replicas, in order of preference; `models` are names or patterns of those it takes.

    With `max_replicas` it has as many as its work needs, and begins with `replicas` (default: `min_replicas`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    replicas: int | None = Field(default=None, le=MOST_REPLICAS)
    min_replicas: int = Field(default=0, ge=0, le=MOST_REPLICAS)
    max_replicas: int = Field(default=0, ge=0, le=MOST_REPLICAS)
    num_cpus: float = 0.1
    num_gpus: float = 0.0
    models: list[str] = ["*"]


class Options(BaseModel):
    """Arguments of the application, as `args:` in serve.yaml. Names and meanings as the flags of `tutti serve`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_repository: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    http_address: str | None = None
    grpc_address: str | None = None
    metrics_address: str | None = None
    allow_http: bool = True
    allow_grpc: bool = True
    allow_metrics: bool = True
    server_name: str = SERVER_NAME
    http_max_input_size: int = 64 * 1024 * 1024
    grpc_max_message_size: int = 2**31 - 1
    max_inflight_bytes: int = 256 * 1024 * 1024
    model_control_mode: Literal["none", "poll", "explicit"] = "none"
    load_model: list[str] | None = None
    repository_poll_secs: float = 15.0
    exit_on_error: bool = True
    strict_readiness: bool = True
    exit_timeout_secs: float = Field(default=30.0, ge=0)
    control_timeout_secs: float = Field(default=120.0, gt=0)
    cache_config: str = "local,size=1048576"
    allow_client_shm: bool = False
    allow_client_cuda_shm: bool = False  # refused: the gateway has no GPU
    http_restricted_api: list[str] = []
    grpc_restricted_protocol: list[str] = []
    api_key_file: Path | None = None
    http_header_forward_pattern: str | None = None
    grpc_header_forward_pattern: str | None = None
    http_use_ssl: bool = False
    http_use_ssl_mutual: bool = False
    http_server_cert: Path | None = None
    http_server_key: Path | None = None
    http_root_cert: Path | None = None
    grpc_use_ssl: bool = False
    grpc_use_ssl_mutual: bool = False
    grpc_server_cert: Path | None = None
    grpc_server_key: Path | None = None
    grpc_root_cert: Path | None = None
    grpc_server: Literal["native", "grpcio"] = "native"
    front_end_processes: int = Field(default=1, ge=1, le=1)  # the gateway is one
    grpc_keepalive_time: int | None = Field(default=None, ge=1, le=2**31 - 1)
    grpc_keepalive_timeout: int | None = Field(default=None, ge=1, le=2**31 - 1)
    grpc_keepalive_permit_without_calls: bool | None = None
    grpc_http2_max_pings_without_data: int | None = Field(default=None, ge=0, le=2**31 - 1)
    grpc_http2_min_recv_ping_interval_without_data: int | None = Field(default=None, ge=0, le=2**31 - 1)
    grpc_http2_max_ping_strikes: int | None = Field(default=None, ge=0, le=2**31 - 1)
    grpc_max_connection_age: int | None = Field(default=None, ge=0, le=2**31 - 1)
    grpc_max_connection_age_grace: int | None = Field(default=None, ge=0, le=2**31 - 1)
    allow_cpu_metrics: bool = True
    log_verbose: int = 0
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_file: str = ""
    log_format: Literal["default", "ISO8601", "json"] = "default"
    log_slow_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    access_log: str = ""
    trace_config: list[str] = []
    gateways: int = Field(default=1, ge=1)
    # Resources that a gateway's node must have, as Ray counts them: {"gateway": 1}.
    gateway_resources: dict[str, float] = {}
    gpu_replicas: int | None = None
    cpu_replicas: int = 1
    pools: list[PoolOptions] | None = None
    # The cluster adds nodes as they are asked for: pools may need more GPUs than there are now.
    autoscaled_cluster: bool = False
    hang_timeout_secs: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _check_gateways(self) -> "Options":
        ports = [
            getattr(self, f"{door}_port") for door in ("http", "grpc", "metrics") if getattr(self, f"allow_{door}")
        ]
        if self.gateways > 1 and not all(ports):
            raise ValueError(f"{self.gateways} gateways share their ports: expected no port 0")
        if self.gateways > 1 and self.allow_client_shm:
            raise ValueError("shared memory is registered with one gateway: expected 1 gateway, or no allow_client_shm")
        if self.allow_client_cuda_shm:
            raise ValueError(
                "allow_client_cuda_shm: CUDA shared memory needs a server with a GPU, the gateway has none"
            )
        return self

    @model_validator(mode="after")
    def _check_pools(self) -> "Options":
        counts = {"gpu_replicas", "cpu_replicas"} & self.model_fields_set
        if self.pools is not None and counts:
            raise ValueError(f"pools say how many replicas they have: expected no {' and no '.join(sorted(counts))}")
        return self

    @property
    def journal(self) -> str:
        """The name under which gateways of this application, those of its next update too, keep what they change."""
        repository = hashlib.sha256(str(Path(self.model_repository).resolve()).encode()).hexdigest()[:16]
        return f"{repository}-{self.http_port}" if self.allow_http else f"{repository}-grpc-{self.grpc_port}"

    @property
    def log_kinds(self) -> tuple[bool, bool, bool]:
        """Whether lines of info, warnings and errors pass."""
        return self.log_info, self.log_warning, self.log_error

    def pool_specs(self, gpus: float) -> tuple[PoolSpec, ...]:
        """The pools asked for, or those of `gpu_replicas` and `cpu_replicas`, on a cluster of so many GPUs.

        Raises ConfigError naming what does not fit.
        """
        if self.pools is None:
            return plan_pools(gpus, self.gpu_replicas, self.cpu_replicas)
        pools = [
            PoolSpec(
                pool.name,
                (pool.min_replicas if pool.max_replicas else 1) if pool.replicas is None else pool.replicas,
                pool.num_cpus,
                pool.num_gpus,
                tuple(pool.models),
                pool.min_replicas,
                pool.max_replicas,
            )
            for pool in self.pools
        ]
        return check_pools(pools, math.inf if self.autoscaled_cluster else gpus)

    def with_absolute_paths(self) -> "Options":
        """Relative paths are the command's: a gateway's working folder is another."""
        changes: dict[str, object] = {"model_repository": str(Path(self.model_repository).resolve())}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Path):
                changes[name] = value.resolve()
        if self.log_file:
            changes["log_file"] = str(Path(self.log_file).resolve())
        if self.access_log not in ("", "-"):
            changes["access_log"] = str(Path(self.access_log).resolve())
        changes["trace_config"] = [_with_absolute_path(item) for item in self.trace_config]
        return self.model_copy(update=changes)

    def start_models(self) -> tuple[str, ...] | None:
        """What is loaded at the start; None is everything."""
        if self.model_control_mode != "explicit" or "*" in (self.load_model or []):
            return None
        return tuple(self.load_model or [])


def _with_absolute_path(item: str) -> str:
    key, _, value = item.partition("=")
    return f"{key}={Path(value).resolve()}" if key in ("file", "triton,file") and value else item
