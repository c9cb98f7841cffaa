#!/usr/bin/env bash
# The real server beside this one: never measured yet. With gpu-kit/triton.
run=$(cd "$(dirname "$0")/.." && pwd)/run.sh
"$run" limits --out "$OUT" --minutes 2 --only "minilm fp16" --only "vit fp16"
"$run" triton --out "$OUT" --minutes 4.5
