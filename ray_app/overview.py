"""What a person is told of an application that has started: its models, and the pools they are in. Pure."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutti.app import overview
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.placement import PoolSpec
from tutti.serving.model import Model

_COLUMNS = ("model", "version", "backend", "replicas", "instances of each", "batch", "loaded in")


@dataclass(frozen=True, slots=True)
class Loads:
    """What one replica says of its models, by "name/version": their instances, and the seconds that their loads took.

    `failures` say why others could not be loaded.
    """

    instances: Mapping[str, str]
    load_s: Mapping[str, float]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Overview:
    """What a gateway says: `table` and `command` are of what is served, `failures` and `hints` of what is not."""

    repository: str
    models: int
    table: tuple[str, ...]
    failures: tuple[str, ...]
    hints: tuple[str, ...]
    command: str

    def tell(self, log: logging.Logger) -> None:
        """A line each, as a single process does."""
        for line in self.table:
            log.info("%s", line)
        for failure in self.failures:
            log.error("not served: %s", failure)
        for sentence in self.hints:
            log.warning("%s", sentence)
        log.info("ready on Ray: %d models from %s", self.models, self.repository)
        if self.command:
            log.info("try: %s", self.command)


def table(
    models: Sequence[Model],
    pools: Mapping[str, Sequence[str]],
    specs: Sequence[PoolSpec],
    statuses: Mapping[str, PoolStatus],
    loads: Sequence[Loads],
) -> list[str]:
    """The models as aligned lines. `pools` are those that each one lives in, by its name; `loads` are all replicas'."""
    return overview.aligned(
        [_COLUMNS, *(_row(model, pools[model.config.name], specs, statuses, loads) for model in models)]
    )


def _row(
    model: Model,
    pools: Sequence[str],
    specs: Sequence[PoolSpec],
    statuses: Mapping[str, PoolStatus],
    loads: Sequence[Loads],
) -> tuple[str, ...]:
    config, key = model.config, f"{model.config.name}/{model.version}"
    counts = [_count(spec, statuses[spec.name], key) for spec in specs if spec.name in pools]
    instances = dict.fromkeys(load.instances[key] for load in loads if load.instances.get(key))
    load_s = max((load.load_s[key] for load in loads if key in load.load_s), default=None)
    return (
        config.name,
        str(model.version),
        config.backend,
        ", ".join(counts) or "its steps'",
        "its steps'" if config.is_ensemble else " or ".join(instances) or "-",
        overview.batch(config),
        "-" if load_s is None else f"{load_s:.2f} s",
    )


def _count(spec: PoolSpec, status: PoolStatus, key: str) -> str:
    """How many replicas of a pool have a model, of how many; and that it still starts some, which may have it then."""
    count = len(status.having(key))
    wanted = spec.min_replicas if spec.max_replicas else spec.replicas
    is_starting = len(status.up) < wanted
    of = f" of {spec.min_replicas} to {spec.max_replicas}" if spec.max_replicas else f" of {wanted}" * is_starting
    return f"{count}{of} in {spec.name}{' (starting)' * is_starting}"
