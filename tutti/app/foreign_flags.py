"""Flags that people know from other servers, and that `tutti serve` has under no name of its own.

What means the same as a flag here is taken as that flag. What says only how it is here in any case is taken, too. All
else is refused with what to use instead: a flag that is known and does nothing would be believed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

# The same under another name.
ALIASES: Mapping[str, str] = {
    "--id": "--server-name",
    "--hostname": "--host",
    "--port": "--http-port",
    "--prometheus-port": "--metrics-port",
    "--payload-limit": "--http-max-input-size",
}

# An old flag of Triton's: what it is part of here, and what its value is there.
REWRITTEN: Mapping[str, tuple[str, str]] = {
    "--response-cache-byte-size": ("cache_config", "local,size="),
    "--trace-file": ("trace_config", "triton,file="),
    "--trace-level": ("trace_config", "level="),
    "--trace-rate": ("trace_config", "rate="),
    "--trace-count": ("trace_config", "count="),
    "--trace-log-frequency": ("trace_config", "log-frequency="),
}

_PORTS = "processes of one server share ports: --front-end-processes N, on Ray --gateways N"
_COMPLETED = "a configuration is completed only where it leaves input, output or backend out: write them, and it is not"
_CLOUD = "no routes of a cloud's own are served; let a proxy rewrite /ping and /invocations to /v2/health/ready and /v2"
_METRICS = (
    "histograms of requests and queues are always there (tutti_request_duration_seconds), summaries and Triton's "
    "histograms never"
)
_PEERS = "GPUs are not made peers of each other here"
# The values that say how it is here, in lower case; and what to tell who gives others.
FIXED: Mapping[str, tuple[Sequence[str], str]] = {
    "--strict-model-config": (("false", "0"), _COMPLETED),
    "--reuse-http-port": (("false", "0"), _PORTS),
    "--reuse-grpc-port": (("false", "0"), _PORTS),
    "--model-namespacing": (("false", "0"), "names are unique in the one repository that is served"),
    "--enable-peer-access": (("false", "0"), _PEERS),
    "--allow-sagemaker": (("false", "0"), _CLOUD),
    "--allow-vertex-ai": (("false", "0"), _CLOUD),
    "--model-load-retry-count": (
        ("0",),
        "what could not be loaded is tried again when it changes (--model-control-mode poll), or when a client asks",
    ),
    "--buffer-manager-thread-count": (("0",), "who needs a copy makes it; --front-end-processes has more do so"),
    "--grpc-infer-response-compression-level": (("none",), "a level is not set here; a proxy may compress answers"),
    "--metrics-config": (("counter_latencies=true", "histogram_latencies=false", "summary_latencies=false"), _METRICS),
    "--backend-config": (
        ("default-max-batch-size=4",),
        "settings of a backend are parameters in a model's config.pbtxt (docs/protocol.md), and so is max_batch_size",
    ),
}

_POOLS = "memory is taken as batches need it; what clients may have the server hold is --max-inflight-bytes"
_THREADS = "there are no threads to count: --front-end-processes N has more processes read and write"
_VISIBLE = "the environment's CUDA_VISIBLE_DEVICES says which GPUs are used"
_HALF = "a checkpoint is exported once, with tutti export"
REFUSED: Mapping[str, str] = {
    # Triton
    "--disable-auto-complete-config": _COMPLETED,
    "--model-config-name": "put the file in place of config.pbtxt, or let a client load the model with a configuration",
    "--http-thread-count": _THREADS,
    "--grpc-infer-thread-count": _THREADS,
    "--grpc-infer-allocation-pool-size": _POOLS,
    "--grpc-max-response-pool-size": _POOLS,
    "--sagemaker-port": _CLOUD,
    "--sagemaker-safe-port-range": _CLOUD,
    "--sagemaker-thread-count": _CLOUD,
    "--vertex-ai-port": _CLOUD,
    "--vertex-ai-thread-count": _CLOUD,
    "--vertex-ai-default-model": _CLOUD,
    "--backend-directory": "backends are part of tutti, or come with a Python package; a model.py is one's own",
    "--repoagent-directory": "there are no model agents; change the files before they are served",
    "--cache-directory": "the one cache is part of tutti: --cache-config local,size=BYTES",
    "--pinned-memory-pool-byte-size": _POOLS,
    "--cuda-memory-pool-byte-size": _POOLS,
    "--cuda-virtual-address-size": "states of sequences are tensors of their own size, and bounded by the model's dims",
    "--min-supported-compute-capability": _VISIBLE,
    "--host-policy": "start the server under taskset or numactl, or a process for each node",
    "--model-load-gpu-limit": "a load for which there is no memory fails, and says so; what is served goes on",
    # vLLM and Text Embeddings Inference
    "--model": f"{_HALF}, a model's file is put into a repository by tutti init; then: tutti serve REPOSITORY",
    "--model-id": f"{_HALF}, a model's file is put into a repository by tutti init; then: tutti serve REPOSITORY",
    "--served-model-name": "a model's name is its folder's: tutti export SOURCE --name NAME",
    "--revision": f"{_HALF}: give it a local folder of that revision",
    "--tokenizer": f"{_HALF}, and brings its tokenizer as a model",
    "--dtype": f"{_HALF}, in the precisions that --variants lists",
    "--quantization": f"{_HALF}, in the precisions that --variants lists",
    "--pooling": f"{_HALF}, which reads the pooling from it",
    "--max-model-len": "lengths are bounded by a model's dims, and its parameter tutti.max_dims",
    "--auto-truncate": "texts are cut by the exported tokenizer's model, as its checkpoint says",
    "--max-batch-tokens": "batches are bounded by rows: max_batch_size in config.pbtxt",
    "--max-batch-requests": "max_batch_size in a model's config.pbtxt says it",
    "--max-client-batch-size": "max_batch_size in a model's config.pbtxt says it",
    "--max-num-seqs": "max_batch_size in a model's config.pbtxt says it",
    "--max-concurrent-requests": "max_queue_size of dynamic_batching's default_queue_policy, in a model's config.pbtxt",
    "--tokenization-workers": "instance_group { count } in the tokenizer's config.pbtxt",
    "--tensor-parallel-size": "a model is on one GPU; instance_group { gpus } says on which",
    "--gpu-memory-utilization": _POOLS,
    "--api-key": "on a command line every user of the machine can read it: write it to a file, --api-key-file FILE",
    "--ssl-keyfile": "--http-use-ssl --http-server-key FILE --http-server-cert FILE",
    "--ssl-certfile": "--http-use-ssl --http-server-cert FILE --http-server-key FILE",
    "--uds-path": "there are ports only: --host and --http-port",
    "--otlp-endpoint": "--trace-config mode=opentelemetry --trace-config opentelemetry,url=URL",
    "--uvicorn-log-level": "--log-verbose, --log-info, --log-warning and --log-error say what is logged",
    "--cors-allow-origin": "let a proxy add the headers for browsers",
    "--root-path": "let a proxy cut the path",
}  # fmt: skip


# Where what such a flag says goes: nobody reads it.
NOWHERE = "foreign"


def add(parser: argparse.ArgumentParser) -> None:
    """Let a parser know them. They are not listed by its help: docs/protocol.md has the table."""
    others = parser.add_argument_group()
    nothing: dict[str, Any] = {"dest": NOWHERE, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for flag, alias in ALIASES.items():
        same = parser._option_string_actions[alias]
        others.add_argument(flag, type=same.type or str, **{**nothing, "dest": same.dest})
    for flag, (dest, prefix) in REWRITTEN.items():
        action = "store" if dest == "cache_config" else "append"
        others.add_argument(flag, action=action, type=_prefixed(prefix), **{**nothing, "dest": dest})
    for flag, (values, instead) in FIXED.items():
        others.add_argument(flag, type=_fixed(values, instead), **nothing)
    for flag, instead in REFUSED.items():
        kind = _refused(instead)
        others.add_argument(flag, nargs="?", const="", type=kind, **nothing)


def _prefixed(prefix: str) -> Callable[[str], str]:
    return lambda text: prefix + text


def _fixed(values: Sequence[str], instead: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        if text.lower() not in values:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(values)}, got '{text}': {instead}")

    return check


def _refused(instead: str) -> Callable[[str], NoReturn]:
    def refuse(_: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"tutti has no such flag: {instead}")

    return refuse
