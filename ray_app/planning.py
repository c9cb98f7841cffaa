"""What `tutti cluster` does: pools that are planned, explained and simulated; and placement files, as they are read."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tutti.backends import completion
from tutti.console.arguments import plain, shown
from tutti.console.progress import Work, clock
from tutti.core.errors import ConfigError, reason
from tutti.ray_app import documents, gpu_rates, planner
from tutti.ray_app.options import Options, PoolOptions
from tutti.ray_app.placement import PoolSpec, home

_KINDS: dict[str, type[BaseModel]] = {"": Options, "pools": PoolOptions}


def plan(options: argparse.Namespace) -> None:
    folders, failures = completion.open_models(options.model_repository)
    sizes = {folder.config.name: _bytes_of(folder.path, folder.versions) for folder in folders}
    configs = {folder.config.name: folder.config for folder in folders}
    planned = planner.plan(configs, sizes, options.gpus, 1e3 * options.gpu_memory_gb, options.cpu_replicas)
    text = yaml.safe_dump({"pools": [_as_written(pool) for pool in planned.pools]}, sort_keys=False)
    if options.output is not None:
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {options.output}: {reason(error)}") from None
    else:
        print(text)
    on_gpus = {name for pool in planned.pools if pool.num_gpus for name in pool.models}
    rates = {name: gpu_rates.said(config) for name, config in configs.items() if name in on_gpus}
    _show({name: "; ".join(filter(None, (why, rates.get(name)))) for name, why in planned.why.items()}, failures)


def why(options: argparse.Namespace) -> None:
    placement = load_placement(options.placement) if options.placement is not None else {}
    try:
        pools = checked({"model_repository": str(options.model_repository), **placement}).pool_specs(options.gpus)
    except ConfigError as error:
        where = f"--placement {plain(options.placement)}: " if options.placement is not None else ""
        raise ConfigError(f"{where}{error}") from None
    folders, failures = completion.open_models(options.model_repository)
    configs = {folder.config.name: folder.config for folder in folders}
    why = {}
    for name, config in configs.items():
        try:
            place = home(config, pools, lambda step, _: configs[step])
            why[name] = f"{' and '.join(place.pools) or 'in segments'}: {place.why}"
        except ConfigError as error:
            why[name] = str(error)
    _show(why, failures)


def _show(why: Any, failures: Any) -> None:
    width = max((len(name) for name in [*why, *failures]), default=0)
    for name, told in sorted({**why, **{name: str(error) for name, error in failures.items()}}.items()):
        print(f"{name:{width}}  {told}")


def _as_written(pool: PoolSpec) -> dict[str, Any]:
    written: dict[str, Any] = {"name": pool.name, "replicas": pool.replicas, "num_cpus": pool.num_cpus}
    if pool.num_gpus:
        written["num_gpus"] = pool.num_gpus
    return {**written, "models": list(pool.models)}


def _bytes_of(path: Path, versions: Sequence[int]) -> int:
    """Of the files that are loaded."""
    files = (file for version in versions for file in (path / str(version)).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files if file.suffix != ".pyc")


def simulate(options: argparse.Namespace) -> None:
    from tutti.ray_app import fluid_simulation, simulation
    from tutti.ray_app.scenario import Bursts, Scenario, SimulatedPool, Stretch

    kinds: dict[str, type[BaseModel]] = {"": Scenario, "pools": SimulatedPool, "bursts": Bursts, "trace": Stretch}
    try:
        scenario = Scenario(**documents.read(options.scenario, "pools and a trace (docs/cluster.md)"))
        begun = time.monotonic()
        with Work(f"simulating {clock(scenario.load().seconds)}") as progress:
            result = (fluid_simulation.simulate_fluid if options.fluid else simulation.simulate)(scenario, progress.at)
    except ValidationError as error:
        raise ConfigError(f"{plain(options.scenario)}: {documents.problems(error, kinds)}") from None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{plain(options.scenario)}: {error}") from None
    print("\n".join([*result.lines(), f"simulated in {time.monotonic() - begun:.1f} s"]))


def load_placement(path: Path) -> dict[str, Any]:
    """What a placement file says. Raises ConfigError if it is none, or has pools that no cluster can have."""
    try:
        placement = documents.read(path, "'pools:' and a list of them")
        if set(placement) != {"pools"} or not isinstance(placement["pools"], list):
            got = ", ".join(map(shown, placement)) or "nothing"
            expected = "expected 'pools:' and a list of them, and nothing else (docs/cluster.md)"
            raise ConfigError(f"{expected}, got {got}")
        Options(model_repository="", autoscaled_cluster=True, **placement).pool_specs(math.inf)
    except ValidationError as error:
        raise ConfigError(f"--placement {plain(path)}: {documents.problems(error, _KINDS)}") from None
    except ConfigError as error:
        raise ConfigError(f"--placement {plain(path)}: {error}") from None
    return placement


def checked(settings: dict[str, Any]) -> Options:
    """Options of the application. Raises ConfigError naming what is wrong."""
    try:
        return Options(**settings)
    except ValidationError as error:
        raise ConfigError(documents.problems(error, _KINDS)) from None
