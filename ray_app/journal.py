"""The changes that gateways have made, in one order that all of them see: a log in the cluster's key-value store.

The entry of a number is whoever's writes it first; the others read it, and take the next one. What a gateway or a
replica has missed, or forgot when it was started anew, is in there.
"""

import pickle
import threading
from typing import Any, Protocol

from tutti.ray_app.control import Change, Desired
from tutti.serving.interface import Override


class Store(Protocol):
    """Key -> value, for all processes of the cluster."""

    def add(self, key: str, value: bytes) -> bool:
        """Write, unless the key is there; returns whether it was written."""

    def get(self, key: str) -> bytes | None: ...

    def replace(self, key: str, value: bytes) -> None: ...

    def clear(self, prefix: str) -> None: ...


class RayStore:
    """Ray's own: it lives as long as the cluster."""

    _NAMESPACE = "tutti"

    def __init__(self) -> None:
        from ray.experimental import internal_kv

        self._kv: Any = internal_kv

    def add(self, key: str, value: bytes) -> bool:
        was_there: bool = self._kv._internal_kv_put(key, value, overwrite=False, namespace=self._NAMESPACE)
        return not was_there

    def get(self, key: str | bytes) -> bytes | None:
        content: bytes | None = self._kv._internal_kv_get(key, namespace=self._NAMESPACE)
        return content

    def replace(self, key: str, value: bytes) -> None:
        self._kv._internal_kv_put(key, value, overwrite=True, namespace=self._NAMESPACE)

    def clear(self, prefix: str) -> None:
        self._kv._internal_kv_del(prefix, del_by_prefix=True, namespace=self._NAMESPACE)

    def under(self, prefix: str) -> list[bytes]:
        """The values of all keys that begin so."""
        keys = self._kv._internal_kv_list(prefix, namespace=self._NAMESPACE)
        return [value for key in keys if (value := self.get(key)) is not None]


class Journal:
    """One gateway's view of the log. Thread-safe; every method but `desired` asks the store, and blocks."""

    def __init__(self, store: Store, name: str) -> None:
        """`name` is the application's."""
        self.desired = Desired()
        self._store = store
        self.name = name
        self._lock = threading.Lock()
        self._foreign: list[Change] = []

    def record(self, model: str, override: Override | None = None, **more: Any) -> Change:
        """Add a change, after all that others have made. `more` are other fields of the change."""
        with self._lock:
            while True:
                self._read()
                change = Change(self.desired.generation + 1, model, override, **more)
                if self._store.add(self._key(change.generation), pickle.dumps(change)):
                    break
            before = self.desired.last(model)
            self.desired.add(change)
            if before is not None:  # the files that its override carries need not be kept
                self._store.replace(self._key(before.generation), b"")
        return change

    def news(self) -> list[Change]:
        """What others have changed since this was last asked, in order."""
        with self._lock:
            self._read()
            changes, self._foreign = self._foreign, []
        return changes

    def _read(self) -> None:
        while (entry := self._store.get(self._key(self.desired.generation + 1))) is not None:
            if not entry:  # a later change of the same model follows
                self.desired.generation += 1
                continue
            change: Change = pickle.loads(entry)
            self.desired.add(change)
            self._foreign.append(change)

    def _key(self, generation: int) -> str:
        return f"{_prefix(self.name)}{generation}"


def forget(store: Store, name: str) -> None:
    """Begin anew: no gateway of the application is left that goes by its journal."""
    store.clear(_prefix(name))


def owner_key(name: str) -> str:
    """Where the name of the application whose gateways keep a journal is found."""
    return f"owner/{name}"


def gateway_name(app: str) -> str:
    """What the names of the actors of an application's gateways contain."""
    return f"SERVE_REPLICA::{app}#gateway#"


def _prefix(name: str) -> str:
    return f"journal/{name}/"
