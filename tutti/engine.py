"""Name -> Infer: loads a repository's models, routes calls to them, and answers questions about them.

How a model is executed is the composition root's choice: it passes the loader. Knows nothing of protocols, Ray or
what an ensemble is.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti import repository
from tutti.errors import ConfigError, InvalidArgument, NotFound, TuttiError
from tutti.model import Model, Served
from tutti.repository import ModelFolder
from tutti.statistics import ModelStatistics
from tutti.types import Call, settle_all

_log = logging.getLogger(__name__)

Loader = Callable[[ModelFolder, int, ModelStatistics], Served]
"""Makes one version of a model executable. May block. Raises ConfigError with the reason if it cannot."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository index. `version` "" when no version could be told."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""


class Engine:
    """The models of one repository. Thread-safe; `load_all` first."""

    def __init__(self, root: Path, loader: Loader) -> None:
        self._root = root
        self._loader = loader
        self._models: dict[str, dict[str, Model]] = {}
        self._newest: dict[str, Model] = {}
        self._failures: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def load_all(self, names: Iterable[str] | None = None) -> None:
        """Load the named models (all, by default): plain ones side by side, then ensembles after what they use.

        A model that cannot be loaded is logged and shown by the index; the others are served.
        """
        folders = []
        for name in repository.model_names(self._root) if names is None else names:
            try:
                folders.append(repository.open_model(self._root, name))
            except ConfigError as error:
                self._record_failure(name, "", error)
        ensembles = [folder for folder in folders if folder.config.is_ensemble]
        with ThreadPoolExecutor(4, thread_name_prefix="load") as pool:
            list(pool.map(self._load, [folder for folder in folders if not folder.config.is_ensemble]))
        for folder in _in_order_of_use(ensembles):
            self._load(folder)

    def __call__(self, calls: Sequence[Call]) -> None:
        first = calls[0].request
        if all(
            c.request.model_name == first.model_name and c.request.model_version == first.model_version for c in calls
        ):
            self._route(first.model_name, first.model_version, calls)
            return
        groups: dict[tuple[str, str], list[Call]] = {}
        for call in calls:
            groups.setdefault((call.request.model_name, call.request.model_version), []).append(call)
        for (name, version), group in groups.items():
            self._route(name, version, group)

    def model(self, name: str, version: str = "") -> Model:
        """A served model; version "" is the newest. Raises NotFound, or InvalidArgument where it failed to load."""
        found = self._newest.get(name) if not version else self._models.get(name, {}).get(version)
        if found is not None:
            return found
        what = f"model '{name}'" + (f" version '{version}'" if version else "")
        if any(failed == name for failed, _ in self._failures):
            raise InvalidArgument(f"{what} is not ready")
        raise NotFound(f"unknown {what}: not found in the repository")

    def models(self) -> list[Model]:
        """Every served version, by name and version."""
        return [self._models[name][v] for name in sorted(self._models) for v in sorted(self._models[name], key=int)]

    def versions(self, name: str) -> list[str]:
        return sorted(self._models.get(name, {}), key=int)

    def index(self) -> list[IndexEntry]:
        """Every version known, whether it could be loaded or not, and why not."""
        entries = [
            IndexEntry(m.config.name, str(m.version), "READY" if m.is_ready() else "UNAVAILABLE") for m in self.models()
        ]
        entries += [IndexEntry(name, version, "UNAVAILABLE", why) for (name, version), why in self._failures.items()]
        return sorted(entries, key=lambda entry: (entry.name, entry.version))

    def is_ready(self) -> bool:
        """Whether every model of the repository is loaded and ready; false with none."""
        models = self.models()
        return bool(models) and not self._failures and all(model.is_ready() for model in models)

    def failures(self) -> list[str]:
        """Why models could not be loaded, one message each."""
        return list(self._failures.values())

    def close(self) -> None:
        """Drain and close every model, ensembles before what they use."""
        for model in sorted(self.models(), key=lambda model: not model.config.is_ensemble):
            model.close()

    def _route(self, name: str, version: str, calls: Sequence[Call]) -> None:
        try:
            model = self.model(name, version)
        except (NotFound, InvalidArgument) as error:
            settle_all(calls, error)
            return
        model(calls)

    def _load(self, folder: ModelFolder) -> None:
        name = folder.config.name
        for version in folder.versions:
            statistics = ModelStatistics()
            try:
                labels = folder.labels()
                served = self._loader(folder, version, statistics)
            except TuttiError as error:
                self._record_failure(name, str(version), error)
                continue
            model = Model(folder.config, version, labels, served, statistics)
            with self._lock:
                versions = self._models.setdefault(name, {})
                versions[str(version)] = model
                self._newest[name] = versions[max(versions, key=int)]
            _log.info("loaded model '%s' version %d", name, version)

    def _record_failure(self, name: str, version: str, error: TuttiError) -> None:
        _log.error("failed to load model '%s' version '%s': %s", name, version, error)
        self._failures[name, version] = str(error)


def _in_order_of_use(ensembles: list[ModelFolder]) -> list[ModelFolder]:
    """Ensembles after the ensembles they use; one that takes part in a cycle comes where it stands."""
    by_name = {folder.config.name: folder for folder in ensembles}
    ordered: dict[str, ModelFolder] = {}

    def visit(folder: ModelFolder, path: tuple[str, ...]) -> None:
        name = folder.config.name
        if name in ordered or name in path:
            return
        for step in folder.config.steps:
            if step.model_name in by_name:
                visit(by_name[step.model_name], (*path, name))
        ordered[name] = folder

    for folder in ensembles:
        visit(folder, ())
    return list(ordered.values())
