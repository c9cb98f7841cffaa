"""What of the Ray application needs no Ray: messages, placement, and the pools' status and choice."""

import argparse
import ast
import asyncio
import pickle
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.serving import Gather
from tutti.app import foreign_flags, serve_options
from tutti.core import wire
from tutti.core.errors import ConfigError, InferError, InvalidArgument
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.frontends.grpc import keepalive
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import run, sequences, streams
from tutti.ray_app.fallback import MIN_HOP_ROWS, hop_policy
from tutti.ray_app.members import PoolStatus, another
from tutti.ray_app.options import Options
from tutti.ray_app.placement import plan_pools
from tutti.ray_app.replica import ReplicaOptions
from tutti.repository import config
from tutti.repository.policies import BatchingPolicy


def test_batches_survive_the_wire() -> None:
    texts = np.array([[b"a"], ["ü".encode()]], dtype=object)
    requests = [
        InferRequest(
            "m", {"x": Tensor.of("x", np.full((n, 2), n, np.float32)), "t": Tensor.of("t", texts)}, "2", f"id{n}"
        )
        for n in (1, 3)
    ]
    sink = Gather(2)
    calls = [Call(request, sink) for request in requests]
    calls[1].deadline_ns = 1500
    there = wire.unpack_calls(pickle.loads(pickle.dumps(wire.pack_calls(calls, 1000))), sink, 9000)
    assert [call.deadline_ns for call in there] == [0, 9500], "the time left travels, not a clock's reading"
    for sent, got in zip(requests, [call.request for call in there], strict=True):
        assert (got.model_name, got.model_version, got.id) == ("m", "2", sent.id)
        np.testing.assert_array_equal(got.inputs["x"].array(), sent.inputs["x"].array())
        assert got.inputs["t"].array().tolist() == texts.tolist()


def test_answers_survive_the_wire_errors_among_them() -> None:
    answers: list[Answer] = [
        InferResponse("m", "1", [Tensor.of("y", np.arange(4, dtype=np.int64))], {"p": 1}),
        InvalidArgument("no"),
        InferResponse("m", "1", [Tensor.of("y", np.zeros((0, 2), np.float32))]),
    ]
    first, error, empty = wire.unpack_answers(pickle.loads(pickle.dumps(wire.pack_answers(answers))))
    assert isinstance(first, InferResponse)
    assert first.tensor("y").array().tolist() == [0, 1, 2, 3]
    assert first.parameters == {"p": 1}
    assert isinstance(error, InvalidArgument)
    assert isinstance(empty, InferResponse)
    assert empty.tensor("y").array().shape == (0, 2)


@pytest.mark.parametrize(
    ("gpus", "wanted", "cpus", "pools"),
    [
        (0, None, 1, [("cpu", 1)]),
        (2, None, 1, [("gpu", 2), ("cpu", 1)]),
        (4, 1, 0, [("gpu", 1)]),
        (2, 0, 3, [("cpu", 3)]),
    ],
)
def test_pools(gpus: float, wanted: int | None, cpus: int, pools: list[tuple[str, int]]) -> None:
    assert [(pool.name, pool.replicas) for pool in plan_pools(gpus, wanted, cpus)] == pools


@pytest.mark.parametrize(("gpus", "wanted", "cpus"), [(0, None, 0), (1, 2, 1), (1, -1, 1), (1, 1, -1)])
def test_impossible_pools_are_refused(gpus: float, wanted: int | None, cpus: int) -> None:
    with pytest.raises(ConfigError):
        plan_pools(gpus, wanted, cpus)


def test_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = ["triton,file=trace.json", "rate=1", "opentelemetry,url=http://h/x"]
    options = Options(model_repository="models", api_key_file=Path("keys"), log_file="log", trace_config=trace)
    made = options.with_absolute_paths()
    assert made.model_repository == str(tmp_path / "models")
    assert (made.api_key_file, made.log_file) == (tmp_path / "keys", str(tmp_path / "log"))
    assert made.trace_config == [f"triton,file={tmp_path / 'trace.json'}", "rate=1", "opentelemetry,url=http://h/x"]
    assert made.http_server_cert is None


def test_calls_wait_for_a_hop_by_the_models_priorities() -> None:
    text = """
    backend: "onnxruntime" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
    """
    assert hop_policy(config.parse(text, "m")) == BatchingPolicy(MIN_HOP_ROWS)
    made = hop_policy(
        config.parse(
            text
            + """
            dynamic_batching {
              preferred_batch_size: 4 max_queue_delay_microseconds: 9 priority_levels: 2 default_priority_level: 1
              default_queue_policy { default_timeout_microseconds: 5 }
            }
            """,
            "m",
        )
    )
    assert (made.max_batch_size, made.preferred_batch_sizes, made.max_queue_delay_ns) == (MIN_HOP_ROWS, (), 0)
    assert (made.priority_levels, made.default_priority_level, made.queue.timeout_ns) == (2, 1, 5000)


def pool(name: str, *ids: str) -> PoolStatus:
    """A pool whose replicas are up and have a model."""
    status = PoolStatus(name)
    for member in status.present(ids):
        member.saw(member.id, ["m/1"], 0)
    return status


def test_what_was_lost_goes_to_the_least_busy_of_the_first_pool_that_is_up() -> None:
    gpu, cpu = pool("gpu", "a", "b"), pool("cpu", "c")
    both = (gpu, cpu)
    a, b, c = gpu.members["a"], gpu.members["b"], cpu.members["c"]
    a.begins(0, 10)
    assert another(both, "m/1", []) is b
    assert another(both, "m/1", [b]) is a
    assert another(both, "m/1", [a, b]) is c
    assert another(both, "m/1", [a, b, c]) is None
    assert another(both, "m/2", []) is None
    b.lost()
    assert another(both, "m/1", [a]) is c
    gpu.present([])
    assert another(both, "m/1", []) is c


def test_one_missed_probe_is_chance_two_are_down() -> None:
    (member,) = pool("gpu", "a").members.values()
    assert not member.missed()
    assert member.is_up
    assert member.missed()
    assert (member.is_up, member.is_hung) == (False, True)
    assert member.saw("a", ["m/1"], 0)
    assert (member.is_up, member.is_hung) == (True, False)
    assert not member.saw("a", ["m/1"], 1), "nothing that matters has changed"


def test_a_pool_is_up_while_one_of_its_replicas_is() -> None:
    gpu = pool("gpu", "a", "b")
    gpu.members["a"].lost()
    assert gpu.is_up
    assert [member.id for member in gpu.having("m/1")] == ["b"]
    kept = gpu.members["b"]
    assert [member.id for member in gpu.present(["b", "c"])] == ["c"]
    assert gpu.members["b"] is kept
    kept.lost()
    assert not gpu.is_up, "one that was never seen is not up"


def test_how_long_a_replica_was_at_a_batch_leaves_out_those_before_it() -> None:
    (member,) = pool("gpu", "a").members.values()
    member.begins(0, 100)
    member.begins(10, 100)
    assert member.ahead_ns(20) == 180
    assert member.ends(0, 90) == 90
    assert member.ends(10, 170) == 80
    assert member.ahead_ns(171) == 0


class _OneReplica:
    """A router with one replica, which does as it is told."""

    def __init__(self, send: Callable[[], object]) -> None:
        self._send = send

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)

    def places(self, _: str) -> list[tuple[object, object]]:
        return [(None, self)]

    async def send_to(self, *_: object) -> object:
        return self._send()

    async def stream(self, *_: object) -> object:
        return self._send()


def fails() -> object:
    raise RuntimeError("cannot be sent")


def is_cancelled() -> object:
    raise asyncio.CancelledError


@pytest.mark.parametrize("send", [fails, is_cancelled, list])
@pytest.mark.parametrize("is_stream", [False, True])
def test_whatever_goes_wrong_on_the_way_is_answered(send: Callable[[], object], is_stream: bool) -> None:
    router: Any = _OneReplica(send)
    if is_stream and send not in (fails, is_cancelled):
        return
    infer = (
        streams.Streams(router, "m/1", (), ModelStatistics(), 8)
        if is_stream
        else sequences.Sequences("m", router, ModelStatistics(), 10**9, 8)
    )
    for start in (True, False):
        sink = Gather(1)
        call = Call(InferRequest("m", {}, parameters={"sequence_id": 7, "sequence_start": start}), sink)
        infer([call])
        sink.wait()
        assert isinstance(call.answer, InferError)
        assert infer.pending() == 0


# Flags that say how the command runs, and with what of a repository: `run` and `supervisor` read them.
OF_THE_COMMAND = {"repository", "placement", "ray", "ray_address", "num_gpus", "engine_of"}
REFUSED = {
    "supervise": ["--supervise"],
    "check": ["--check"],
    "front_end_processes": ["--front-end-processes", "2"],
    "allow_client_cuda_shm": ["--allow-client-cuda-shm"],
    "rate_limit": ["--rate-limit", "execution_count"],
    "rate_limit_resource": ["--rate-limit-resource", "r:1"],
    "model_load_thread_count": ["--model-load-thread-count", "2"],
    "allow_gpu_metrics": ["--allow-gpu-metrics", "true"],
    "metrics_interval_ms": ["--metrics-interval-ms", "5"],
}
# Of flags whose values must be of a form, and not the default.
VALUES = {
    "http_restricted_api": "health:k=v", "grpc_restricted_protocol": "health:k=v", "trace_config": "rate=1",
    "model_control_mode": "explicit", "load_model": "a", "grpc_server": "grpcio", "log_format": "ISO8601",
    "exit_on_error": "false", "strict_readiness": "false", "log_info": "false", "log_warning": "false",
    "log_error": "false", "allow_http": "false", "allow_grpc": "false", "allow_metrics": "false",
    "allow_cpu_metrics": "false", "grpc_keepalive_permit_without_calls": "false",
    "cache_config": "local,size=7", "model_repository": "models",
}  # fmt: skip


def serve_actions() -> dict[str, argparse.Action]:
    """By their names; those of other servers that are refused have none."""
    actions = serve_options.make_parser()._actions
    return {one.dest: one for one in actions if one.dest not in ("help", foreign_flags.NOWHERE)}


def arguments_for(action: argparse.Action) -> list[str]:
    """The flag with a value other than its default."""
    if not action.option_strings:
        return []
    value = VALUES.get(action.dest, "7" if action.type is not None or action.dest.endswith("name") else "x")
    flags = [action.option_strings[0]] if action.nargs == 0 else [action.option_strings[0], value]
    if action.dest in {setting.dest for setting in keepalive.SETTINGS}:
        flags += ["--grpc-server", "grpcio"]
    return [*flags, "--model-control-mode", "explicit"] if action.dest == "load_model" else flags


@pytest.mark.parametrize("name", sorted(serve_actions()))
def test_no_flag_is_ignored_on_ray(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused, read by the command itself, or an option of the application that something reads."""
    action = serve_actions()[name]
    if name in REFUSED:
        with pytest.raises(SystemExit):
            serve_options.parse(["m", "--ray", *REFUSED[name]])
        assert f"--{name.replace('_', '-')}" in capsys.readouterr().err
        return
    if name in OF_THE_COMMAND:
        assert name in read_in("ray_app/run.py", "tutti/app/cli.py", "tutti/app/serve_options.py")
        return
    assert name in Options.model_fields
    read = read_in("ray_app", "tutti/app/front_end_setup.py", "ray_app/options.py")
    assert "settings_of" in read, "which reads those of connections"
    assert name in read | {setting.dest for setting in keepalive.SETTINGS}
    files = [f"--{one}-{file}" for one in ("http", "grpc") for file in ("server-cert", "server-key", "root-cert")]
    files = [argument for flag in files for argument in (flag, "f")]  # which TLS needs
    before, after = (
        run.application_options(serve_options.parse(["m", "--ray", *files, *more]))
        for more in ([], arguments_for(action))
    )
    assert (getattr(after, name) != getattr(before, name)) == bool(action.option_strings)


def read_in(*places: str) -> set[str]:
    """The names of attributes that are read there, and of those by their text (`_tls` of the front-ends)."""
    found: set[str] = set()
    for place in places:
        path = Path(__file__).parents[2] / place
        for file in path.glob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.JoinedStr) and isinstance(node.values[-1], ast.Constant):
                    found |= {f"{protocol}{node.values[-1].value}" for protocol in ("http", "grpc")}  # type: ignore[str-bytes-safe]
    return found


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gateways", "2"], "--gateways needs --ray"),
        (["--ray-address", "a:1"], "--ray-address needs --ray"),
        (["--hang-timeout-secs", "3"], "--hang-timeout-secs needs --ray"),
        (["--placement", "p"], "--placement needs --ray"),
        (["--ray", "--placement", "p", "--cpu-replicas", "1"], "--cpu-replicas does not go with --placement"),
        (["--ray", "--ray-address", "a:1", "--num-gpus", "1"], "--num-gpus is of a cluster started here"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve_options.parse(["m", *flags])
    assert says in capsys.readouterr().err


def test_pools_say_how_many_replicas_they_have() -> None:
    with pytest.raises(ValueError, match="pools say how many replicas they have: expected no cpu_replicas"):
        Options(model_repository="m", pools=[{"name": "a"}], cpu_replicas=2)  # type: ignore[list-item]


@pytest.mark.parametrize("setting", keepalive.SETTINGS, ids=lambda setting: str(setting.name))
def test_serve_yaml_takes_the_same_settings_of_connections(setting: keepalive.Setting) -> None:
    taken = [True, False] if setting.unit == "BOOL" else [setting.least, 2**31 - 1]
    for value in taken:
        options = Options.model_validate({"model_repository": "models", setting.dest: value})
        assert keepalive.settings_of(options) == ((setting.name, value),)
    for wrong in ["maybe"] if setting.unit == "BOOL" else [setting.least - 1, 2**31]:
        with pytest.raises(ValidationError, match=setting.dest):
            Options.model_validate({"model_repository": "models", setting.dest: wrong})


def test_replicas_log_what_the_flags_say() -> None:
    options = Options(
        model_repository="m", log_verbose=2, log_format="json", log_info=False, log_warning=True, log_error=False
    )
    logs = ReplicaOptions.of(options, ["a"], has_gpu=False).logs()
    assert logs.settings() == {
        "log_file": "", "log_info": False, "log_warning": True, "log_error": False, "log_verbose_level": 2,
        "log_format": "json",
    }  # fmt: skip
