"""A picture in the size, and with the numbers, that a model takes."""

import numpy as np
from PIL import Image


def fitted(image, height, width, resize, resample):
    """[height, width, 3] UINT8. `resize` is "exact", or the length of the shorter edge, from whose middle it is cut."""
    picture = image.convert("RGB")
    if resize == "exact":
        picture = picture.resize((width, height), Image.Resampling(resample))
        return np.asarray(picture, dtype=np.uint8)
    short, long = sorted(picture.size)
    edge = int(resize)
    other = int(edge * long / short)
    size = (edge, other) if picture.width <= picture.height else (other, edge)
    pixels = np.asarray(picture.resize(size, Image.Resampling(resample)), dtype=np.uint8)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top < 0 or left < 0:  # the shorter edge is less than what is cut out: the rest is black
        padded = np.zeros((max(height, pixels.shape[0]), max(width, pixels.shape[1]), 3), np.uint8)
        above, before = (padded.shape[0] - pixels.shape[0] + 1) // 2, (padded.shape[1] - pixels.shape[1] + 1) // 2
        padded[above : above + pixels.shape[0], before : before + pixels.shape[1]] = pixels
        pixels, top, left = padded, (padded.shape[0] - height) // 2, (padded.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def normalized(pixels, scale, mean, std):
    """FP32 of UINT8 [..., 3, height, width]; `mean` and `std` are [3, 1, 1]."""
    return (pixels.astype(np.float32) * np.float32(scale) - mean) / std
