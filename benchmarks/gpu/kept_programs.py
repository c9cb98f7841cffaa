"""Programs that the kit carries: put together from pieces, checked, and installed into a folder of `work`."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.context import ROOT, NotThereYetError

# Beside the sources in the kit.
KIT = Path(os.environ.get("TUTTI_KIT", ROOT.parent))


def installed(name: str, work: Path) -> Path:
    """The folder with the packages of the kit's set `name`. Raises NotThereYetError naming what was not carried."""
    target = work / name
    done = target / ".installed"
    if done.exists():
        return target
    wheels = [_whole(listing, work) for listing in sorted(KIT.glob(f"{name}*/*.json"))]
    wheels += sorted(KIT.glob(f"{name}*/*.whl"))
    if not wheels:
        raise NotThereYetError(f"the kit has no '{name}' here: carry {KIT.name}/{name}* to this machine")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade",
               "--disable-pip-version-check", "--target", str(target), *map(str, wheels)]  # fmt: skip
    subprocess.run(command, check=True)
    done.touch()
    return target


def _whole(listing: Path, work: Path) -> Path:
    """A wheel from its pieces, which lie in folders of their own: each is a transfer."""
    about = json.loads(listing.read_text())
    path = work / str(about["name"])
    found: dict[str, Path] = {piece.name: piece for piece in KIT.glob("*/*.piece")}
    missing = [name for name in about["pieces"] if name not in found]
    if missing:
        raise NotThereYetError(f"{about['name']}: not carried yet: {', '.join(missing)}")
    with path.open("wb") as file:
        for name in about["pieces"]:
            file.write(found[name].read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != about["sha256"]:
        raise ValueError(f"{about['name']}: expected sha256 {about['sha256']}, got {digest}")
    return path
