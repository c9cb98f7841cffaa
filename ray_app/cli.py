"""`tutti cluster`: plan the pools of a repository, and simulate how they would do."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ray_app import gpu_rates, planner
from ray_app.options import Options
from ray_app.placement import PoolSpec, home
from tutti import repository
from tutti.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands; returns its exit status. Raises ConfigError for what cannot be planned or read."""
    options = _parser().parse_args(arguments)
    run: dict[str, Any] = {"plan": _plan, "why": _why, "simulate": _simulate}
    run[options.what](options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tutti cluster", description="Plan and simulate pools of replicas.")
    commands = parser.add_subparsers(dest="what", required=True)
    plan = commands.add_parser("plan", help="a placement file for a repository, models packed by their memory")
    plan.add_argument("model_repository", type=Path)
    plan.add_argument("--gpus", type=int, required=True, help="of the cluster")
    plan.add_argument("--gpu-memory-gb", type=float, default=24.0, help="of each (default: %(default)s)")
    plan.add_argument("--cpu-replicas", type=int, default=1, help="replicas without a GPU (default: %(default)s)")
    plan.add_argument("--output", type=Path, help="write the placement there (default: show it)")
    why = commands.add_parser("why", help="where each model of a repository lives, and why")
    why.add_argument("model_repository", type=Path)
    why.add_argument("--placement", type=Path, help="as for tutti serve (default: its pools)")
    why.add_argument("--gpus", type=int, default=0, help="of the cluster (default: %(default)s)")
    simulate = commands.add_parser("simulate", help="how pools would do under a load, in simulated time")
    simulate.add_argument("scenario", type=Path, help="YAML: pools, how fast they are, and the load (docs/cluster.md)")
    simulate.add_argument("--fluid", action="store_true", help="by half seconds: for days, and thousands of replicas")
    return parser


def _plan(options: argparse.Namespace) -> None:
    if options.gpus < 0 or options.cpu_replicas < 0 or not 0 < options.gpu_memory_gb < math.inf:
        raise ConfigError("expected 0 or more GPUs and replicas, and memory above 0")
    folders, failures = repository.open_models(options.model_repository)
    sizes = {one.config.name: _bytes_of(one.path, one.versions) for one in folders}
    configs = {one.config.name: one.config for one in folders}
    planned = planner.plan(configs, sizes, options.gpus, 1e3 * options.gpu_memory_gb, options.cpu_replicas)
    text = yaml.safe_dump({"pools": [_as_written(pool) for pool in planned.pools]}, sort_keys=False)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    on_gpus = {name for pool in planned.pools if pool.num_gpus for name in pool.models}
    rates = {name: gpu_rates.said(config) for name, config in configs.items() if name in on_gpus}
    _show({name: "; ".join(filter(None, (why, rates.get(name)))) for name, why in planned.why.items()}, failures)


def _why(options: argparse.Namespace) -> None:
    given = load_placement(options.placement) if options.placement is not None else {}
    pools = checked({"model_repository": str(options.model_repository), **given}).pool_specs(options.gpus)
    folders, failures = repository.open_models(options.model_repository)
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
    for name, reason in sorted({**why, **{name: str(error) for name, error in failures.items()}}.items()):
        print(f"{name:{width}}  {reason}")


def _as_written(pool: PoolSpec) -> dict[str, Any]:
    written: dict[str, Any] = {"name": pool.name, "replicas": pool.replicas, "num_cpus": pool.num_cpus}
    if pool.num_gpus:
        written["num_gpus"] = pool.num_gpus
    return {**written, "models": list(pool.models)}


def _bytes_of(path: Path, versions: Sequence[int]) -> int:
    """Of the files that are loaded."""
    found = (file for version in versions for file in (path / str(version)).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in found if file.suffix != ".pyc")


def _simulate(options: argparse.Namespace) -> None:
    from ray_app.scenario import Scenario
    from ray_app.simulation import simulate, simulate_fluid

    try:
        given = yaml.safe_load(options.scenario.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ConfigError(f"{options.scenario}: expected pools and a trace")
        scenario = Scenario(**given)
        begun = time.monotonic()
        result = (simulate_fluid if options.fluid else simulate)(scenario)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{options.scenario}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{options.scenario}: {_problems(error)}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print("\n".join([*result.lines(), f"simulated in {time.monotonic() - begun:.1f} s"]))


def load_placement(path: Path) -> dict[str, Any]:
    """What a placement file says. Raises ConfigError if it is none."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--placement {path}: {error}") from None
    if not isinstance(given, dict) or set(given) != {"pools"}:
        raise ConfigError(f"--placement {path}: expected 'pools' and a list of them")
    return given


def checked(given: dict[str, Any]) -> Options:
    """Options of the application. Raises ConfigError naming what is wrong."""
    try:
        return Options(**given)
    except ValidationError as error:
        raise ConfigError(_problems(error)) from None


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
