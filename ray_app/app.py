"""The composition root on Ray: the gateway's and the pools' deployments, bound into one Serve application."""

import os
from typing import Any

from tutti.ray_app import environment

environment.apply()  # before ray.serve is imported

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig  # noqa: E402

from tutti.ray_app import checks, journal  # noqa: E402
from tutti.ray_app.autoscaling import SERVE_SETTINGS  # noqa: E402
from tutti.ray_app.gateway import Gateway  # noqa: E402
from tutti.ray_app.journal import RayStore  # noqa: E402
from tutti.ray_app.options import Options  # noqa: E402
from tutti.ray_app.placement import GATEWAY_CPUS, PoolSpec, check_cpus, models_for  # noqa: E402
from tutti.ray_app.replica import Replica, ReplicaOptions  # noqa: E402

_HEALTH_CHECK_PERIOD_S = 1.0
# Serve replaces a gateway that fails three health checks in a row. One with neighbours is found earlier: see watch.
_GATEWAY_TIMEOUT_S = 10.0


def build(arguments: Options) -> Any:
    """The application. Raises ConfigError when the cluster cannot hold the replicas asked for."""
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    environment.require_authentication(nodes, os.environ.get("RAY_AUTH_MODE"))
    resources = ray.cluster_resources()
    pools = arguments.pool_specs(resources.get("GPU", 0))
    if not arguments.autoscaled_cluster:
        check_cpus(pools, arguments.gateways, resources.get("CPU", 0))
    arguments = arguments.with_absolute_paths()
    configs = checks.models(arguments, pools)
    _forget_what_has_ended(arguments.journal)
    handles = {
        pool.name: _deployment(pool).bind(
            ReplicaOptions.of(arguments, models_for(pool, pools, configs), pool.has_gpu),
            pool.name,
        )
        for pool in pools
    }
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=arguments.gateways,
        graceful_shutdown_timeout_s=arguments.exit_timeout_secs,
        ray_actor_options={"num_cpus": GATEWAY_CPUS, "resources": arguments.gateway_resources},
        max_ongoing_requests=100,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=_GATEWAY_TIMEOUT_S,
    )
    return gateway.bind(arguments, pools, **handles)


def _forget_what_has_ended(name: str) -> None:
    """Forget the loads of an application that has ended. Those of one that is being updated are kept."""
    store = RayStore()
    app = (store.get(journal.owner_key(name)) or b"").decode()
    actors = ray.util.list_named_actors(all_namespaces=True)
    if not any(journal.gateway_name(app) in actor["name"] for actor in actors):
        journal.forget(store, name)


def _replicas(pool: PoolSpec) -> dict[str, Any]:
    if not pool.max_replicas:
        return {"num_replicas": pool.replicas}
    return {
        "num_replicas": "auto",
        "autoscaling_config": AutoscalingConfig(
            min_replicas=pool.min_replicas,
            initial_replicas=pool.replicas,
            max_replicas=pool.max_replicas,
            **SERVE_SETTINGS,
            policy=AutoscalingPolicy(policy_function="tutti.ray_app.autoscaling:policy"),
        ),
    }


def _deployment(pool: PoolSpec) -> Any:
    return serve.deployment(
        Replica,
        name=pool.name,
        **_replicas(pool),
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus},
        max_ongoing_requests=10_000,  # the gateway's slots are the limit
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=10.0,
        request_router_config=RequestRouterConfig(request_router_class="tutti.ray_app.routing:AddressedRouter"),
    )
