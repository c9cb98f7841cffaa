#!/usr/bin/env bash
# ResNet-50 through the server, and how the front-ends grow with cores: never measured yet. With gpu-kit/base.
run=$(cd "$(dirname "$0")/.." && pwd)/run.sh
"$run" limits --out "$OUT" --minutes 1.5 --only "resnet50 fp16"
"$run" served --out "$OUT" --minutes 5.5 --only "resnet50 fp16, 4 front-ends, [64" --only "tiny model, 1 and 8"
