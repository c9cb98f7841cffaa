"""Front-end processes, and the link between them and the engine's."""
