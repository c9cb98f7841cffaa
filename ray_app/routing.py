"""Serve's request router for the pools: the less busy of two replicas, or the one that a request names."""

import random
from typing import Any

from ray.serve.request_router import RequestRouter


class AddressedRouter(RequestRouter):  # type: ignore[misc]
    """A call with the keyword `to` goes to the replica of that id, while it is there.

    When it is not, another one gets the call and refuses it.
    """

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            wanted = pending_request.kwargs.get("to")
            if wanted:
                named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
                if named:
                    return [named]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
