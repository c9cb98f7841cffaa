"""Log-mel spectrograms as one convolution: the same numbers as transformers' feature extractors, in the graph.

All that is linear per frame (offset, pre-emphasis, window, the discrete Fourier transform) is folded into the kernel.
The STFT operator of ONNX is an order of magnitude slower, and has no kernel on GPUs.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from tutti.export.narrow import Wide


def kernel(
    window: np.ndarray[Any, Any], n_fft: int, preemphasis: float = 0.0, removes_offset: bool = False
) -> torch.Tensor:
    """[2 * (n_fft / 2 + 1), 1, len(window)] FP32: real parts, then imaginary ones.

    Frames are as transformers.audio_utils.spectrogram treats them: the mean is taken off, each sample loses
    `preemphasis` of the one before it (the first of itself), the window is applied, and zeros fill up to `n_fft`.
    """
    length = len(window)
    frame = np.eye(length)
    if removes_offset:
        frame = frame - 1.0 / length
    if preemphasis:
        before = np.vstack([frame[:1], frame[:-1]])
        frame = frame - preemphasis * before
    frame = window[:, np.newaxis] * frame
    angles = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(length)) / n_fft
    basis = np.concatenate([np.cos(angles), -np.sin(angles)]) @ frame
    return torch.from_numpy(basis.astype(np.float32)).unsqueeze(1)


class LogMel(Wide):
    """[batch, samples] FP32 -> [batch, frames, mels] FP32: the logarithm of mel energies.

    In 32 bits always: 16 do not tell small energies from none.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        hop: int,
        mel_filters: np.ndarray[Any, Any],
        floor: float,
        log: Literal["log", "log10", "dB"],
        pad: int = 0,
    ) -> None:
        """`mel_filters` is [frequencies, mels]; `pad` samples are reflected at both ends."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("mel", torch.from_numpy(np.ascontiguousarray(mel_filters, dtype=np.float32)))
        self._hop, self._floor, self._log, self._pad = hop, floor, log, pad

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        x = audio.unsqueeze(1)
        if self._pad:
            x = F.pad(x, (self._pad, self._pad), mode="reflect")
        parts = F.conv1d(x, self.weight, stride=self._hop)
        half = parts.shape[1] // 2
        power = parts[:, :half].square() + parts[:, half:].square()
        energies = (power.transpose(1, 2) @ self.mel).clamp(min=self._floor)
        if self._log == "log":
            return energies.log()
        scaled = energies.log10()
        return 10 * scaled if self._log == "dB" else scaled
