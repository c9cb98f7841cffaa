"""Flags of tritonserver's, and of others', to `tutti serve`: taken as what they mean, or refused with what to use."""

import re
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import engine_over, serving
from tutti.app import cli, foreign_flags, front_end_setup, serve_options
from tutti.app.front_end_server import Addresses
from tutti.app.restarts import UNUSABLE
from tutti.devices.gpu_metrics import GpuMetrics
from tutti.frontends.grpc import keepalive
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.metrics_page import Metrics
from tutti.observing.logs import Logs

# All that tritonserver 2.51 and its successors of 2026 list.
TRITON = """
--id --exit-timeout-secs --log-verbose --log-info --log-warning --log-error --log-format --log-file
--model-store --model-repository --exit-on-error --disable-auto-complete-config --strict-readiness
--model-control-mode --repository-poll-secs --load-model --model-config-name --model-load-thread-count
--model-load-retry-count --model-namespacing --enable-peer-access
--allow-http --http-address --http-port --reuse-http-port --http-header-forward-pattern --http-thread-count
--http-max-input-size --http-restricted-api
--allow-grpc --grpc-address --grpc-port --reuse-grpc-port --grpc-header-forward-pattern --grpc-infer-thread-count
--grpc-infer-allocation-pool-size --grpc-max-response-pool-size --grpc-use-ssl --grpc-use-ssl-mutual
--grpc-server-cert --grpc-server-key --grpc-root-cert --grpc-infer-response-compression-level
--grpc-keepalive-time --grpc-keepalive-timeout --grpc-keepalive-permit-without-calls
--grpc-http2-max-pings-without-data --grpc-http2-min-recv-ping-interval-without-data --grpc-http2-max-ping-strikes
--grpc-max-connection-age --grpc-max-connection-age-grace --grpc-restricted-protocol
--allow-sagemaker --sagemaker-port --sagemaker-safe-port-range --sagemaker-thread-count
--allow-vertex-ai --vertex-ai-port --vertex-ai-thread-count --vertex-ai-default-model
--allow-metrics --allow-gpu-metrics --allow-cpu-metrics --metrics-address --metrics-port --metrics-interval-ms
--metrics-config --trace-config --backend-directory --backend-config --repoagent-directory
--cache-config --cache-directory --rate-limit --rate-limit-resource
--pinned-memory-pool-byte-size --cuda-memory-pool-byte-size --cuda-virtual-address-size
--min-supported-compute-capability --buffer-manager-thread-count --host-policy --model-load-gpu-limit
--allow-client-shm --strict-model-config --response-cache-byte-size
--trace-file --trace-level --trace-rate --trace-count --trace-log-frequency
"""
OTHERS = """
--host --hostname --port --prometheus-port --payload-limit --model --model-id --served-model-name --revision --tokenizer
--dtype --quantization --pooling --max-model-len --auto-truncate --max-batch-tokens --max-batch-requests
--max-client-batch-size --max-num-seqs --max-concurrent-requests --tokenization-workers --tensor-parallel-size
--gpu-memory-utilization --api-key --ssl-keyfile --ssl-certfile --uds-path --otlp-endpoint --uvicorn-log-level
--cors-allow-origin --root-path
"""


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        serve_options.parse(["models", *flags])
    assert ended.value.code == UNUSABLE
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", f"{TRITON}{OTHERS}".split())
def test_no_flag_is_unknown(flag: str) -> None:
    known = serve_options.make_parser()._option_string_actions
    assert flag in known
    assert flag in (ROOT / "docs" / "protocol.md").read_text(), "docs/protocol.md has a table of them"


@pytest.mark.triton
def test_the_list_is_that_of_a_real_tritonserver() -> None:
    listed = set(re.findall(r"^  (--[a-z0-9-]+)", tritonserver.usage(), re.MULTILINE)) - {"--help"}
    assert len(listed) > 80
    assert listed <= set(TRITON.split())


@pytest.mark.parametrize("flag", foreign_flags.REFUSED)
@pytest.mark.parametrize("value", ["", "=1"])
def test_what_is_not_here_says_what_to_use(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag}: tutti has no such flag: {foreign_flags.REFUSED[flag]}" in refusal(capsys, flag + value)


@pytest.mark.parametrize("flag", foreign_flags.FIXED)
def test_what_says_how_it_is_here_is_taken(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, instead = foreign_flags.FIXED[flag]
    for value in values:
        assert serve_options.parse(["models", flag, value.upper()])
    assert f"expected {' or '.join(values)}, got 'other': {instead}" in refusal(capsys, f"{flag}=other")


def test_what_means_the_same_is_taken_as_that() -> None:
    flags = (
        "--id=own --port=1 --prometheus-port=2 --hostname=::1 --payload-limit=5 --log-verbose=true --trace-rate=7 "
        "--trace-file=f --trace-level=TIMESTAMPS --trace-count=-1 --trace-log-frequency 3 --response-cache-byte-size=9"
    )
    options = serve_options.parse(["models", *flags.split()])
    assert (options.server_name, options.http_port, options.metrics_port, options.host) == ("own", 1, 2, "::1")
    assert (options.http_max_input_size, options.log_verbose) == (5, 1)
    assert front_end_setup.cache_size(options.cache_config) == 9
    config = front_end_setup.tracing.parse_config(options.trace_config)
    assert (config.rate, config.file, config.levels, config.count, config.log_frequency) == (
        7, "f", ("TIMESTAMPS",), -1, 3,
    )  # fmt: skip


def test_a_value_may_stand_behind_a_switch() -> None:
    options = serve_options.parse(["--allow-client-shm", "TRUE", "--grpc-use-ssl", "false", "models", "--supervise"])
    assert (options.allow_client_shm, options.grpc_use_ssl, options.supervise) == (True, False, True)
    assert str(options.model_repository) == "models"


def addresses(*flags: str) -> Addresses:
    return front_end_setup.addresses(serve_options.parse(["models", *flags]))


def test_each_front_end_has_its_address() -> None:
    assert addresses("--host=h") == Addresses("h", grpc_host="h", metrics_host="h")
    assert addresses("--http-address=a") == Addresses("a", grpc_host="127.0.0.1", metrics_host="a")
    own = addresses("--http-address=a", "--grpc-address=b", "--metrics-address=c")
    assert own == Addresses("a", grpc_host="b", metrics_host="c")


def test_front_ends_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert addresses("--allow-http=false").http_port is None
    assert addresses("--allow-grpc=false").grpc_port is None
    assert addresses("--allow-metrics=false").metrics_port is None
    assert "expected one of them" in refusal(capsys, "--allow-http=false", "--allow-grpc=false")


@pytest.mark.parametrize("flag", ["--allow-http=0", "--allow-grpc=0", "--http-address=127.0.0.2"])
def test_what_front_end_processes_do_not_have_is_done_in_one_process(flag: str) -> None:
    assert cli.front_ends(serve_options.parse(["models", flag]), has_gpu=True, cores=16) == 0


@pytest.mark.parametrize("name", ["info", "warning", "error"])
def test_kinds_of_lines_can_be_left_out(name: str) -> None:
    options = serve_options.parse(["models", f"--log-{name}=false"])
    settings = Logs(kinds=(options.log_info, options.log_warning, options.log_error)).settings()
    assert [kind for kind in ("info", "warning", "error") if not settings[f"log_{kind}"]] == [name]


def test_what_is_measured_can_be_left_out(repository: Repository) -> None:
    with engine_over(repository.root) as engine:
        assert b"nv_cpu_memory_used_bytes" in Metrics(engine).render()[0]
        assert b"nv_cpu" not in Metrics(engine, shows_host=False).render()[0]


def test_gpus_are_read_as_often_as_is_said() -> None:
    class Source:
        reads = 0

        def gpus(self) -> list[object]:
            self.reads += 1
            return []

    now, source = [0.0], Source()
    metrics = GpuMetrics(source, lambda: now[0], interval_s=5.0)  # type: ignore[arg-type]
    for time_s in (0.0, 4.9, 5.0):
        now[0] = time_s
        metrics.sample()
    assert source.reads == 2


def test_readiness_may_leave_models_out(repository: Repository) -> None:
    repository.add("broken", 'backend: "onnxruntime"', {})
    with engine_over(repository.root) as engine:
        assert not engine.is_ready()
        engine.is_strict = False
        assert engine.is_ready()


def test_settings_of_connections_reach_the_servers_that_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    for setting in keepalive.SETTINGS:
        with_grpcio = serve_options.parse(["models", f"{setting.flag}=1", "--grpc-server=grpcio"])
        assert keepalive.settings_of(with_grpcio) == ((setting.name, 1),)
        if setting.is_native:
            assert keepalive.settings_of(serve_options.parse(["models", setting.flag, "1"])) == ((setting.name, 1),)
        else:
            assert f"{setting.flag} needs --grpc-server grpcio" in refusal(capsys, f"{setting.flag}=1")
        assert keepalive.native(((setting.name, 1),)) == ({setting.name: 1} if setting.is_native else {})


@pytest.mark.parametrize("value", ["least", "most"])
@pytest.mark.parametrize("setting", keepalive.SETTINGS, ids=lambda setting: str(setting.name))
def test_a_server_starts_with_each_of_them(repository: Repository, setting: keepalive.Setting, value: str) -> None:
    """With the lowest value that is taken, and the highest."""
    given = {"least": setting.least, "most": 2**31 - 1}[value]
    text = ("true" if given else "false") if setting.unit == "BOOL" else str(given)
    if setting.is_native:
        options = serve_options.parse(["models", setting.flag, text])
        with engine_over(repository.root) as engine:
            front = GrpcFront(Api(engine, Limits(grpc_settings=keepalive.settings_of(options))), "127.0.0.1", 0)
            front.start()
            front.stop()
    else:
        options = serve_options.parse(["models", "--grpc-server", "grpcio", setting.flag, text])
        assert keepalive.native(keepalive.settings_of(options)) == {}


def test_settings_that_no_server_takes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for setting in keepalive.SETTINGS:
        if setting.unit != "BOOL":
            for wrong in (setting.least - 1, 2**31):
                assert f"expected a whole number from {setting.least} to" in refusal(capsys, f"{setting.flag}={wrong}")


def test_a_server_does_what_they_say(repository: Repository, tmp_path: Path) -> None:
    """On three addresses, ready without one of its models, with pings over gRPC, and without the machine's metrics."""
    repository.add("broken", 'backend: "onnxruntime"', {})
    flags = (
        "--exit-on-error=false --strict-readiness false --grpc-address 127.0.0.2 --metrics-address=127.0.0.3 "
        "--grpc-keepalive-time=100 --allow-cpu-metrics=false --model-load-thread-count=1"
    )
    with serving(repository.root, tmp_path / "log", *flags.split()) as served:
        port = int(served.grpc.partition(":")[2])
        with socket.create_connection(("127.0.0.2", port), timeout=60) as client:
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            assert any(frame == 6 for frame in frames(client))
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=60)
        page = f"http://{served.metrics.replace('127.0.0.1', '127.0.0.3')}/metrics"
        assert b"nv_cpu" not in urllib.request.urlopen(page, timeout=60).read()


def frames(client: socket.socket) -> "list[int]":
    """The types of the frames of HTTP/2 up to the first ping, which is 6."""
    with client.makefile("rb") as file:
        found: list[int] = []
        while 6 not in found:
            head = file.read(9)
            found.append(head[3])
            file.read(int.from_bytes(head[:3]))
        return found
