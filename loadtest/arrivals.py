"""When requests are due, which payload each has, and which worker sends it: all of it from one seed, before the start.

Pure. A worker's shard is every n-th arrival, so that more workers change nothing but who sends.
"""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutti.loadtest import names
from tutti.loadtest.errors import ScenarioError
from tutti.loadtest.scenario import Arrivals, Scenario, Stage

Floats = npt.NDArray[np.float64]
# A run with more requests, or a longer one, is refused as a slip: a mistyped rate, or a trace in milliseconds.
MOST_REQUESTS = 20_000_000
LONGEST_S = 31 * 86_400.0


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
        part = slice(number, None, of)
        return Schedule(self.due_s[part], self.payloads[part], self.stages[part], self.seconds)


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
    """The whole run; `payloads` are weights of what may be sent. Raises ScenarioError for an unreadable trace."""
    rng = np.random.default_rng(scenario.seed)
    trace = None if scenario.arrivals.trace is None else read_trace(scenario.folder / scenario.arrivals.trace)
    if isinstance(trace, np.ndarray):
        times = trace / scenario.arrivals.speed
        numbers, seconds = np.zeros(len(times), np.int16), float(times[-1])
        _check_size(len(times), seconds)
    else:
        times, numbers, seconds = _of_stages(scenario, trace, rng)
    weights = np.asarray(payloads, np.float64)
    chosen = rng.choice(len(weights), len(times), p=weights / weights.sum()).astype(np.int32)
    return Schedule(times, chosen, numbers, seconds)


def length_s(scenario: Scenario) -> float:
    """How long a run takes until its last request is due, at most. Raises ScenarioError as schedule does."""
    if scenario.arrivals.trace is not None:
        return schedule(scenario, [1.0]).seconds
    requests = sum(expected(stage) for stage in scenario.stages)
    seconds = (scenario.warmup_s if _warm_up(scenario) else 0.0) + sum(stage.seconds for stage in scenario.stages)
    if not requests:
        raise ScenarioError("stages: expected a rate above 0 in one of them")
    _check_size(requests, seconds)
    return seconds


def _of_stages(
    scenario: Scenario, trace: Sequence[Stage] | None, rng: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int16], float]:
    """When requests are due, the stage of each, and the seconds of all. A trace's stretches are one stage."""
    stages = [(number, stage) for number, stage in enumerate(scenario.stages)]
    if trace is not None:
        speed = scenario.arrivals.speed
        stages = [(0, Stage(seconds=stretch.seconds / speed, rate=stretch.rate * speed)) for stretch in trace]
    elif (warm := _warm_up(scenario)) is not None:
        stages.insert(0, (-1, warm))
    _check_size(sum(expected(stage) for _, stage in stages), sum(stage.seconds for _, stage in stages))
    due: list[Floats] = []
    numbers: list[npt.NDArray[np.int16]] = []
    start = 0.0
    for number, stage in stages:
        due.append(start + of_stage(stage, scenario.arrivals, rng))
        numbers.append(np.full(len(due[-1]), number, np.int16))
        start += stage.seconds
    return np.concatenate(due), np.concatenate(numbers), start


def _warm_up(scenario: Scenario) -> Stage | None:
    first = scenario.stages[0]
    rate = max(first.rate, first.to) if first.kind != "constant" else first.rate
    return Stage(seconds=scenario.warmup_s, rate=rate) if scenario.warmup_s and rate else None


def _check_size(requests: float, seconds: float) -> None:
    if requests > MOST_REQUESTS:
        count = f"{requests:,.0f}" if requests < 1e15 else "endlessly many"
        raise ScenarioError(f"{count} requests: expected {MOST_REQUESTS:,} at most in a run: check the rates")
    if seconds > LONGEST_S:
        raise ScenarioError(f"a run of {seconds:,.0f} s: expected 31 days at most: are its times milliseconds?")


def read_trace(path: Path) -> Floats | list[Stage]:
    """Seconds of arrivals, the first at 0; or stretches of even rates. Raises ScenarioError naming what is wrong.

    Parquet and CSV with a column `second` or `scheduled_s` have arrivals, a line each; CSV with a `rate` as well has
    the rate from each second to the next, as `tutti cluster simulate` reads it. Without a heading, CSV of one column
    has arrivals, and of two, seconds and rates.
    """
    names.file(str(path), "a trace in CSV or Parquet", (".csv", ".parquet"))
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return _from_parquet(path) if is_parquet else _from_csv(path)


_KINDS = "expected a column second (arrivals, a line each), or second and rate"


def _from_csv(path: Path) -> Floats | list[Stage]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, csv.Error) as error:
        raise ScenarioError(f"{path}: no CSV: {getattr(error, 'strerror', None) or error}: {_KINDS}") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: byte {error.start} is no UTF-8: {_KINDS}") from None
    heading = _heading(rows[0][1]) if rows else None
    columns = _columns(path, heading, rows[0][1] if rows else [])
    numbers = [_numbers(path, number, row, columns) for number, row in rows[heading is not None :]]
    if len(columns) == 2:
        return _stretches(path, numbers)
    return _from_zero(path, np.asarray([row[0] for _, row in numbers]))


def _heading(row: Sequence[str]) -> list[str] | None:
    """The columns' names; None where the first line has numbers already."""
    return None if _is_number(row[0]) else [name.strip().lower() for name in row]


def _columns(path: Path, heading: list[str] | None, first: Sequence[str]) -> list[int]:
    """The index of the column of seconds, and that of the rates, if there is one."""
    if heading is None:
        if len(first) > 2:
            raise ScenarioError(f"{path}:1: {_KINDS}; got {len(first)} columns without a heading")
        return list(range(len(first)))
    second = next((heading.index(name) for name in ("scheduled_s", "second") if name in heading), None)
    if second is None:
        raise ScenarioError(f"{path}:1: {_KINDS}; got {', '.join(first)[:60]!r}")
    return [second, heading.index("rate")] if "rate" in heading else [second]


def _numbers(path: Path, number: int, row: Sequence[str], columns: Sequence[int]) -> tuple[int, list[float]]:
    if len(row) > max(columns) and all(_is_number(row[column]) for column in columns):
        return number, [float(row[column]) for column in columns]
    expected = "SECOND,RATE" if len(columns) == 2 else "a second"
    raise ScenarioError(f"{path}:{number}: expected {expected}, got {','.join(row)[:60]!r}")


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _stretches(path: Path, rows: Sequence[tuple[int, Sequence[float]]]) -> list[Stage]:
    """From each line's second to the next line's; the last line only ends the one before it."""
    stages: list[Stage] = []
    for (_, (second, rate)), (number, (until, _)) in itertools.pairwise(rows):
        if until <= second or rate < 0:
            raise ScenarioError(f"{path}:{number}: expected rising seconds, and rates of 0 or more")
        stages.append(Stage(seconds=until - second, rate=rate))
    if not stages:
        raise ScenarioError(f"{path}: expected two lines of SECOND,RATE or more")
    return stages


def _from_parquet(path: Path) -> Floats:
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.read_table(path)
    except Exception as error:
        raise ScenarioError(f"{path}: no Parquet: {str(error).splitlines()[0]}") from None
    name = next((name for name in ("scheduled_s", "second") if name in table.column_names), None)
    if name is None:
        raise ScenarioError(f"{path}: expected a column scheduled_s or second, got {', '.join(table.column_names)}")
    if str(table[name].type) not in ("double", "float", "int64", "int32"):
        raise ScenarioError(f"{path}: expected numbers in the column {name}, got {table[name].type}")
    return _from_zero(path, table[name].to_numpy().astype(np.float64))


def _from_zero(path: Path, seconds: Floats) -> Floats:
    if not len(seconds) or not np.isfinite(seconds).all():
        raise ScenarioError(f"{path}: expected seconds of arrivals, got none")
    ordered = np.sort(seconds.astype(np.float64))
    seconds_from_zero: Floats = ordered - ordered[0]
    return seconds_from_zero
