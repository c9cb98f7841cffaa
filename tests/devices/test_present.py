"""Whether there are GPUs, as far as files say."""

from pathlib import Path

import pytest

from tutti.devices.gpu_presence import has_gpu


def test_a_machine_without_devices_has_none(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not has_gpu({}, tmp_path)


@pytest.mark.parametrize("entry", ["dev/nvidia0", "dev/nvidia12", "proc/driver/nvidia/gpus/0000:01:00.0"])
def test_what_the_driver_shows_is_seen(tmp_path: Path, entry: str) -> None:
    (tmp_path / entry).parent.mkdir(parents=True)
    (tmp_path / entry).touch()
    assert has_gpu({}, tmp_path)


@pytest.mark.parametrize(
    ("visible", "is_seen"),
    [("", False), ("-1", False), ("-1,0", False), (" ", False), ("0", True), ("1,-1", True), ("GPU-8932", True)],
)
def test_the_environment_may_hide_them(tmp_path: Path, visible: str, is_seen: bool) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert has_gpu({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) is is_seen
