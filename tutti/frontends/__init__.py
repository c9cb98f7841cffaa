"""Front-ends: HTTP and gRPC shells over pure codecs. They know `Infer` and the engine's questions, nothing behind."""
