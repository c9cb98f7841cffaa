"""What a server says of itself before a run: that it is there, its models' inputs and steps; in one line, what is not.

Over HTTP without proxies, as the clients of a run go.
"""

import http.client
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from tutti.loadtest import names
from tutti.loadtest.addresses import split
from tutti.loadtest.advice import KEY
from tutti.loadtest.errors import RunError
from tutti.loadtest.payloads import TensorInfo
from tutti.loadtest.scenario import Scenario, Target

# Seconds to wait for metadata: a server that is slower with it cannot be load-tested.
_PATIENCE_S = 4.0
# At most this many of a server's models are listed in an error.
_MOST_NAMES = 30
_START = "start a server there, as by `tutti serve model_repository`, or name another with --url HOST:PORT"


def check(scenario: Scenario) -> dict[tuple[str, str], list[TensorInfo]]:
    """The inputs of each (model, version), once every address has told them. Raises RunError for one that does not."""
    asked = dict.fromkeys((payload.model, payload.version) for payload in scenario.payloads)
    inputs_of: dict[tuple[str, str], list[TensorInfo]] = {}
    for address in scenario.target.urls:
        _reach(address, _START)
        for model, version in asked:
            told = _metadata(scenario.target, address, model, version, _PATIENCE_S)
            inputs_of[model, version] = _inputs(told, address, model)
            _check_outputs(scenario, told, model)
    for address in scenario.target.metrics:
        _check_metrics(address, scenario.target.headers)
    return inputs_of


def metadata(target: Target, address: str, model: str, version: str, patience_s: float) -> list[TensorInfo]:
    """A model's inputs. Raises RunError with the server's reason, and a near name."""
    return _inputs(_metadata(target, address, model, version, patience_s), address, model)


def _metadata(target: Target, address: str, model: str, version: str, patience_s: float) -> dict[str, Any]:
    part = f"/versions/{quote(version, safe='')}" if version else ""

    def over_grpc(client: Any, more: Any) -> Any:
        return client.get_model_metadata(model, version, as_json=True, **more)

    return _ask(target, address, f"/v2/models/{quote(model, safe='')}{part}", over_grpc, model, patience_s)


def _inputs(told: Mapping[str, Any], address: str, model: str) -> list[TensorInfo]:
    try:
        return [TensorInfo.of({"shape": [], **tensor}) for tensor in told.get("inputs", [])]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{address}: what it tells of model '{model}' is no metadata: is it a server?") from None


def _check_outputs(scenario: Scenario, told: Mapping[str, Any], model: str) -> None:
    known = [str(tensor.get("name")) for tensor in told.get("outputs", []) if isinstance(tensor, dict)]
    for number, payload in enumerate(scenario.payloads):
        for name in payload.outputs:
            if payload.model == model and name not in known:
                hint = names.near(name, known)
                raise RunError(
                    f"payloads.{number}: model '{model}' has the outputs {', '.join(known)}, and no '{name}'{hint}"
                )


def parts(scenario: Scenario) -> list[str]:
    """The models that do the work: those asked, ensembles replaced by their steps, whatever these are."""
    working: dict[str, None] = {}
    ensembles: set[str] = set()
    left = [payload.model for payload in scenario.payloads]
    while left:
        model = left.pop(0)
        steps = [] if model in ensembles else _steps(scenario, model)
        if steps:
            ensembles.add(model)
            left += steps
        elif model not in ensembles:
            working[model] = None
    return list(working)


def _steps(scenario: Scenario, model: str) -> list[str]:
    """Of an ensemble; nothing for others, and where the server does not tell."""

    def over_grpc(client: Any, more: Any) -> Any:
        return client.get_model_config(model, as_json=True, **more)["config"]

    with suppress(RunError, AttributeError, KeyError, TypeError):
        told = _ask(
            scenario.target, scenario.target.urls[0], f"/v2/models/{quote(model, safe='')}/config", over_grpc, model
        )
        return [step["model_name"] for step in told.get("ensemble_scheduling", {}).get("step", [])]
    return []


def _ask(
    target: Target,
    address: str,
    path: str,
    over_grpc: Callable[[Any, Any], Any],
    model: str,
    patience_s: float = _PATIENCE_S,
) -> dict[str, Any]:
    """What is told of a model, over the target's protocol."""
    if target.protocol == "http":
        return _ask_http(target, address, path, model, patience_s)
    import tritonclient.grpc as grpcclient
    from tritonclient.utils import InferenceServerException

    more = {"headers": {key.lower(): value for key, value in target.headers.items()}, "client_timeout": patience_s}
    with grpcclient.InferenceServerClient(address) as client:
        try:
            told: dict[str, Any] = over_grpc(client, more)
            return told
        except InferenceServerException as error:
            status, said = (
                str(error.status()).removeprefix("StatusCode."),
                str(error.message()).splitlines()[0].partition(";")[0],
            )
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise RunError(f"{address} refuses ({status}: {said}): {KEY}")
        if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL"):
            raise RunError(f"{address} does not answer in gRPC ({said}): is it the HTTP port? (--protocol http)")
        index: Any = {}
        with suppress(InferenceServerException):
            index = client.get_model_repository_index(as_json=True, **more)
        raise RunError(_unknown(address, model, said, index.get("models", [])))


def _ask_http(target: Target, address: str, path: str, model: str, patience_s: float) -> dict[str, Any]:
    status, body = _http(address, path, target.headers, None, patience_s)
    said = _json(body)
    if status == 200 and isinstance(said, dict):
        return said
    if status in (401, 403):
        raise RunError(f"{address} refuses (HTTP {status}{_of(said)}): {KEY}")
    _, body = _http(address, "/v2/repository/index", target.headers, b"{}")
    index = _json(body)
    if not isinstance(index, list):
        raise RunError(
            f"{address} answers {path} with HTTP {status}{_of(said)}, as no server of models does: is it another port? "
            "(--url HOST:PORT)"
        )
    raise RunError(_unknown(address, model, _of(said).removeprefix(": "), index))


def _of(said: Any) -> str:
    """What an answer's JSON says is wrong."""
    return f": {said['error']}" if isinstance(said, dict) and "error" in said else ""


def _unknown(address: str, model: str, reason: str, index: Sequence[Mapping[str, Any]]) -> str:
    known = [str(entry.get("name")) for entry in index]
    if model in known or not known:
        return f"model '{model}' at {address}: {reason}"
    hint = names.near(model, known) or f": --model NAME asks one of {', '.join(known[:_MOST_NAMES])}"
    if hint.startswith(":") and len(known) > _MOST_NAMES:
        hint += f" and {len(known) - _MOST_NAMES} more, which /v2/repository/index lists"
    return f"model '{model}' is not served at {address}{hint}"


def _http(
    address: str, path: str, headers: Mapping[str, str], body: bytes | None = None, patience_s: float = _PATIENCE_S
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*split(address), timeout=patience_s)
    try:
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except TimeoutError:
        raise RunError(f"{address} has not answered within {patience_s:g} s: is it a server's HTTP port?") from None
    except (http.client.HTTPException, OSError) as error:
        raise RunError(
            f"{address} does not answer in HTTP ({error or type(error).__name__}): is it the gRPC port? "
            "(--protocol grpc)"
        ) from None
    except (ValueError, UnicodeError) as error:  # of headers, and names of models
        raise RunError(f"{address}: {path} cannot be asked for: {error}") from None
    finally:
        connection.close()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _reach(address: str, what_to_do: str) -> None:
    try:
        socket.create_connection(split(address), _PATIENCE_S).close()
    except (OSError, UnicodeError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        raise RunError(f"nothing listens at {address} ({why}): {what_to_do}") from None


def _check_metrics(address: str, headers: Mapping[str, str]) -> None:
    what_to_do = "name a server's metrics page with --metrics HOST:PORT, or leave it out"
    _reach(address, what_to_do)
    status, body = _http(address, "/metrics", headers)
    if status in (401, 403):
        raise RunError(f"{address} refuses to tell its metrics (HTTP {status}): {KEY}")
    if status != 200 or b"nv_" not in body:
        raise RunError(f"{address} has no metrics at /metrics (HTTP {status}): {what_to_do}")
