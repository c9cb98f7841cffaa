"""What a simulation is of: pools of replicas and how fast they are, and the requests that come. Pure."""

import csv
import io
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tutti.core import files
from tutti.core.errors import reason
from tutti.ray_app.options import PoolOptions


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SimulatedPool(PoolOptions):
    """A pool as in a placement, and how long its replicas take: a batch of b rows takes fixed_ms + b * row_ms.

    `hop_ms` is the way there and back, that of the client included; `start_s` passes from the decision to have a
    replica until it answers.
    """

    fixed_ms: float = Field(ge=0)
    row_ms: float = Field(gt=0)
    hop_ms: float = Field(default=3.0, ge=0)
    start_s: float = Field(default=5.0, ge=0)

    def batch_s(self, rows: int) -> float:
        return (self.fixed_ms + rows * self.row_ms) / 1e3

    def rows_per_s(self, most_rows: int) -> float:
        """The rows a second that a replica executes in full batches."""
        return most_rows / self.batch_s(most_rows)


class Stretch(_Strict):
    """A time of requests: at one rate, at one that goes from `rate` to `to`, or once from `rate` up to `to` and back.

    The last is half a sine wave squared. Rates are requests a second.
    """

    kind: Literal["constant", "ramp", "wave"] = "constant"
    seconds: float = Field(gt=0)
    rate: float = Field(ge=0)
    to: float = Field(default=0.0, ge=0)

    def rate_at(self, second: float) -> float:
        part = second / self.seconds
        if self.kind == "constant":
            return self.rate
        if self.kind == "ramp":
            return self.rate + (self.to - self.rate) * part
        return self.rate + (self.to - self.rate) * math.sin(math.pi * part) ** 2


class Bursts(_Strict):
    """Every so often, for so long, so many times the rate."""

    every_s: float = Field(gt=0)
    seconds: float = Field(gt=0)
    factor: float = Field(gt=0)


class Scenario(_Strict):
    """One model, its pools in order of preference, and its requests.

    `trace` is a list of stretches, or a CSV file of two columns: second, requests a second from then on. `rows` are
    those of a request, drawn evenly.
    """

    max_batch_size: int = Field(default=16, ge=1)
    pools: list[SimulatedPool] = Field(min_length=1)
    trace: list[Stretch] | Path
    bursts: Bursts | None = None
    rows: list[int] = Field(default=[1], min_length=1)
    deadline_s: float = Field(default=0.0, ge=0)
    # Whether requests travel to a replica as one, as they do where the backend joins their rows.
    merges: bool = True
    fallback: Literal["late", "missing", "never"] = "late"
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "Scenario":
        if max(self.rows) > self.max_batch_size or min(self.rows) < 1:
            raise ValueError(f"rows: expected 1 to max_batch_size ({self.max_batch_size}), got {self.rows}")
        return self

    @property
    def mean_rows(self) -> float:
        return sum(self.rows) / len(self.rows)

    def load(self) -> "Load":
        """Raises ValueError naming the line of a file that is none."""
        return Load(self)


class Load:
    """The requests of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._bursts = scenario.bursts
        self._stretches: list[Stretch] = []
        if isinstance(scenario.trace, Path):
            points = _points(scenario.trace)
            for (start, rate), (end, _) in itertools.pairwise(points):
                self._stretches.append(Stretch(seconds=end - start, rate=rate))
        else:
            self._stretches = scenario.trace
        self._starts = [0.0]
        for stretch in self._stretches:
            self._starts.append(self._starts[-1] + stretch.seconds)
        self.seconds = self._starts[-1]

    def rate(self, second: float) -> float:
        """Requests a second."""
        number = min(bisect_right(self._starts, second), len(self._stretches)) - 1
        rate = self._stretches[number].rate_at(second - self._starts[number])
        if self._bursts is not None and second % self._bursts.every_s >= self._bursts.every_s - self._bursts.seconds:
            rate *= self._bursts.factor
        return rate

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        """The seconds at which requests come: a Poisson process, by thinning of one with the rate's bound."""
        bound = max((max(stretch.rate, stretch.to) for stretch in self._stretches), default=0.0)
        bound *= max(1.0, self._bursts.factor if self._bursts is not None else 1.0)
        second = 0.0
        while bound:
            second += rng.expovariate(bound)
            if second >= self.seconds:
                return
            if rng.random() * bound < self.rate(second):
                yield second


def _points(path: Path) -> list[tuple[float, float]]:
    """Raises ValueError naming the line."""
    points: list[tuple[float, float]] = []
    try:
        text = files.read_utf8(path)
    except OSError as error:
        raise ValueError(f"trace {path}: {reason(error)}") from None
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
        try:
            second, rate = map(float, row)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected SECOND,RATE, got {','.join(row)[:80]!r}") from None
        is_rising = not points or second > points[-1][0]
        if not (0 <= rate < math.inf and abs(second) < math.inf and is_rising):
            raise ValueError(f"{path}:{number}: expected rising seconds, and a rate of 0 or more")
        points.append((second, rate))
    if len(points) < 2:
        raise ValueError(f"{path}: expected two lines or more")
    return points
