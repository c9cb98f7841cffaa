"""Which models live in which pools."""

import pytest

from tutti.core.errors import ConfigError, NotFound
from tutti.ray_app import environment
from tutti.ray_app.options import Options, PoolOptions
from tutti.ray_app.placement import Home, PoolSpec, home, models_for, plan_pools
from tutti.repository import config
from tutti.repository.model_config import ModelConfig

TENSORS = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
DEFAULT = plan_pools(2, None, 1)
ONLY_CPU = plan_pools(0, None, 1)
ONLY_GPU = plan_pools(2, None, 0)


def model(name: str, extra: str = "", backend: str = "onnxruntime") -> ModelConfig:
    return config.parse(f'backend: "{backend}" {TENSORS} {extra}', name)


def ensemble(name: str, *models: str) -> ModelConfig:
    steps = "".join(
        f'step {{ model_name: "{one}" model_version: -1 input_map {{ key: "x" value: "T{index}" }} '
        f'output_map {{ key: "y" value: "T{index + 1}" }} }}'
        for index, one in enumerate(models)
    )
    text = f'platform: "ensemble" {TENSORS} ensemble_scheduling {{ {steps} }}'
    return config.parse(text.replace('"T0"', '"x"').replace(f'"T{len(models)}"', '"y"'), name)


CONFIGS = {
    one.name: one
    for one in (
        model("auto"),
        model("cpu", "instance_group { kind: KIND_CPU }"),
        model("gpu", "instance_group { kind: KIND_GPU }"),
        model("plan", backend="tensorrt"),
        model(
            "variant",
            "instance_group { kind: KIND_GPU } "
            'parameters { key: "tutti.cpu_model_filename" value { string_value: "model.int8.onnx" } }',
        ),
        ensemble("same", "auto", "gpu"),
        ensemble("both", "cpu", "auto"),
        ensemble("nested", "same", "auto"),
        ensemble("nested_cut", "both", "auto"),
        ensemble("missing", "auto", "nowhere"),
        ensemble("itself", "auto", "itself"),
    )
}


def config_of(name: str, version: str) -> ModelConfig:
    if name not in CONFIGS:
        raise NotFound(f"no model '{name}'")
    return CONFIGS[name]


def pools_of(name: str, pools: tuple[PoolSpec, ...]) -> tuple[str, ...]:
    return home(CONFIGS[name], pools, config_of).pools


@pytest.mark.parametrize(
    ("name", "pools", "lives_in"),
    [
        ("auto", DEFAULT, ("gpu", "cpu")),
        ("cpu", DEFAULT, ("cpu",)),
        ("gpu", DEFAULT, ("gpu",)),
        ("plan", DEFAULT, ("gpu",)),
        ("variant", DEFAULT, ("gpu", "cpu")),
        ("auto", ONLY_CPU, ("cpu",)),
        ("cpu", ONLY_GPU, ("gpu",)),
        ("same", DEFAULT, ("gpu",)),
        ("both", DEFAULT, ()),
        ("both", ONLY_CPU, ("cpu",)),
        ("nested", DEFAULT, ("gpu",)),
        ("nested_cut", DEFAULT, ()),
        ("missing", DEFAULT, ()),
        ("itself", DEFAULT, ("gpu", "cpu")),
    ],
)
def test_homes(name: str, pools: tuple[PoolSpec, ...], lives_in: tuple[str, ...]) -> None:
    assert pools_of(name, pools) == lives_in


def test_a_pool_that_names_a_model_has_it_whatever_its_instances() -> None:
    pools = (PoolSpec("a", 1, 1, 1, ("c*",)), PoolSpec("b", 1, 1, 0))
    assert pools_of("cpu", pools) == ("a", "b")
    assert pools_of("auto", pools) == ("b",)


def test_reasons_are_told() -> None:
    assert home(CONFIGS["cpu"], DEFAULT, config_of) == Home(("cpu",), "gpu is for GPUs, and its instances are KIND_CPU")
    assert home(CONFIGS["both"], DEFAULT, config_of).why == (
        "its models prefer different pools: 'cpu' in cpu, 'auto' in gpu"
    )
    with pytest.raises(ConfigError, match="model 'gpu': no pool takes it: cpu has no GPU, which it needs"):
        pools_of("gpu", ONLY_CPU)


def test_what_each_pool_loads() -> None:
    gpu, cpu = DEFAULT
    assert models_for(gpu, DEFAULT, CONFIGS) == ["auto", "gpu", "plan", "variant", "same", "nested", "itself"]
    assert models_for(cpu, DEFAULT, CONFIGS) == ["auto", "cpu", "variant", "itself"]


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ([], "expected at least one"),
        ([{"name": "A b"}], "pool 'A b': expected a name"),
        ([{"name": "a"}, {"name": "a"}], "pool 'a' is there twice"),
        ([{"name": "a", "replicas": 0}], "pool 'a': expected 1 or more replicas"),
        ([{"name": "a", "models": []}], "pool 'a': models"),
        ([{"name": "a", "replicas": 5, "num_gpus": 0.5}], "their replicas need 2.5 GPUs, the cluster has 2"),
    ],
)
def test_pools_that_cannot_be_are_refused(pools: list[dict[str, object]], says: str) -> None:
    options = Options(model_repository="m", pools=[PoolOptions(**one) for one in pools])
    with pytest.raises(ConfigError, match=says):
        options.pool_specs(2)


@pytest.mark.parametrize(
    ("addresses", "mode", "is_refused"),
    [
        (["10.0.0.1"], None, False),
        (["10.0.0.1", "10.0.0.1"], None, False),
        (["10.0.0.1", "10.0.0.2"], "token", False),
        (["10.0.0.1", "10.0.0.2"], "disabled", True),
        (["10.0.0.1", "10.0.0.2"], None, True),
    ],
)
def test_a_cluster_of_several_machines_needs_authentication(
    addresses: list[str], mode: str | None, is_refused: bool
) -> None:
    if not is_refused:
        environment.require_authentication(addresses, mode)
        return
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        environment.require_authentication(addresses, mode)


def test_fractions_of_gpus() -> None:
    options = Options(model_repository="m", pools=[PoolOptions(name="shared", replicas=4, num_gpus=0.5)])
    (pool,) = options.pool_specs(2)
    assert pool.has_gpu
    assert pools_of("gpu", (pool,)) == ("shared",)
