#!/usr/bin/env bash
# Whether all is right, where time is left. With gpu-kit/base.
run=$(cd "$(dirname "$0")/.." && pwd)/run.sh
"$run" check --out "$OUT" --minutes 9
