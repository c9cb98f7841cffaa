"""What a person may get wrong at the command line: none hangs, none ends in a traceback, and each names what was wrong.

Every case is a command in a folder of its own with files that are wrong. It ends with 1 or 2 and a few lines that name
the flag, the file or the value; it leaves nothing behind, and no library that takes seconds is imported for it.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tutti.ensembles.cli
import tutti.export.cli
import tutti.export.init
from tests.models import onnx_add_one
from tutti.app import cli, serve_options
from tutti.app.process_end import Ending

SEED = 28
LEAST_CASES = 200
# What a message may have: the usage is some of it.
MOST_LINES = 10
MOST_WIDTH = 900
# They take seconds to be imported.
SLOW_LIBRARIES = ("torch", "transformers", "ray", "sklearn", "locust")

Content = str | bytes | Callable[[Path], object]

CONFIG = """name: "add_one"
backend: "onnxruntime"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
"""
ENSEMBLE = """name: "e"
platform: "ensemble"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling { step {
  model_name: "add_one" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
} }
"""
POOLS = "pools:\n- name: cpu\n  replicas: 1\n  num_cpus: 1\n  models: ['*']\n"
SCENARIO = "payloads: [{model: add_one}]\nstages: [{seconds: 1, rate: 5}]\n"
TRACE = "second\n0\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 90405214\n"
PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")
CHECK = ("serve", "repo", "--check")
# Bytes that are no text, as the shell hands them over.
NO_TEXT = "\udcff\udcfe"


@dataclass(frozen=True)
class Case:
    """A command, what its message must name, and the files beside `repo`, which holds the model `add_one`."""

    what: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    files: Mapping[str, Content | None] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return ascii(self.what)[1:-1]


def case(what: str, arguments: str | Sequence[str], *names: str, **files: Content | None) -> Case:
    """`files` by names of a single word with the suffix after an underscore, as p_yaml; None is a folder."""
    given = arguments.split() if isinstance(arguments, str) else arguments
    there = {name.replace("_", ".", 1): content for name, content in files.items()}
    return Case(f"{what}: {' '.join(given)[:60]}", tuple(given), names, there)


def in_repository(what: str, path: str, content: Content | None, *names: str) -> Case:
    return Case(f"{what}: {path}", CHECK, names, {f"repo/{path}": content})


def fifo(path: Path) -> None:
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def cyclic(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def misspelt_flags() -> Iterator[Case]:
    """One character of a flag is another: the command's own usage, and the flag that was meant."""
    rng = random.Random(SEED)
    parsers = {
        ("serve", "none"): serve_options.make_parser(),
        ("ensemble", "show", "none"): tutti.ensembles.cli.make_parser(),
        ("export", "text", "none"): tutti.export.cli.make_parser(),
        ("init", "models", "none"): tutti.export.init.make_parser(),
    }
    for command, parser in parsers.items():
        for choice in command:  # down to the parser of the last command
            groups = [group for group in parser._actions if isinstance(group.choices, dict)]
            parser = next((group.choices[choice] for group in groups if choice in group.choices), parser)  # type: ignore[index, operator]
        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        flags = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
        for flag in rng.sample(sorted(set(flags) - {"--help", "--engine-of"}), min(12, len(flags) - 2)):
            at = rng.randrange(3, len(flag))
            wrong = flag[:at] + "9" + flag[at + 1 :]
            yield case("a misspelt flag", [*command, f"{wrong}=1"], wrong, f"usage: tutti {command[0]}", "did you mean")


NUMBERS = {
    "serve none": (
        "--http-port", "--grpc-port", "--metrics-port", "--http-max-input-size", "--grpc-max-message-size",
        "--max-inflight-bytes", "--front-end-processes", "--exit-timeout-secs", "--control-timeout-secs",
        "--repository-poll-secs", "--gateways", "--gpu-replicas", "--cpu-replicas", "--hang-timeout-secs",
    ),
    "export text none": ("--version", "--latency-goal-ms"),
    "export vision none": ("--image-size",),
    "init models none": ("--version", "--max-batch-size"),
    "ensemble explain none": ("--repeat",),
    "cluster plan none": ("--gpus", "--gpu-memory-gb", "--cpu-replicas"),
    "cluster why none": ("--gpus",),
    "loadtest run steady": ("--seed", "--processes"),
    "loadtest saturate steady": ("--start", "--seconds", "--within"),
}  # fmt: skip


def wrong_numbers() -> Iterator[Case]:
    rng = random.Random(SEED)
    wrong = ["-1", "nan", "9" * 5000, "1_0", "0x10", "\u0663", "", "1e999", "true", NO_TEXT, "1\x1b[31m", "--"]
    for command, flags in NUMBERS.items():
        for flag in flags:
            for value in rng.sample(wrong if command[0] != "l" else wrong[:-1], 2):  # `--` is Locust's
                yield case("no number", [*command.split(), f"{flag}={value}"], flag)


def wrong_ports() -> Iterator[Case]:
    for flag in ("--http-port", "--grpc-port", "--metrics-port"):
        for port in ("65536", "99999", "4294967376", "80a"):
            yield case("no port", [*CHECK, flag, port], flag, f"got '{port}'")
    yield case("no port", "loadtest run steady --url 127.0.0.1:99999", "--url", "99999")
    yield case("no port", "loadtest worker --master-host h --master-port 0", "--master-port")


def wrong_values() -> Iterator[Case]:
    yield case("a wrong host", ["serve", "repo", "--host", "no.such.host.invalid", *PORTS], "no.such.host.invalid")
    yield case("a wrong host", ["serve", "repo", "--host", "[::1]", *PORTS], "[::1]")
    yield case("a wrong host", ["serve", "repo", "--host", NO_TEXT, *PORTS], "expected an address")
    yield case("a wrong host", ["serve", "repo", "--supervise", "--host", "256.1.1.1", *PORTS], "256.1.1.1")
    for flag, value in (
        ("--http-restricted-api", "infer:k=v"),
        ("--http-restricted-api", "health:k"),
        ("--http-restricted-api", "health:a b=v"),
        ("--grpc-restricted-protocol", "health:k=\u00e9"),
        ("--grpc-restricted-protocol", "x"),
        ("--cache-config", "local,size=-1"),
        ("--cache-config", "redis,host=x"),
        ("--trace-config", "level=ALL"),
        ("--trace-config", "rate=x"),
        ("--trace-config", "nothing=1"),
    ):
        yield case("a wrong value", [*CHECK, f"{flag}={value}"], flag)
    for value in ("R", "R:x", "R:1:2:3", ":1", "R:99999999999999999999"):
        limits = ["--rate-limit=execution_count", f"--rate-limit-resource={value}"]
        yield case("a wrong value", [*CHECK, *limits], "--rate-limit-resource", value)
    yield case("no name", [*CHECK, "--server-name="], "--server-name")
    yield case("no name", [*CHECK, "--server-name=a\nb"], "--server-name")
    yield case("too many", "serve repo --check --front-end-processes 1000000", "--front-end-processes")
    yield case("no model", [*CHECK, "--model-control-mode=explicit", "--load-model=ad_one"], "did you mean 'add_one'?")
    yield case("no variant", "export text none --variants fp8", "--variants", "'fp8'")
    yield case("no name", "export text none --name a/b", "--name", "'a/b'")
    yield case("no name", ["export", "text", "none", "--ensemble", ".."], "--ensemble", "'..'")
    yield case("no name", ["export", "audio", "none", f"--name={NO_TEXT}"], "--name")
    yield case("no labels", "export vision none --labels cat,,dog", "--labels", "'cat,,dog'")
    yield case("no labels", "export vision none --labels cat,cat", "--labels", "'cat,cat'")
    yield case("no template", "export vision none --labels a,b --template {x}", "--template", "'{x}'")
    yield case("no capability", "export text none --format tensorrt --compute-capability x", "--compute-capability")
    yield case("no name", ["init", "models", "m.onnx", "--name="], "--name", m_onnx=onnx_add_one())
    yield case("no name", ["init", "models", "m.onnx", "--name=../x"], "'../x'", m_onnx=onnx_add_one())
    yield case("no command", ["srve"], "did you mean serve?")
    yield case("no command", [""], "no command ''")
    yield case("no command", [NO_TEXT], "no command")
    yield case("no command", ["x" * 5000], "no command 'xxx")
    yield case("no command", ["ensemble", "chek"], "'chek'")
    yield case("no command", ["cluster"], "usage: tutti cluster")
    yield case("too much", "doctor now", "'now'")
    yield case("too much", "init models none more", "'more'")


def wrong_paths() -> Iterator[Case]:
    kinds: dict[str, Content | None] = {"fifo": fifo, "dangling": dangling, "cyclic": cyclic, "endless": endless}
    for kind, make in {**kinds, "file": "x"}.items():
        yield case(f"a repository that is {kind}", ["serve", "odd", "--check"], "'odd'", odd=make)
    yield case("an empty path", ["serve", "", "--check"], "model_repository: expected a path")
    yield case("an empty path", ["cluster", "plan", "", "--gpus=1"], "model_repository: expected a path")
    yield case("an empty path", ["export", "text", "none", "--repository="], "--repository: expected a path")
    yield case("nothing in it", ["serve", "empty", "--check"], "'empty' holds no model", empty=None)
    yield case("below a file", ["serve", "f/repo", "--check"], "'f/repo'", f="x")
    for kind, make in {**kinds, "folder": None}.items():
        yield case(f"keys that are {kind}", [*CHECK, "--api-key-file=keys"], "--api-key-file keys", keys=make)
        yield case(f"a placement that is {kind}", "cluster why repo --placement p.yaml", "p.yaml", p_yaml=make)
        yield case(f"a simulation that is {kind}", "cluster simulate p.yaml", "p.yaml", p_yaml=make)
        yield case(f"a graph that is {kind}", "ensemble build g.py --repository repo", "g.py", g_py=make)
        yield case(f"labels that are {kind}", "export text none --labelled l.tsv", "l.tsv", l_tsv=make)
        yield case(f"a model that is {kind}", "init models m.onnx", "m.onnx", m_onnx=make)
        yield case(f"a scenario that is {kind}", "loadtest run s.yaml", "s.yaml", s_yaml=make)
        yield case(f"a trace that is {kind}", "loadtest replay t.csv s.yaml", "t.csv", t_csv=make, s_yaml=SCENARIO)
    for path in ("none/x.log", "repo"):
        yield case("a log that is none", [*CHECK, f"--log-file={path}"], f"--log-file '{path}'")
    yield case("a log that nobody reads", [*CHECK, "--log-file=odd"], "--log-file 'odd'", odd=fifo)
    yield case("an output that is none", "cluster plan repo --gpus 1 --output no/p.yaml", "no/p.yaml")
    yield case("an output that is none", "cluster plan repo --gpus 1 --output repo", "repo")
    yield case("a report that is none", "export text none --report no/r.html", "--report", "'no/r.html'")
    yield case("a repository that is none", "export text none --repository f/x", "--repository", "'f'", f="x")
    yield case("samples that are none", "export vision none --samples no", "--samples", "'no'")
    yield case("a source that is none", "export audio ./no/where", "'./no/where'")
    yield case("a source that is none", "export text package:../x", "package:../x")
    yield case("a near one", "export text m.onx.pt", "did you mean 'm.onnx.pt'?", **{"m_onnx.pt": "x"})
    yield case("a near one", "init models m.onx", "did you mean 'm.onnx'?", m_onnx=onnx_add_one())
    yield case("a near one", "ensemble show ad_one --repository repo", "did you mean add_one?")
    yield case("a folder that is a file", "init f m.onnx", "'f'", "expected a folder", f="x", m_onnx=onnx_add_one())
    yield case("an output of a run", "loadtest run s.yaml --output f", "--output f", f="x", s_yaml=SCENARIO)


def wrong_texts() -> Iterator[Case]:
    """Files in other encodings, and of other kinds, where a text is expected."""
    contents: dict[str, Callable[[str], bytes]] = {
        "in UTF-16": lambda text: text.encode("utf-16"),
        "with a Latin letter": lambda text: text.encode() + b"# caf\xe9\n",
        "with a zero": lambda text: text.encode() + b"\0",
        "empty": lambda text: b"",
        "a picture": lambda text: b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    }
    commands = {
        "serve repo --check --api-key-file f": ("f", "key\n"),
        "cluster why repo --placement f.yaml": ("f_yaml", POOLS),
        "cluster simulate f.yaml": ("f_yaml", POOLS),
        "loadtest run f.yaml": ("f_yaml", SCENARIO),
        "export text none --labelled f.tsv": ("f_tsv", "label\tsplit\ttext\na\ttrain\tx\n"),
        "serve repo --check --http-use-ssl --http-server-cert f.pem --http-server-key f.pem": ("f_pem", "hello"),
    }
    for command, (name, text) in commands.items():
        for what, spoilt in contents.items():
            yield case(what, command, name.replace("_", "."), **{name: spoilt(text)})
    for what, text in {
        "no YAML": "pools: [",
        "a date that is none": "pools: 2020-99-99",
        "deep": "[" * 1200,
        "keys that are numbers": "1: 2",
        "a list": "- a",
        "nothing": "pools:",
        "code": "pools: !!python/object/apply:os.system ['true']",
    }.items():
        for command in ("cluster why repo --placement f.yaml", "cluster simulate f.yaml"):
            yield case(what, command, "f.yaml", f_yaml=text)
    for before, after in (("replicas", "replica"), (": 1", ": -1"), ("cpus: 1", "cpus: .nan"), ("['*']", "[]")):
        text = POOLS.replace(before, after)
        yield case(f"a pool with {after}", "cluster why repo --placement f.yaml", "f.yaml", f_yaml=text)
    for what, text in {"no split": "label\tsplit\ttext\na\tother\tx\n", "no columns": "a\tb\n"}.items():
        yield case(what, "export text none --labelled f.tsv", "f.tsv", f_tsv=text)
    for what, text in {"words": "second\na\n", "nan": "second\nnan\n"}.items():
        yield case(what, "loadtest replay t.csv s.yaml", "t.csv", t_csv=text, s_yaml=SCENARIO)


def wrong_graphs() -> Iterator[Case]:
    for what, text in {
        "a syntax error": "x = 1\ndef f(:\n",
        "an error": "\nraise ValueError('boom')\n",
        "an exit": "\nimport sys; sys.exit(0)\n",
        "an exit as it builds": "def build(root):\n    raise SystemExit(0)\n",
        "a module that there is not": "\nimport nonexisting_thing\n",
        "no end": "def build(root):\n    return build(root)\n",
    }.items():
        yield case(what, "ensemble build g.py --repository repo", "g.py:2", g_py=text)
    for what, text in {"no build": "x = 1\n", "a number": "build = 3\n", "no graph": "def build(r): pass\n"}.items():
        yield case(what, "ensemble build g.py --repository repo", "g.py: ", g_py=text)
    for value in (
        "q=1",
        "x",
        "x=[1,2,",
        "x=[1,2]",
        'x={"a":1}',
        "x=@none",
        "x=@f",
        "x=@pipe",
        "x=" + "[" * 1200,
        "x=1 x=1",
    ):
        arguments = ["ensemble", "explain", "e", *value.split(), "--repository", "repo"]
        files: dict[str, Content | None] = {
            "repo/e/config.pbtxt": ENSEMBLE,
            "repo/e/1": None,
            "f": "hello",
            "pipe": fifo,
        }
        yield Case(f"a wrong input: {value[:20]}", tuple(arguments), (value[0],), files)


def wrong_models() -> Iterator[Case]:
    good = onnx_add_one()
    kinds: dict[str, bytes] = {
        "a pointer of Git LFS": LFS_POINTER,
        "a page of HTML": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "empty": b"",
        "nothing but zeros": bytes(100),
        "packed with gzip": b"\x1f\x8b\x08" + bytes(20),
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "safetensors": b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}   ',
        "a text in UTF-16": "hello".encode("utf-16"),
    }
    torch = CONFIG.replace("onnxruntime", "pytorch").replace('"add_one"', '"m"')
    for what, content in kinds.items():
        yield in_repository(what, "add_one/1/model.onnx", content, "'add_one'", "1/model.onnx", what)
        for name in ("m.onnx", "m.pt", "m.pkl"):
            if name == "m.pkl" and what.startswith("packed"):
                continue  # as joblib does
            yield case(what, f"init models {name}", f"'{name}'", what, **{name.replace(".", "_"): content})
        files: dict[str, Content | None] = {"repo/m/config.pbtxt": torch, "repo/m/1/model.pt": content}
        yield Case(f"a PyTorch model that is {what}", CHECK, ("'m'", "1/model.pt", what), files)
    for cut in (10, len(good) // 2, len(good) - 10):
        yield in_repository("cut off", "add_one/1/model.onnx", good[:cut], "'add_one'", "model.onnx")
    yield in_repository("a FIFO", "add_one/1/model.onnx", fifo, "'add_one'", "model.onnx")
    yield in_repository("a cyclic link", "add_one/1/model.onnx", cyclic, "'add_one'", "'model.onnx'")
    yield case("another file", "init models m.csv", "'m.csv'", "a text", m_csv="a,b\n")
    source: dict[str, Content | None] = {"c/config.json": "{", "c/vocab.txt": ""}
    yield Case("no JSON", ("init", "models", "c"), ("config.json", "no JSON"), source)
    yield Case("weights of LFS", ("init", "models", "c"), ("w.safetensors", "git lfs pull"), {
        "c/config.json": "{}", "c/vocab.txt": "", "c/w.safetensors": LFS_POINTER,
    })  # fmt: skip


def wrong_configs() -> Iterator[Case]:
    path = "add_one/config.pbtxt"
    for what, content in {
        "an unknown field": CONFIG.replace("max_batch", "max_bach"),
        "a value that is none": CONFIG.replace("TYPE_FP32", "FP32"),
        "a brace too few": CONFIG.replace("}", "", 1),
        "a name of another": CONFIG.replace('"add_one"', '"other"'),
        "a backend that there is not": CONFIG.replace("onnxruntime", "onnxrutnime"),
        "a width of another": CONFIG.replace("dims: 4", "dims: 5", 1),
        "deep": "input {" * 2000,
        "in UTF-16": CONFIG.encode("utf-16"),
        "a picture": b"\x89PNG\r\n\x1a\n",
    }.items():
        yield in_repository(what, path, content, "'add_one'")
    for what, make in {"a FIFO": fifo, "a folder": None, "a cyclic link": cyclic}.items():
        yield in_repository(what, path, make, "'add_one'", "config.pbtxt")


CASES = [
    *misspelt_flags(), *wrong_numbers(), *wrong_ports(), *wrong_values(), *wrong_paths(), *wrong_texts(),
    *wrong_graphs(), *wrong_models(), *wrong_configs(),
]  # fmt: skip
# Some of each kind as processes of their own.
PROCESSES = random.Random(SEED).sample(CASES, 15)


def set_up(given: Case, folder: Path) -> None:
    model = folder / "repo" / "add_one"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    (model / "1" / "model.onnx").write_bytes(onnx_add_one())
    for name, content in given.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listed(folder: Path) -> list[str]:
    return sorted(os.path.join(base, name) for base, *names in os.walk(folder) for some in names for name in some)


def check(given: Case, status: int | str | None, told: str, errors: str) -> None:
    assert status in (1, 2), told
    assert "Traceback" not in told and "Logging error" not in told
    for name in given.names:
        assert name in told
    lines = [line for line in errors.splitlines() if line.strip()]
    assert 0 < len(lines) <= MOST_LINES, told
    assert max(map(len, lines)) <= MOST_WIDTH, told
    assert "\x1b" not in told


@pytest.fixture
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in this process sets no clock that ends it."""
    monkeypatch.setattr(Ending, "begin", lambda self: None)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= LEAST_CASES
    assert len({given.arguments for given in CASES}) >= LEAST_CASES // 2


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_exit")
@pytest.mark.parametrize("given", CASES, ids=lambda given: given.id)
def test_what_is_wrong_is_named(
    given: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(given, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = listed(tmp_path)
    try:
        status: int | str | None = cli.main(given.arguments)
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr()
    check(given, status, told.out + told.err, told.err or told.out)
    assert [path for path in listed(tmp_path) if path not in before and not path.endswith(".export.html")] == []


@pytest.mark.parametrize("given", PROCESSES, ids=lambda given: given.id)
def test_a_process_ends_leaves_nothing_and_imports_nothing_slow(given: Case, tmp_path: Path) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    set_up(given, work)
    before = listed(work)
    command = [sys.executable, "-X", "importtime", "-m", "tutti", *given.arguments]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as started:
        out, err = (text.decode("utf-8", "replace") for text in started.communicate(timeout=60))
    with pytest.raises(ProcessLookupError):  # none of its group is left
        os.killpg(started.pid, signal.SIGKILL)
    lines = err.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    errors = "\n".join(line for line in lines if not line.startswith("import time:"))
    check(given, started.returncode, out + errors, errors or out)
    assert not imported & set(SLOW_LIBRARIES)
    assert listed(work) == before
    left = [path for path in listed(temporary) if not path.endswith(".ses")]  # onnxruntime's own
    assert left == []


CUTS = range(0, len(CONFIG), 10)


@pytest.mark.usefixtures("no_exit")
@pytest.mark.parametrize("cut", CUTS)
def test_a_configuration_that_is_cut_is_served_or_refused_by_its_place(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(Case("", (), (), {"repo/add_one/config.pbtxt": CONFIG[:cut]}), tmp_path)
    monkeypatch.chdir(tmp_path)
    status = cli.main(CHECK)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    is_parsed = CONFIG[:cut].count("{") == CONFIG[:cut].count("}") and CONFIG[:cut].rstrip().endswith(("}", '"', "8"))
    if status == 0:  # what is left out is the graph's
        assert is_parsed or not cut
        assert "add_one" in told
    else:
        assert status == 1
        assert "not served: model 'add_one': " in told


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_front_ends_tell_the_address_that_is_taken(flag: str, tmp_path: Path) -> None:
    set_up(Case("", (), ()), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = [other for other in PORTS if not other.startswith(flag)]
        command = [sys.executable, "-m", "tutti", "serve", "repo", "--supervise", f"{flag}={port}", *others]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use ({flag})" in done.stderr
