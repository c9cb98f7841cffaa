"""Ensembles: graphs of models, checked at load and executed as batches."""

from collections.abc import Callable

from tutti.core.types import Infer
from tutti.ensembles.folder_plans import planned
from tutti.ensembles.graph import with_staying
from tutti.ensembles.placed import executor_of
from tutti.observing.statistics import ModelStatistics
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig, as_decoupled
from tutti.serving.model import Model


def load(
    folder: ModelFolder,
    version: int,
    statistics: ModelStatistics,
    model_of: Callable[[str, str], Model],
    infer: Infer,
) -> tuple[ModelConfig, Infer]:
    """What executes an ensemble: its steps' calls go to `infer`. Raises ConfigError for a graph that cannot run.

    The configuration that comes with it says whether the graph is decoupled.
    """
    checked = planned(folder, lambda name, wanted: model_of(name, wanted).config)
    checked = with_staying(checked, lambda step: model_of(step.model_name, step.version).device)
    config = as_decoupled(folder.config) if checked.is_decoupled else folder.config
    return config, executor_of(checked, str(version), infer, statistics)
