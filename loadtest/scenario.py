"""What a load test is: a target, payloads, arrivals in stages, and the goal. Pure: read from YAML, checked, no more."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutti.loadtest import names
from tutti.loadtest.addresses import address
from tutti.loadtest.errors import ScenarioError

Protocol = Literal["http", "grpc", "grpc-stream"]
Address = Annotated[str, AfterValidator(address)]


def _of_one_line(header: str) -> str:
    """An error does not show the value: it may be a key."""
    if not (header.isascii() and header.isprintable()):
        raise ValueError("expected ASCII characters that can be seen")
    return header


Header = Annotated[str, AfterValidator(_of_one_line)]
# What stands for the value of a header in reports.
NOT_SHOWN = "(not shown)"
# Numbers above these are refused as a slip.
MOST_ROWS, MOST_SIZE = 1_000_000, 1 << 30


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Target(_Strict):
    """Where requests go. Several addresses take turns; `metrics` is the server's page, for the time line."""

    protocol: Protocol = "http"
    urls: list[Address] = Field(default=["127.0.0.1:8000"], min_length=1)
    metrics: list[Address] = []
    headers: dict[Header, Header] = {}
    shared_memory: bool = False
    connections: int = Field(default=4096, ge=1)


class Sizes(_Strict):
    """The size of a variable dimension, drawn for each payload: evenly between two, or by the logarithm."""

    low: int = Field(ge=1, le=MOST_SIZE)
    high: int = Field(ge=1, le=MOST_SIZE)
    kind: Literal["uniform", "lognormal"] = "uniform"
    multiple_of: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Sizes":
        if self.high < self.low:
            raise ValueError(f"expected low <= high, got {self.low} and {self.high}")
        return self


class Payload(_Strict):
    """What is asked of one model: seeded data from its metadata, or files for some of its inputs.

    `files` are paths with wildcards by input, relative to the scenario: texts of each line of .txt, bytes of others, or
    samples of .wav for inputs in floating point. `sizes` are those of variable dimensions, by input.
    """

    model: str
    version: str = ""
    weight: float = Field(default=1.0, gt=0)
    rows: int = Field(default=1, ge=1, le=MOST_ROWS)
    sizes: dict[str, Sizes] = {}
    files: dict[str, str] = {}
    inputs: list[str] = []
    outputs: list[str] = []
    parameters: dict[str, bool | int | str] = {}
    # How many different ones are drawn.
    count: int = Field(default=64, ge=1, le=MOST_ROWS)


class Stage(_Strict):
    """A stretch of the run: a constant `rate` a second, a ramp from it to `to`, or (diurnal) up to `to` and back."""

    kind: Literal["constant", "ramp", "diurnal"] = "constant"
    name: str = ""
    seconds: float = Field(gt=0)
    rate: float = Field(ge=0)
    to: float = Field(default=0.0, ge=0)


class Arrivals(_Strict):
    """How requests arrive: evenly, at random (Poisson), in bursts (gamma, `cv` of the gaps), or as a file says.

    `trace` is CSV or Parquet with a column `second` (or `scheduled_s`) of arrivals, or CSV of seconds and the rates
    from then on; sped up by `speed`. It replaces the stages.
    """

    process: Literal["constant", "poisson", "gamma"] = "poisson"
    cv: float = Field(default=3.0, gt=0)
    trace: Path | None = None
    speed: float = Field(default=1.0, gt=0)


class Goal(_Strict):
    """What a run must show. To be certain of an error rate of 1% takes about 400 requests, of 0.1% ten times as many.

    `min_goodput` counts requests a second that are answered without an error and, where `p99_ms` is set, within it.
    """

    p99_ms: float | None = Field(default=None, gt=0)
    error_rate: float = Field(default=0.01, ge=0, le=1)
    min_goodput: float = Field(default=0.0, ge=0)

    @property
    def late_s(self) -> float:
        """A request that is sent more than this after it was due counts as late.

        It is a tenth of the goal: lateness counts as latency anyway, and decides nothing while it is small beside that.
        """
        return max(0.010, (self.p99_ms or 0.0) / 1e4)


class Scenario(_Strict):
    """A whole load test. `warmup_s` seconds at the first stage's rate come before the stages, and do not count."""

    name: str = "load test"
    target: Target = Target()
    payloads: list[Payload] = Field(min_length=1)
    arrivals: Arrivals = Arrivals()
    stages: list[Stage] = []
    warmup_s: float = Field(default=2.0, ge=0)
    timeout_s: float = Field(default=30.0, gt=0)
    slo: Goal = Goal()
    seed: int = 0
    folder: Path = Path()

    @model_validator(mode="after")
    def _check(self) -> "Scenario":
        if not self.stages and self.arrivals.trace is None:
            raise ValueError("stages: expected at least one, or arrivals.trace")
        return self

    def as_json(self) -> dict[str, Any]:
        """For files that are left behind: without the values of headers, which are keys."""
        told: dict[str, Any] = json.loads(self.model_dump_json())
        told["target"]["headers"] = dict.fromkeys(self.target.headers, NOT_SHOWN)
        return told


def load(path: Path, changes: dict[str, Any] | None = None) -> Scenario:
    """Read a scenario; `changes` replace fields. Raises ScenarioError naming the field that is wrong."""
    document = _read(path)
    try:
        return Scenario(**{"name": path.stem, "folder": path.resolve().parent, **_merged(document, changes or {})})
    except ValidationError as error:
        problems = [_told(wrong["loc"], wrong["type"], wrong["msg"]) for wrong in error.errors()]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ScenarioError(f"{path}: {'; '.join(problems[:3])}{more}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}: expected a scenario in YAML") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: byte {error.start} is no UTF-8: expected a scenario in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ScenarioError(f"{path}{where}: no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ScenarioError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        got = "an empty file" if document is None else type(document).__name__
        raise ScenarioError(f"{path}: expected a mapping with payloads and stages (docs/loadtest.md), got {got}")
    return document


# The model that each field of a scenario holds.
_SECTIONS: dict[str, type[_Strict]] = {
    "target": Target, "payloads": Payload, "arrivals": Arrivals, "stages": Stage, "slo": Goal,
}  # fmt: skip


def _told(where: Sequence[int | str], kind: str, message: str) -> str:
    """One field that is wrong. Of one that there is not: the one that was meant, or where it belongs."""
    field = ".".join(map(str, where)) or "scenario"
    if kind != "extra_forbidden":
        return f"{field}: {message.removeprefix('Value error, ')}"
    name = str(where[-1])
    owner = _SECTIONS.get(str(where[0]), Scenario) if len(where) > 1 else Scenario
    homes = [section for section, model in _SECTIONS.items() if name in model.model_fields and model is not owner]
    if homes and len(where) <= 3:
        return f"{field}: no such field here: it belongs into {' or '.join(homes)}"
    known = Sizes.model_fields if len(where) > 3 else owner.model_fields
    return f"{field}: no such field{names.near(name, known) or ': expected one of ' + ', '.join(known)}"


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
