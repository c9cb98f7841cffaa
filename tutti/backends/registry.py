"""Loads a model by its backend: finds the record, checks files and parameters, and imports the module that does it.

What a model's configuration asks of every backend alike is put around its instances here. Knows no backend by name.
"""

from collections.abc import Callable, Sequence

from tutti.backends import importing, model_files, parameters
from tutti.backends.checked import Checked
from tutti.backends.importing import BackendModule
from tutti.backends.joined import JoinedModel
from tutti.backends.shaped import Padded, Reshaped
from tutti.backends.wrapped import Wrapped, around
from tutti.core.errors import ConfigError
from tutti.core.types import Infer
from tutti.repository import backend_records
from tutti.repository.backend_records import BUILT_IN, BackendRecord
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.interface import Backend, undone


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """The instances of one model version; `infer` answers what they ask of other models.

    Raises ConfigError when its backend is missing or refuses it.
    """
    config = folder.config
    record = backend_records.known(config.backend, config.name)
    model_files.check(folder, version, record)
    module = importing.module_of(record, config.name)
    parameters.check(config, record.parameters)
    if record.name in BUILT_IN:
        loaded = module.load(folder, version, infer)
    else:
        loaded = _loaded_by_another(module, record, folder, version, infer)
    with undone(loaded):
        for wraps in _wrappers(config):
            loaded = [around(wraps(config, backend), backend) for backend in loaded]
    return loaded


def _wrappers(config: ModelConfig) -> Sequence[Callable[[ModelConfig, Backend], Wrapped]]:
    """What is put around the instances of a model, the innermost first."""
    is_reshaped = any(spec.reshape is not None for spec in (*config.inputs, *config.outputs))
    return [*([Reshaped] if is_reshaped else []), *([Padded] if config.padding.inputs else [])]


def _loaded_by_another(
    module: BackendModule, record: BackendRecord, folder: ModelFolder, version: int, infer: Infer
) -> list[Backend]:
    """The instances that another distribution's module makes: what is wrong with them is told, and costs no other.

    Raises ConfigError.
    """
    name = folder.config.name
    subject = f"model '{name}': backend: '{record.name}' of {backend_records.distribution(record.name)}"
    try:
        loaded = module.load(folder, version, infer)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{subject} cannot load it: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, list) or not loaded:
        raise ConfigError(f"{subject}: expected a list of instances from load, got {loaded!r:.100}")
    with undone(loaded):
        # A backend that joins requests checks its outputs itself, before it parts them.
        return [
            backend if isinstance(backend, JoinedModel) else around(Checked(folder.config, backend), backend)
            for backend in loaded
        ]
