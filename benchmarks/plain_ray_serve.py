"""The other side of the Ray comparison: the same model as Ray Serve's users write it.

Raw bytes in and out, no protocol to parse, and `max_ongoing_requests` raised from its default of 5. It is asked through
Serve's HTTP proxy, or, where the environment turns on Serve's direct ingress, at its replica's own port.
"""

import argparse
import signal
import threading

import ray
from ray import serve


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Plain:
    def __init__(self, path: str) -> None:
        import numpy as np
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._numpy = np
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def __call__(self, request):  # type: ignore[no-untyped-def]
        from starlette.responses import Response

        if request.url.path == "/-/ready":
            return Response()
        x = self._numpy.frombuffer(await request.body(), self._numpy.float32).reshape(1, -1)
        return Response(self._session.run(None, {"x": x})[0].tobytes())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    stop = threading.Event()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    # Decorated classes have `bind`; their types do not say so.
    serve.run(Plain.bind(options.model), name="plain", route_prefix="/")  # type: ignore[attr-defined]
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
