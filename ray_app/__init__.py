"""tutti on Ray Serve: a gateway that owns the ports and batches, and pools of replicas that execute whole batches."""
