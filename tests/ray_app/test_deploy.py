"""What is deployed elsewhere: manifests against Kubernetes' schemas, what they run against what there is."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.ray_app.conftest import Application
from tests.ray_app.test_cluster import metrics
from tests.tutti.test_metrics_page import ENSEMBLE
from tutti.ray_app import environment
from tutti.ray_app.options import Options

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "ray_app" / "deploy"
VERSIONS = ("1.28", "1.34", "1.37")
MANIFESTS = ("service", "disruption", "network", "redis")
# The fields of a RayService that KubeRay 1.5 takes, but for those of Kubernetes' own kinds in it.
RAYSERVICE = json.loads((Path(__file__).parent / "rayservice.schema.json").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()) if one]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    (found,) = documents("rayservice")
    return found


def groups(service: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each group's name and pod template."""
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str, version: str) -> None:
    found = documents(name)
    assert found
    for one in found:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_pods_of_each_group(service: dict[str, Any], version: str) -> None:
    for name, template in groups(service):
        metadata = {**template["metadata"], "name": name}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_what_is_misspelt_is_seen(service: dict[str, Any]) -> None:
    """The two tests above can fail."""
    (_, template), *_ = groups(service)
    broken = json.loads(json.dumps(template["spec"]))
    broken["containers"][0]["resorces"] = broken["containers"][0].pop("resources")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": broken}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)
    jsonschema.validate(service, RAYSERVICE)
    service = json.loads(json.dumps(service))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(service, RAYSERVICE)


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD: the file of KubeRay's RayService CRD")
def test_kuberays_own_schema(service: dict[str, Any]) -> None:
    crd = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1"]
    jsonschema.validate(service, schema)


def test_the_application_of_the_manifest_is_one(service: dict[str, Any]) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config["proxy_location"] == "Disabled"
    (application,) = config["applications"]
    assert application["import_path"] == "tutti.ray_app.app:build"
    options = Options(**application["args"])
    pools = options.pool_specs(0)
    assert [pool.name for pool in pools] == ["gpu", "cpu"]
    by_group = dict(groups(service))
    for pool in pools:  # a replica fits on a pod of its group
        limits = by_group[pool.name]["spec"]["containers"][0]["resources"]["limits"]
        assert pool.num_cpus <= float(limits["cpu"])
        assert pool.num_gpus <= float(limits.get("nvidia.com/gpu", 0))
    gateways = next(
        group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "gateway"
    )
    has = json.loads(json.loads(f'"{gateways["rayStartParams"]["resources"][1:-1]}"'))
    assert set(options.gateway_resources) <= set(has)
    assert options.gateways == gateways["replicas"] == gateways["minReplicas"]
    ports = {port["name"]: port["containerPort"] for port in by_group["gateway"]["spec"]["containers"][0]["ports"]}
    assert ports == {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    assert by_group["gateway"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"


def test_services_and_budgets_select_pods_that_there_are(service: dict[str, Any]) -> None:
    labels = [template["metadata"]["labels"] for _, template in groups(service)]
    labels += [redis()["spec"]["template"]["metadata"]["labels"]]
    for one in [doc for name in MANIFESTS for doc in documents(name)]:
        spec = one["spec"]
        selector = spec.get("podSelector", spec.get("selector", {}))
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= own.items() for own in labels), one["metadata"]["name"]


def redis() -> dict[str, Any]:
    (found,) = [one for one in documents("redis") if one["kind"] == "StatefulSet"]
    return found


def test_the_head_finds_its_redis_and_nobody_else_does(service: dict[str, Any]) -> None:
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    (address,) = [one for one in documents("redis") if one["kind"] == "Service"]
    (container,) = redis()["spec"]["template"]["spec"]["containers"]
    (port,) = address["spec"]["ports"]
    assert options["redisAddress"] == f"redis://{address['metadata']['name']}:{port['port']}"
    assert port["targetPort"] == container["ports"][0]["name"]
    assert redis()["spec"]["serviceName"] == address["metadata"]["name"]
    (password,) = container["env"]
    assert options["redisPassword"] == {"valueFrom": password["valueFrom"]}
    assert f"${password['name']}" in container["command"][-1]
    (policy,) = [one for one in documents("network") if one["metadata"]["name"] == "tutti-redis"]
    assert policy["spec"]["podSelector"]["matchLabels"] == redis()["spec"]["selector"]["matchLabels"]
    (rule,) = policy["spec"]["ingress"]
    (source,) = rule["from"]
    head = dict(groups(service))["head"]["metadata"]["labels"]
    assert source["podSelector"]["matchLabels"] == head, "and with it those of no other group"
    assert [one["port"] for one in rule["ports"]] == [container["ports"][0]["containerPort"]]


def test_all_manifests_are_applied_as_documented() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    for path in DEPLOY.glob("*.yaml"):
        assert f"-f ray_app/deploy/{path.name}" in text
    for secret in {"tutti-keys", "tutti-redis"}:
        assert f"kubectl create secret generic {secret} " in text


def test_serve_yaml_and_the_image_have_the_settings_that_serve_needs() -> None:
    image = (DEPLOY / "Dockerfile").read_text()
    for key, value in environment.SETTINGS.items():
        assert f"{key}={value}" in image
    (application,) = yaml.safe_load((ROOT / "ray_app" / "serve.yaml").read_text())["applications"]
    assert application["runtime_env"]["env_vars"] == environment.SETTINGS
    Options(**application["args"])


def test_the_image_copies_what_there_is_and_installs_it(tmp_path: Path) -> None:
    """The recipe's own steps, without its base images: the wheel has all that is imported, and its extras exist."""
    image = (DEPLOY / "Dockerfile").read_text()
    copied = [one for line in re.findall(r"^COPY (?!--)(.+)$", image, re.MULTILINE) for one in line.split()[:-1]]
    for one in copied:
        assert (ROOT / one).exists()
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = tomllib.loads(pyproject)["tool"]["setuptools"]
    assert "tutti" in table["packages"]
    assert set(table["package-dir"].values()) <= set(copied)
    for extras in re.findall(r"EXTRAS=([a-z,]+)", image):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
    flags = re.findall(r'"(--[a-z-]+)"', image.partition("ENTRYPOINT")[2])
    shown = subprocess.run([sys.executable, "-m", "tutti.app.cli", "serve", "--help"], capture_output=True, text=True)
    assert flags
    assert all(flag in shown.stdout for flag in flags)


@pytest.mark.parametrize(("given", "swaps"), [("ray,gpu,tracing", True), ("ray,tracing", False), ("gpu", True)])
def test_an_image_for_gpus_has_one_onnxruntime(given: str, swaps: bool) -> None:
    """No extra can remove the wheel for processors: the recipe does, with a pip that only says what it is asked."""
    image = (DEPLOY / "Dockerfile").read_text()
    (line,) = re.findall(r"^RUN (case .*?esac)$", image, re.MULTILINE | re.DOTALL)
    command = f"pip() {{ echo pip $*; }}; EXTRAS={given}; {line}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    asked = ["pip uninstall -y onnxruntime onnxruntime-gpu", "pip install --no-cache-dir onnxruntime-gpu"]
    assert done.stdout.splitlines() == (asked if swaps else [])


def named_metrics(expression: str) -> set[str]:
    return set(re.findall(r"\b((?:nv|tutti)_[a-z_]+)", expression))


def dashboard_metrics() -> set[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return set().union(*map(named_metrics, expressions))


def test_the_dashboard_shows_what_was_promised() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    titles = {panel["title"] for panel in board["panels"]}
    assert titles >= {
        "Requests a second", "Latency", "Queue against compute", "Batch size", "Replicas, wanted and ready",
        "Fallback share", "Deadline misses",
    }  # fmt: skip
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len(dashboard_metrics()) > 10


def test_the_dashboard_counts_an_ensembles_request_once() -> None:
    """Where models are summed up, the steps of the ensembles among them are not requests of anybody."""
    board = json.loads((DEPLOY / "grafana.json").read_text())
    by_title = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in board["panels"]}
    for title in ("Requests a second", "Failures a second", "Latency", "Queue against compute"):
        for expression in by_title[title]:
            assert "unless on (model) label_replace(max by (step) (tutti_ensemble_step{" in expression, title
    for title, expressions in by_title.items():
        sums = [
            one for one in expressions if re.search(r"sum ?(by \(le\) )?\(+rate\((nv_inference|tutti_request)", one)
        ]
        assert all("tutti_ensemble_step" in one for one in sums), title


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_every_metric_of_the_dashboard_is_served(application: Application) -> None:
    application.repository.add("whole", ENSEMBLE.format(step="kept"), {})
    application.load("whole")
    page = metrics(application.served)
    have = set(re.findall(r"^([a-z_]+)", page, re.MULTILINE))
    assert dashboard_metrics() <= have
