#!/usr/bin/env bash
# ONNX Runtime's CUDA provider, once all of gpu-kit/onnxruntime-* is there; memory after 50 loads; where AOTInductor ends.
run=$(cd "$(dirname "$0")/.." && pwd)/run.sh
"$run" onnxruntime --out "$OUT" --minutes 2.5
"$run" check --out "$OUT" --minutes 3 --only "load and unload" --only "AOTInductor"
