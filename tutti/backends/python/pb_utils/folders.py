"""Which folder the model that asks is in: a process may have several models."""

import os
import sys

from tutti.backends.python.pb_utils.errors import TritonModelException

# The folders of versions that this process has models of.
_model_dirs: list[str] = []


def know_folder(path: str) -> None:
    """This process has the model of a version's folder."""
    if path not in _model_dirs:
        _model_dirs.append(path)


def get_model_dir() -> str:
    """The folder of the model version that asks, which its code lies in."""
    if len(_model_dirs) == 1:
        return _model_dirs[0]
    frame = sys._getframe(1)
    while frame is not None:
        for folder in _model_dirs:
            if frame.f_code.co_filename.startswith(folder + os.sep):
                return folder
        frame = frame.f_back  # type: ignore[assignment]
    raise TritonModelException("which model asks for its folder cannot be told: ask from its own code")
