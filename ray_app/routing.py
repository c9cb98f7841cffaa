"""Serve's request router for the pools: every call names its replica. It tells the gateway which ones there are."""

import random
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import RequestRouter

Changed = Callable[[list[str], str], None]

# Callbacks by deployment, called when its replicas change. Serve makes a router for each handle, in the process and on
# the loop of the handle's holder.
_watchers: dict[str, Changed] = {}


def watch(deployment: str, changed: Changed) -> None:
    """Have `changed` called with the ids of a deployment's replicas whenever they are others.

    And with that of one that died: others that are no longer there end what they have begun.
    """
    _watchers[deployment] = changed


class AddressedRouter(RequestRouter):  # type: ignore[misc]
    """A call with the keyword `to` goes to the replica of that id, while it is there.

    When it is not, another one gets the call and refuses it.
    """

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell(replica_id.unique_id)

    def _tell(self, dead: str = "") -> None:
        # Serve may pickle this class with a copy of its module. The callbacks are in the imported module.
        from tutti.ray_app import routing

        changed = routing._watchers.get(self._deployment_id.name)
        if changed is not None:
            changed([replica_id.unique_id for replica_id in self.curr_replicas], dead)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            wanted = pending_request.kwargs.get("to")
            if wanted:
                named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
                if named:
                    return [named]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
