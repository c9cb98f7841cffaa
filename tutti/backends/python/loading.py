"""Loads python models, and lets them complete their configurations: in processes of their own, or in the server's."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tutti.backends import device_options, model_files, placement
from tutti.backends.python import execution_env, isolated, model_imports
from tutti.backends.python.instances import check_options, device_of, instance_name, takes_inputs_on_host, turn_taker
from tutti.backends.python.model import PythonBackend
from tutti.backends.python.pb_utils import server
from tutti.backends.python.pb_utils.completion import ModelConfig as CompletedConfig
from tutti.backends.python.pb_utils.errors import told
from tutti.core.daemon_threads import Pool
from tutti.core.errors import ConfigError
from tutti.core.types import Infer, control_of
from tutti.devices import device_turns
from tutti.devices.nvml import gpu_count
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import InstanceGroup, ModelConfig
from tutti.scheduling.interface import Backend

# Instances of one model that start at once.
_MOST_STARTING = 8


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """One TritonPythonModel per instance, each in its process or all in this one. They may send requests to `infer`."""
    path = model_files.model_file(folder, version, "model.py")
    takes_inputs_on_host(folder.config)
    placed = placement.instances(folder.config)
    is_isolated = _is_isolated(folder.config, [group for group, _ in placed])
    check_options(folder.config, is_isolated)
    if is_isolated:
        return _load_isolated(folder, version, placed, infer)
    return _load_here(folder, version, placed, infer, path)


def _is_isolated(config: ModelConfig, groups: Sequence[InstanceGroup]) -> bool:
    """Whether instances are processes: unless they share a device, and maybe tensors on it, with the server.

    Raises ConfigError.
    """
    choice = isolated.choice(config)
    if choice == "no" and config.parameters.get(execution_env.PARAMETER):
        reason = f"'no' does not go with parameters.{execution_env.PARAMETER}, which needs a process"
        raise ConfigError(f"model '{config.name}': parameters.{isolated.PARAMETER}: {reason}")
    if choice or config.parameters.get(execution_env.PARAMETER):
        return choice != "no"
    has_gpus = gpu_count() > 0
    is_on_gpu = any(group.kind == "gpu" for group in config.instance_groups) or not takes_inputs_on_host(config)
    is_on_gpu = is_on_gpu or bool(device_options.says_turns(config))
    return not (has_gpus and is_on_gpu and any(group.kind == "gpu" for group in groups))


def _load_isolated(
    folder: ModelFolder, version: int, placed: Sequence[tuple[InstanceGroup, int]], infer: Infer
) -> list[Backend]:
    """Side by side, as Triton does."""

    def start(index: int, group: InstanceGroup, device: int) -> Backend:
        return isolated.IsolatedBackend(
            folder, version, instance_name(folder.config, index), group, device, device_of(group, device), infer
        )

    threads = Pool(_MOST_STARTING, f"{folder.config.name} starts")
    starting = [threads.submit(start, index, *where) for index, where in enumerate(placed)]
    failures = [failure for each in starting if (failure := each.exception()) is not None]
    if failures:
        for each in starting:
            if each.exception() is None:
                each.result().close()
        raise failures[0]
    return [each.result() for each in starting]


def _load_here(
    folder: ModelFolder, version: int, placed: Sequence[tuple[InstanceGroup, int]], infer: Infer, path: Path
) -> list[Backend]:
    server.serve_with(infer, controlling=control_of(infer))
    device_turns.know(str(path.parent))
    loaded: list[Backend] = []
    module: ModuleType | None = None
    try:
        module = model_imports.import_beside(path, f"tutti_model_{folder.config.name}_{version}")
        for index, (group, device) in enumerate(placed):
            model = module.TritonPythonModel()
            taker = turn_taker(folder.config, group, device, path)
            loaded.append(
                PythonBackend(folder, version, model, instance_name(folder.config, index), group, device, taker, module)
            )
    except BaseException as error:  # a model may do whatever it likes, as ending its process: it is only not served
        for backend in loaded:
            backend.close()
        if module is not None:
            model_imports.forget(module)
        reason = f"{path.name} failed to load: {told(error)}"
        raise ConfigError(f"model '{folder.config.name}': {reason}") from error
    return loaded


def load_one(folder: ModelFolder, version: int, name: str, group: InstanceGroup, device: int) -> PythonBackend:
    """One instance, in a process that has no others. Raises ConfigError."""
    filename = folder.config.model_filename or "model.py"
    try:
        module = model_imports.import_alone(folder.path, version, filename)
        return PythonBackend(folder, version, module.TritonPythonModel(), name, group, device)
    except BaseException as error:
        raise ConfigError(f"{filename} failed to load: {told(error)}") from error


def complete(proto: Any, path: Path) -> None:
    """Let model.py complete the configuration, where it has `auto_complete_config`. Raises ConfigError."""
    parameters = proto.parameters
    is_here = isolated.PARAMETER in parameters and parameters[isolated.PARAMETER].string_value == "no"
    try:
        if is_here:
            module = model_imports.import_beside(path, f"tutti_model_{proto.name}_config")
            model_imports.forget(module)
            _complete_with(module, proto)
        else:
            isolated.complete(proto, path)
    except BaseException as error:
        reason = str(error) if isinstance(error, ConfigError) else told(error)
        raise ConfigError(
            f"model '{proto.name}': {path.name} could not complete its configuration: {reason}"
        ) from error


def complete_alone(proto: Any, path: Path) -> None:
    """The same in a process that has no other model. Raises whatever model.py raises."""
    _complete_with(model_imports.import_alone(path.parents[1], int(path.parent.name), path.name), proto)


def _complete_with(module: ModuleType, proto: Any) -> None:
    if not hasattr(module.TritonPythonModel, "auto_complete_config"):
        return
    completed = module.TritonPythonModel.auto_complete_config(CompletedConfig(proto))
    if not isinstance(completed, CompletedConfig):
        raise TypeError(f"auto_complete_config returned a {type(completed).__name__}, no ModelConfig")
