"""When requests are due, which payload each has, and which worker sends it: all of it from one seed, before the start.

Pure. A worker's shard is every n-th arrival, so that more workers change nothing but who sends.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.scenario import Arrivals, Scenario, ScenarioError, Stage

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds from the start, rising; the payload of each; the stage of each, -1 for what only warms up."""

    due_s: Floats
    payloads: npt.NDArray[np.int32]
    stages: npt.NDArray[np.int16]
    seconds: float

    def __len__(self) -> int:
        return len(self.due_s)

    def shard(self, number: int, of: int) -> "Schedule":
        """What worker `number` of `of` sends."""
        own = slice(number, None, of)
        return Schedule(self.due_s[own], self.payloads[own], self.stages[own], self.seconds)


def rate_at(stage: Stage, part: Floats) -> Floats:
    """Requests a second at a part (0 to 1) of a stage."""
    if stage.kind == "constant":
        return np.full_like(part, stage.rate)
    if stage.kind == "ramp":
        return stage.rate + (stage.to - stage.rate) * part
    return stage.rate + (stage.to - stage.rate) * np.sin(np.pi * part) ** 2


def expected(stage: Stage) -> float:
    """Requests of a stage, on average."""
    mean = {"constant": stage.rate, "ramp": (stage.rate + stage.to) / 2, "diurnal": (stage.rate + stage.to) / 2}
    return mean[stage.kind] * stage.seconds


def of_stage(stage: Stage, how: Arrivals, rng: np.random.Generator) -> Floats:
    """Seconds from the stage's beginning.

    Arrivals at a rate of 1 in warped time, where a second lasts as long as its rate is high (time rescaling: Brown et
    al. 2002): gaps are exponential for a Poisson process, gamma distributed with shape 1 / cv^2 for bursts.
    """
    total = expected(stage)
    count = int(total + 8 * (1 + how.cv) * total**0.5 + 64)
    if how.process == "constant":
        warped = np.arange(round(total), dtype=np.float64)
    elif how.process == "poisson":
        warped = np.cumsum(rng.exponential(1.0, count))
    else:
        shape = 1 / how.cv**2
        warped = np.cumsum(rng.gamma(shape, 1 / shape, count))
    warped = warped[warped < total]
    if stage.kind == "constant":
        return warped / stage.rate if stage.rate else warped
    grid = np.linspace(0.0, 1.0, 20_001)
    rates = rate_at(stage, grid)
    area = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2)]) * (grid[1] * stage.seconds)
    return np.interp(warped, area, grid * stage.seconds)


def schedule(scenario: Scenario, payloads: Sequence[float]) -> Schedule:
    """The whole run; `payloads` are weights of what may be sent. Raises ScenarioError for a trace that is none."""
    rng = np.random.default_rng(scenario.seed)
    due: list[Floats] = []
    stages: list[npt.NDArray[np.int16]] = []
    start = 0.0
    if scenario.arrivals.trace is not None:
        own = read_trace(scenario.folder / scenario.arrivals.trace) / scenario.arrivals.speed
        due, stages, start = [own], [np.zeros(len(own), np.int16)], float(own[-1]) if len(own) else 0.0
    else:
        first = scenario.stages[0]
        rate = max(first.rate, first.to) if first.kind != "constant" else first.rate
        warm = [Stage(seconds=scenario.warmup_s, rate=rate)] if scenario.warmup_s and rate else []
        for number, stage in enumerate([*warm, *scenario.stages], -len(warm)):
            due.append(start + of_stage(stage, scenario.arrivals, rng))
            stages.append(np.full(len(due[-1]), number, np.int16))
            start += stage.seconds
    times = np.concatenate(due) if due else np.zeros(0)
    weights = np.asarray(payloads, np.float64)
    chosen = rng.choice(len(weights), len(times), p=weights / weights.sum()).astype(np.int32)
    return Schedule(times, chosen, np.concatenate(stages) if stages else np.zeros(0, np.int16), start)


def read_trace(path: Path) -> Floats:
    """Seconds of arrivals, from CSV or Parquet, the first at 0. Raises ScenarioError naming the line that is wrong."""
    if path.suffix == ".parquet":
        return _from_parquet(path)
    seconds: list[float] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                try:
                    seconds.append(float(row[0]))
                except (ValueError, IndexError):
                    if number > 1:  # a first line may be a heading
                        raise ScenarioError(f"{path}:{number}: expected a second, got {','.join(row)[:60]!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    return _from_zero(path, np.asarray(seconds))


def _from_parquet(path: Path) -> Floats:
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.read_table(path)
    except Exception as error:
        raise ScenarioError(f"{path}: {error}") from None
    name = next((one for one in ("scheduled_s", "second") if one in table.column_names), None)
    if name is None:
        raise ScenarioError(f"{path}: expected a column scheduled_s or second, got {', '.join(table.column_names)}")
    return _from_zero(path, table[name].to_numpy())


def _from_zero(path: Path, seconds: Floats) -> Floats:
    if not len(seconds) or not np.isfinite(seconds).all():
        raise ScenarioError(f"{path}: expected seconds of arrivals, got none")
    ordered = np.sort(seconds.astype(np.float64))
    made: Floats = ordered - ordered[0]
    return made
