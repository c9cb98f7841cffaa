"""Ensembles: graphs of models, checked at load and executed as batches."""

from collections.abc import Callable

from ensembles.executor import EnsembleExecutor
from ensembles.graph import plan
from ensembles.streams import StreamExecutor
from tutti.config import ModelConfig, as_decoupled
from tutti.model import Model
from tutti.repository import ModelFolder
from tutti.statistics import ModelStatistics
from tutti.types import Infer


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
    checked = plan(folder.config, lambda name, wanted: model_of(name, wanted).config)
    if checked.is_decoupled:
        return as_decoupled(folder.config), StreamExecutor(checked, str(version), infer, statistics)
    return folder.config, EnsembleExecutor(checked, str(version), infer, statistics)
