#!/usr/bin/env bash
# run.sh PART --out FOLDER [...]: one part of the kit, from this folder alone. `run.sh report FOLDER...` makes the page.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=${TUTTI_WORK:-/tmp/tutti-gpu}
site=$here/site

install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --disable-pip-version-check --target "$site" "$@"
}

if [ ! -d "$site" ]; then
    site=$work/site
    if [ ! -e "$site/.installed" ]; then
        mkdir -p "$work"
        install "$here"/wheels/*.whl
        if ! PYTHONPATH=$site "$python" -c 'import tritonclient.grpc' 2>"$work/fallback.log"; then
            echo "packages here are too old for tritonclient; using the kit's (see $work/fallback.log)" >&2
            install "$here"/fallback/*.whl
        fi
        touch "$site/.installed"
    fi
fi
models=$here/models
if [ -e "$models/minilm.safetensors.xz" ]; then
    models=$work/models
    if [ ! -e "$models/minilm.safetensors" ]; then
        mkdir -p "$models"
        "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
            "$here/models/minilm.safetensors.xz" "$models/new"
        mv "$models/new" "$models/minilm.safetensors"
    fi
fi
export TUTTI_KIT=${TUTTI_KIT:-$(dirname "$here")} TUTTI_KIT_MODELS=$models
export PYTHONPATH=$here/source:$site${PYTHONPATH:+:$PYTHONPATH}
# PyTorch may be there without compiled sources, which cost each process a quarter of a minute.
export PYTHONPYCACHEPREFIX=$work/pycache
# Not from the folder where it is called: that may have sources of its own.
exec "$python" -P -m benchmarks.gpu "$@"
