"""scikit-learn's handwritten digits as pictures: a real labelled image set that comes with a package.

One fixed split; the held-out pictures are never trained on.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def load() -> tuple[list[Pixels], list[int], list[Pixels], list[int]]:
    """(train pictures, train labels, held-out pictures, held-out labels); pictures are [8, 8] UINT8 grey levels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pictures = np.clip(digits.images * 16, 0, 255).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        pictures, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return list(train), [int(y) for y in train_labels], list(test), [int(y) for y in test_labels]


def to_png(picture: Pixels) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def to_input(picture: Pixels, height: int, width: int) -> Pixels:
    """What the image decoder step makes of the picture: [3, height, width] UINT8."""
    resized = Image.fromarray(picture).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)
