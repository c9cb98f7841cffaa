"""Name -> Infer: loads a repository's models, routes calls to them, and answers questions about them.

How a model is executed is the composition root's choice: it passes the loader. Knows nothing of protocols, Ray or
what an ensemble is.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tutti.backends import completion
from tutti.core.errors import ConfigError, Internal, InvalidArgument, NotFound, TuttiError, Unavailable, reason
from tutti.core.operations import LOADS_AT_ONCE, Operations, Work, side_by_side
from tutti.core.temporary_folders import Folder
from tutti.core.types import Call, ModelControl, settle_all
from tutti.devices.health import DeviceHealth, health
from tutti.observing.statistics import ModelStatistics
from tutti.repository import folders as repository
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig
from tutti.serving.control_by_models import ControlByModels
from tutti.serving.interface import IndexEntry, Loader, Override, Propagate
from tutti.serving.loading_order import in_order_of_use
from tutti.serving.model import Model, end
from tutti.serving.retries import Retries

_log = logging.getLogger(__name__)

# Whoever asks for a load, or an unload, is answered after this; slow loads go on.
CONTROL_TIMEOUT_S = 120.0
# How long what is inside a model may take before whoever waits for its end is told so.
DRAIN_S = 30.0
_POLL_DRAIN_S = 5.0
# A look at the repository that takes longer does not have others begin beside it.
_LOOK_S = 1.0
LOADING, UNLOADING = "loading", "unloading"

Ending = tuple[Model, Work[None]]
"""A model that is served no longer, and its end, which is under way."""


class Engine:
    """The models of one repository. Thread-safe; `load_all` first."""

    def __init__(
        self,
        root: Path,
        loader: Loader,
        is_controllable: bool = False,
        propagate: Propagate = lambda *_: None,
        devices: DeviceHealth = health,
        control_timeout_s: float = CONTROL_TIMEOUT_S,
        no_control_by_models: str = "",
    ) -> None:
        """`is_controllable` allows load and unload while serving; each ends after `control_timeout_s`.

        Models may ask for them, too, unless `no_control_by_models` says why not.
        """
        self.control: ModelControl = ControlByModels(self, no_control_by_models)
        self._devices = devices
        self._root = root
        self._propagate = propagate
        self._scratch: dict[str, Folder] = {}
        self._seen: dict[str, object] = {}
        self._is_controllable = is_controllable
        self._is_closed = False
        self._operations = Operations(control_timeout_s)
        self.control_timeout_s = control_timeout_s
        self.loads_at_once = LOADS_AT_ONCE
        # Whether a model that is not available makes all of it not ready.
        self.is_strict = True
        # What replicas are told, they are told in one order.
        self._telling = threading.Lock()
        # Models that are served no longer, and what ends them.
        self._drains: dict[Model, Work[None]] = {}
        self._tries: dict[str, Retries] = {}
        self._unloaded: dict[str, tuple[str, ...]] = {}
        self._loader = loader
        self._models: dict[str, dict[str, Model]] = {}
        self._newest: dict[str, Model] = {}
        # Why versions could not be loaded; "" stands for a model that has none.
        self._failures: dict[tuple[str, str], str] = {}
        # The models of the start, and whether their loading has ended.
        self._starting: dict[str, threading.Event] = {}
        # Models that a poll is still at work on, however long ago it began.
        self._polled: set[str] = set()
        # The last look at the repository: while it lasts, others wait for it, too.
        self._look: Work[list[str]] | None = None
        self._lock = threading.Lock()
        self._changes = 0

    def changes(self) -> int:
        """How often a model has come, gone or been loaded anew."""
        return self._changes

    def load_all(self, names: Iterable[str] | None = None, timeout_s: float | None = None) -> None:
        """Load the named models (all, by default): plain ones side by side, then ensembles after what they use.

        An ensemble brings its models with it. A model that cannot be loaded is logged and shown by the index; the
        others are served. So is one that has not been loaded after `timeout_s`, though its loading goes on.
        """
        folders, failures = completion.open_models(self._root, names)
        for name, error in failures.items():
            self._record_failure(name, "", error)
        ensembles = [folder for folder in folders if folder.config.is_ensemble]
        ended = {folder.config.name: threading.Event() for folder in folders}
        self._starting = {**self._starting, **ended}
        before = dict(self._models)

        def load(folder: ModelFolder) -> None:
            name = folder.config.name
            try:
                for step in folder.config.steps:
                    if step.model_name in ended and step.model_name not in later[name]:
                        ended[step.model_name].wait()
                self._operations.run_to_end(name, LOADING, partial(self._load, folder, before.get(name)))
            finally:
                ended[name].set()

        ordered = [*(folder for folder in folders if not folder.config.is_ensemble), *in_order_of_use(ensembles)]
        ranks = [folder.config.name for folder in ordered]
        later = {name: ranks[index:] for index, name in enumerate(ranks)}  # of a cycle: not waited for
        works = [(f"model '{folder.config.name}' has been loading", partial(load, folder)) for folder in ordered]
        for unfinished in side_by_side(works, self.loads_at_once, timeout_s):
            _log.error("%s; the others are served meanwhile", unfinished)

    def load(self, name: str, override: Override | None = None, drain_s: float = DRAIN_S) -> None:
        """Load a model anew from its folder, in place of what is served under its name. Blocks.

        An ensemble's models are loaded with it, where they are not yet. Requests go to the old versions until the new
        ones are ready, and those inside the old ones end there, for which `drain_s` is waited. Raises Unavailable where
        load is not allowed, and Internal, the old versions still served, with the reason.
        """
        self._check_controllable()
        closing = self._operations.run(name, LOADING, lambda: self._load_anew(name, override or Override(), ()))
        self._await(closing, drain_s)

    def unload(self, name: str, with_dependents: bool = False, drain_s: float = DRAIN_S) -> None:
        """Serve a model no longer: new requests are refused, those inside end. Blocks until they have, or `drain_s`.

        `with_dependents` unloads an ensemble's models too, but those that another ensemble uses. A model that is not
        loaded is no error. Raises Unavailable where unload is not allowed.
        """
        self._check_controllable()
        closing = self._unload_alone(name)
        if with_dependents:
            for step in [step for model, _ in closing for step in model.config.steps]:
                used = {other.model_name for model in self.models() for other in model.config.steps}
                if step.model_name not in used:
                    closing += self._unload_alone(step.model_name)
        waiting = self._await(closing, drain_s)
        if waiting and drain_s:
            raise Unavailable(f"model '{name}' is served no longer, but not all has ended: {'; '.join(waiting)}")

    def follow(self, name: str, override: Override | None) -> None:
        """Load (unload, with None) what another process has been asked to, and told all others of: tell nobody.

        Blocks. Raises Internal as `load` does.
        """
        self._seen[name] = repository.fingerprint(self._root, name)
        if override is None:
            closing = self._unload_alone(name, tells=False)
        else:
            closing = self._operations.run(name, LOADING, lambda: self._load_anew(name, override, (), tells=False))
        self._await(closing, DRAIN_S)

    def poll(self) -> None:
        """Load what is new or has changed in the repository, unload what has gone. Blocks. Failures are logged.

        Each folder stands for itself: what fails, or changes meanwhile, is tried again by a later poll, and what hangs
        is left behind.
        """
        present = set(self._names_there())
        busy = {*self._operations.running(), *list(self._polled)}
        due = sorted({*present, *list(self._seen)} - busy)
        works = [
            (f"the poll of model '{name}' has been at work", partial(self._poll_model, name, name in present))
            for name in due
        ]
        self._polled.update(due)
        try:
            unfinished = side_by_side(works, self.loads_at_once, self.control_timeout_s)
        except BaseException:  # none has begun
            self._polled.difference_update(due)
            raise
        for work in unfinished:
            _log.error("%s, and is not waited for", work)

    def _poll_model(self, name: str, is_there: bool) -> None:
        try:
            self._compare(name, is_there)
        finally:
            self._polled.discard(name)

    def _compare(self, name: str, is_there: bool) -> None:
        """Follow what has changed in a model's folder since it was seen."""
        seen = repository.fingerprint(self._root, name) if is_there else None
        if seen == self._seen.get(name) and not self._is_due(name):
            return
        try:
            self._await(self._follow_folder(name, is_there), _POLL_DRAIN_S)
        except Exception as error:
            _log.error("%s", error)
            self._tries.setdefault(name, Retries()).failed()
            if name not in self._models and is_there:
                self._failures[name, ""] = reason(error)
        else:
            self._tries.pop(name, None)
        if is_there:
            self._seen[name] = seen
            if repository.fingerprint(self._root, name) != seen:  # it was not whole yet
                self._tries.setdefault(name, Retries()).wait = 0
        elif name not in self._tries:
            self._seen.pop(name, None)

    def _follow_folder(self, name: str, is_there: bool) -> list[Ending]:
        if is_there:
            return self._operations.run(name, LOADING, lambda: self._load_anew(name, Override(), ()))
        closing = self._unload_alone(name)
        self._unloaded.pop(name, None)
        self._forget_failures(name)
        if closing:
            _log.info("model '%s' has left the repository", name)
        return closing

    def _is_due(self, name: str) -> bool:
        """Whether a model that could not be loaded is to be tried again, though its folder has not changed."""
        if name in self._tries:
            return self._tries[name].is_due()
        return any(failed == name for failed, _ in dict(self._failures))

    def remember(self) -> None:
        """Take what is loaded now as what poll compares with."""
        self._seen = {name: repository.fingerprint(self._root, name) for name in repository.model_names(self._root)}

    def _load_anew(self, name: str, override: Override, above: tuple[str, ...], tells: bool = True) -> list[Ending]:
        """Load one model, and what it needs; returns what ends therefore."""
        closing: list[Ending] = []
        models: dict[str, Model] = {}
        scratch: Folder | None = None
        stage = "failed to poll from model repository"  # Triton's words, as those of the next one
        try:
            root = self._root
            if override.files:
                if override.config is None:
                    raise ConfigError(f"model '{name}': files are given without the parameter 'config'")
                scratch = Folder()
                root = scratch.path
                repository.write_files(root, name, override.files)
            folder = completion.open_model(root, name, override.config)
            stage = f"load failed for model '{name}'"
            for step in folder.config.steps:
                if step.model_name not in self._models and step.model_name not in (*above, name):
                    closing += self._load_step(step.model_name, (*above, name), tells)
            if tells:
                self._tell(name, override, folder.config)
            for version in folder.versions:
                models[str(version)] = self._make(folder, version)
        except BaseException as error:
            for model in models.values():
                end(model)
            if scratch is not None:
                scratch.cleanup()
            if not isinstance(error, TuttiError):
                _log.debug("model '%s' cannot be loaded", name, exc_info=True)
            raise Internal(f"failed to load '{name}', {stage}: {reason(error)}") from None
        closing += self._end_all(self._replace(name, models).values())
        self._keep_scratch(name, scratch)
        self._forget_failures(name)
        return closing

    def _load_step(self, name: str, above: tuple[str, ...], tells: bool) -> list[Ending]:
        """Load a model for an ensemble that needs it, unless another has just done so."""

        def load() -> list[Ending]:
            return [] if name in self._models else self._load_anew(name, Override(), above, tells)

        return self._operations.run(name, LOADING, load)

    def _tell(self, name: str, override: Override | None, config: ModelConfig | None) -> None:
        if not self._telling.acquire(timeout=self.control_timeout_s):
            raise Unavailable(f"model '{name}': the replicas are still being told of another change")
        try:
            self._propagate(name, override, config)
        finally:
            self._telling.release()

    def _end_all(self, models: Iterable[Model]) -> list[Ending]:
        """Have models end: at once, since whoever had them replaced may not wait for that any more."""
        endings = []
        with self._lock:
            for model in models:
                subject = f"model '{model.config.name}' version {model.version} has been draining"
                work = self._drains.get(model) or Work(subject, partial(end, model))
                self._drains[model] = work
                endings.append((model, work))
        return endings

    def _await(self, endings: Iterable[Ending], timeout_s: float) -> list[str]:
        """Wait for ends, though not for ever; returns what has not ended."""
        until_s = time.monotonic() + timeout_s
        waiting = []
        for model, work in endings:
            if not work.wait(max(0.0, until_s - time.monotonic())) and timeout_s:
                waiting.append("; ".join([str(work), *model.executing()]))
        for model, work in list(self._drains.items()):
            if work.wait(0):
                self._drains.pop(model, None)
        for ending in waiting:
            _log.warning("%s", ending)
        return waiting

    def _unload_alone(self, name: str, tells: bool = True) -> list[Ending]:
        return self._operations.run(name, UNLOADING, lambda: self._unload(name, tells) if name in self._models else [])

    def _unload(self, name: str, tells: bool = True) -> list[Ending]:
        if tells:
            self._tell(name, None, None)
        old = self._replace(name, {})
        self._unloaded[name] = tuple(old)
        self._keep_scratch(name, None)
        return self._end_all(old.values())

    def _keep_scratch(self, name: str, scratch: Folder | None) -> None:
        old = self._scratch.pop(name, None)
        if old is not None:
            old.cleanup()  # what was read from it is in memory
        if scratch is not None:
            self._scratch[name] = scratch

    def __call__(self, calls: Sequence[Call]) -> None:
        first = calls[0].request
        if len(calls) == 1 and not first.model_version:
            newest = self._newest.get(first.model_name)
            if newest is not None and newest.take(calls):
                return
        if len(calls) == 1 or all(
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
        """A served model; version "" is the newest. Raises NotFound, or InvalidArgument for what is no version."""
        model = self._newest.get(name) if not version else self._models.get(name, {}).get(version)
        if model is not None:
            return model
        if version and not (version.isdecimal() and version.isascii() and 0 < len(version) < 20 and int(version)):
            raise InvalidArgument(
                f"failed to get model version from specified version string {version[:50]!r}: model '{name}': version "
                "should be an integral value > 0"
            )
        plain = str(int(version)) if version else ""
        if plain != version:
            return self.model(name, plain)
        unknown = f"Request for unknown model: '{name}'"  # Triton's words, which its clients look for
        if name in self._models:
            raise NotFound(f"{unknown} version {version} is not found")
        if name in self._unloaded or self._is_late(name) or any(failed == name for failed, _ in dict(self._failures)):
            raise NotFound(f"{unknown} has no available versions: it is not ready")
        raise NotFound(f"{unknown} is not found")

    def models(self) -> list[Model]:
        """Every served version, by name and version."""
        served = dict(self._models)  # a load may change it meanwhile
        return [served[name][version] for name in sorted(served) for version in sorted(served[name], key=int)]

    def versions(self, name: str) -> list[str]:
        return sorted(self._models.get(name, {}), key=int)

    def is_known(self, name: str) -> bool:
        """Whether the index has the name."""
        is_tried = name in self._models or name in self._unloaded or any(name == key for key, _ in dict(self._failures))
        return is_tried or self._is_late(name) or repository.is_model(self._root, name)

    def index(self) -> list[IndexEntry]:
        """Every version known, whether it is loaded or not, and why not; and models that were never asked for."""
        entries = [
            IndexEntry(
                m.config.name,
                str(m.version),
                "READY" if m.is_ready() and not m.is_stuck() else "UNAVAILABLE",
                m.reason() or "; ".join(m.executing(only_stuck=True)),
            )
            for m in self.models()
        ]
        failures = dict(self._failures).items()
        entries += [IndexEntry(name, version, "UNAVAILABLE", why) for (name, version), why in failures]
        ending = {
            (model.config.name, str(model.version)): "; ".join([str(work), *model.executing()])
            for model, work in dict(self._drains).items()
            if not work.wait(0)
        }
        entries += [
            IndexEntry(name, version, "UNLOADING", ending[name, version])
            if (name, version) in ending
            else IndexEntry(name, version, "UNAVAILABLE", "unloaded")
            for name, versions in dict(self._unloaded).items()
            for version in versions
        ]
        served = {entry.name for entry in entries}
        loading = {name: f"model '{name}' waits to be loaded" for name in self._late()} | self._operations.running()
        entries += [IndexEntry(name, "", "LOADING", why) for name, why in loading.items() if name not in served]
        known = {entry.name for entry in entries}
        entries += [IndexEntry(name, "", "") for name in self._names_there() if name not in known]
        return sorted(entries, key=lambda entry: (entry.name, entry.version))

    def _names_there(self) -> list[str]:
        """The models in the repository. Raises Unavailable where it cannot be looked at in time, as a lost disk."""
        with self._lock:
            look = self._look
            if look is None or look.wait(0) or time.monotonic() - look.since_s < _LOOK_S:
                subject = f"the model repository '{self._root}' has been looked at"
                look = self._look = Work(subject, partial(repository.model_names, self._root))
        if not look.wait(self.control_timeout_s):
            raise Unavailable(f"{look}, and that goes on")
        return look.result()

    def is_ready(self) -> bool:
        """Whether all that was asked for is loaded and ready, which may be nothing, and no device has failed.

        Where it is not strict, the devices alone count.
        """
        if not self.is_strict:
            return not self._devices.failures()
        if self._failures or self._late() or self._devices.failures():
            return False
        return all(model.is_ready() for model in self.models())

    def started(self) -> tuple[int, int]:
        """Of how many models the loading at the start has ended, and how many it loads; (0, 0) until that is known."""
        loads = self._starting.values()
        return sum(ended.is_set() for ended in loads), len(loads)

    def failures(self) -> list[str]:
        """Why models could not be loaded, one message each."""
        return [*self._failures.values(), *(f"model '{name}' is still being loaded" for name in self._late())]

    def _late(self) -> list[str]:
        """Models of the start whose loading has not ended."""
        return [name for name in self._starting if self._is_late(name)]

    def _is_late(self, name: str) -> bool:
        ended = self._starting.get(name)
        return ended is not None and not ended.is_set()

    def unfinished(self) -> list[str]:
        """What is still being done to models, and those that have not ended."""
        drains = [str(work) for work in dict(self._drains).values() if not work.wait(0)]
        return [*self._operations.running().values(), *drains]

    def close(self) -> None:
        """Drain and close every model, ensembles before what they use. What comes later is refused."""
        with self._lock:
            self._is_closed = True
            models = self.models()
        for is_ensemble in (True, False):
            self._await(self._end_all(m for m in models if m.config.is_ensemble is is_ensemble), DRAIN_S)
        for name in list(self._scratch):
            self._keep_scratch(name, None)

    def _route(self, name: str, version: str, calls: Sequence[Call]) -> None:
        while True:  # a model that closes just now has a successor, or is gone
            try:
                model = self.model(name, version)
            except (NotFound, InvalidArgument) as error:
                settle_all(calls, error)
                return
            if model.take(calls):
                return
            if self._is_closed:
                settle_all(calls, Unavailable(f"model '{name}' is being unloaded: the server stops"))
                return

    def _check_controllable(self) -> None:
        if not self._is_controllable:
            raise Unavailable(
                "explicit model load / unload is not allowed if polling is enabled, nor without "
                "--model-control-mode explicit"
            )

    def _load(self, folder: ModelFolder, before: Mapping[str, Model] | None) -> None:
        """Load what can be loaded of a folder; record why the rest cannot. Others may have loaded it meanwhile."""
        if self._models.get(folder.config.name) is not before:
            return
        models = {}
        for version in folder.versions:
            try:
                models[str(version)] = self._make(folder, version)
            except TuttiError as error:
                self._record_failure(folder.config.name, str(version), error)
        if models:
            self._end_all(self._replace(folder.config.name, models).values())

    def _make(self, folder: ModelFolder, version: int) -> Model:
        statistics = ModelStatistics()
        start = time.monotonic()
        try:
            labels = folder.labels()
            served = self._loader(folder, version, statistics)
        except TuttiError:
            raise
        except BaseException as error:  # of a library, that has read a file which is not whole, or has had enough
            _log.debug("model '%s' version %d cannot be loaded", folder.config.name, version, exc_info=True)
            problem = f"{type(error).__name__}: {reason(error)}"
            raise ConfigError(f"model '{folder.config.name}' version {version}: {problem}") from error
        load_s = time.monotonic() - start
        _log.info("loaded model '%s' version %d in %.2f s", folder.config.name, version, load_s)
        return Model(folder.config, version, labels, served, statistics, load_s)

    def _replace(self, name: str, models: dict[str, Model]) -> dict[str, Model]:
        """Serve `made` under the name from now on; returns what is to end: what was served before.

        Once the engine is closed, `made` itself is.
        """
        with self._lock:
            if models and self._is_closed:
                return models
            old = self._models.get(name, {})
            if models:  # at no moment is the name without a model
                self._models[name] = models
                self._newest[name] = models[max(models, key=int)]
                self._unloaded.pop(name, None)
            else:
                del self._models[name], self._newest[name]
            self._changes += 1
        return old

    def _forget_failures(self, name: str) -> None:
        """Each by itself: what others record meanwhile stays."""
        for key in list(self._failures):
            if key[0] == name:
                self._failures.pop(key, None)

    def _record_failure(self, name: str, version: str, error: TuttiError) -> None:
        _log.error("failed to load model '%s' version '%s': %s", name, version, error)
        self._failures[name, version] = str(error)
