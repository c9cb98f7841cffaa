#!/usr/bin/env bash
# One client, 64 and 256 after batches are cut at captured sizes and one client wakes fewer threads; after 2-triton.sh.
run=$(cd "$(dirname "$0")/.." && pwd)/run.sh
"$run" served --out "$OUT" --minutes 6.5 --only "minilm fp16, 4 front-ends, [64" --only "vit fp16, 4 front-ends, [64"
