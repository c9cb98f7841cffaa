"""The clients by protocol, as a scenario names it."""

from collections.abc import Callable, Sequence

from tutti.loadtest.client import Client, Done
from tutti.loadtest.grpc_client import GrpcClient
from tutti.loadtest.grpc_stream import StreamClient
from tutti.loadtest.http_client import HttpClient
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target

CLIENTS: dict[str, Callable[[Target, Sequence[Message], Done, float], Client]] = {
    "http": HttpClient,
    "grpc": GrpcClient,
    "grpc-stream": StreamClient,
}
