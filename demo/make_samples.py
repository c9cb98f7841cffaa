"""How demo/samples was made: flite's voices between pauses of known length, and held-out digits as picture files.

Needs Debian's `flite`. Run `python -m demo.make_samples` to make them again; they are kept in git so nobody has to.
"""

import io
import json
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tutti.export import digits

SAMPLES = Path(__file__).parent / "samples"
RATE = 16_000
TAIL_S = 1.4
AUDIBLE = 0.02

Audio = np.ndarray[Any, np.dtype[np.float32]]

# clip -> (seed, noise level, [(pause before in s, voice, sentence)])
CLIPS: dict[str, tuple[int, float, list[tuple[float, str, str]]]] = {
    "news": (1, 0.001, [
        (1.2, "slt", "Good evening and welcome to the late edition of the city news"),
        (1.6, "slt", "The bridge over the northern canal will stay closed until the end of the month"),
        (2.4, "rms", "Engineers found small cracks in two of the main cables last week"),
        (0.9, "slt", "Buses will run every ten minutes between both sides of the river"),
        (1.8, "rms", "We will bring you the weather right after this short message"),
    ]),
    "support": (2, 0.004, [
        (0.8, "awb", "Hello and thank you for calling the customer support line"),
        (2.0, "rms", "My parcel arrived yesterday but the box was open and empty"),
        (1.1, "awb", "I am very sorry to hear that and I will look into it right now"),
        (3.0, "awb", "Your replacement has been ordered and should arrive on Thursday"),
        (0.7, "rms", "That is wonderful thank you very much for your help"),
    ]),
    "lecture": (3, 0.002, [
        (1.5, "rms", "Today we look at how glaciers shape the valleys below them"),
        (1.0, "rms", "Ice moves slowly but it carries stones as large as houses"),
        (1.3, "rms", "When the ice melts the stones stay behind and form long ridges"),
        (2.2, "slt", "Can you see those ridges from the ground or only from above"),
        (0.9, "rms", "You can see them very clearly from any of the nearby hills"),
    ]),
}  # fmt: skip
# item -> (clip, a sentence of the test split, its label, digit, picture format)
ITEMS = {
    "evening-news": ("news", "The winter market sells roasted chestnuts and candles", "safe", 7, "png"),
    "help-desk": ("support", "You are a gutless worm and a terrible friend", "harassment", 3, "jpeg"),
    "geology-101": ("lecture", "Act now and double your bitcoin in twenty four hours", "spam", 4, "png"),
    "late-call": ("support", "We are coming to your house with guns", "violence", 0, "jpeg"),
}


def say(voice: str, sentence: str) -> Audio:
    """One sentence, cut to where it is audible."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["flite", "-voice", voice, "-t", sentence, "-o", file.name], check=True)
        with wave.open(file.name) as spoken:
            assert spoken.getframerate() == RATE
            pcm = np.frombuffer(spoken.readframes(spoken.getnframes()), np.int16)
    audio = pcm.astype(np.float32) / np.float32(32768)
    audio *= 0.6 / np.abs(audio).max()
    loudness = np.sqrt(np.convolve(audio * audio, np.ones(320) / 320, "same"))
    audible = np.flatnonzero(loudness > AUDIBLE)
    return audio[audible[0] : audible[-1] + 1]


def make_clip(name: str) -> list[list[float]]:
    """Write one clip; returns its [start, end] of speech in seconds."""
    seed, noise, parts = CLIPS[name]
    pieces, segments, at = [], [], 0
    for pause_s, voice, sentence in parts:
        pieces.append(np.zeros(int(pause_s * RATE), np.float32))
        speech = say(voice, sentence)
        at += len(pieces[-1])
        segments.append([round(at / RATE, 3), round((at + len(speech)) / RATE, 3)])
        at += len(speech)
        pieces.append(speech)
    audio = np.concatenate([*pieces, np.zeros(int(TAIL_S * RATE), np.float32)])
    audio += np.random.default_rng(seed).normal(0, noise, len(audio)).astype(np.float32)
    with wave.open(str(SAMPLES / f"{name}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
    return segments


def make_picture(digit: int, form: str) -> bytes:
    """A held-out digit as a picture file; JPEG ones are enlarged first, since JPEG blurs 8 by 8 pixels."""
    _, _, pictures, labels = digits.load()
    picture = Image.fromarray(pictures[labels.index(digit)])
    buffer = io.BytesIO()
    if form == "jpeg":
        picture = picture.resize((64, 64), Image.Resampling.BILINEAR)
    picture.save(buffer, format=form, **({"quality": 92} if form == "jpeg" else {}))
    return buffer.getvalue()


def main() -> None:
    SAMPLES.mkdir(exist_ok=True)
    clips = {name: make_clip(name) for name in CLIPS}
    items = []
    for name, (clip, sentence, label, digit, form) in ITEMS.items():
        (SAMPLES / f"{name}.{form}").write_bytes(make_picture(digit, form))
        items.append(
            {"name": name, "clip": clip, "text": sentence, "label": label, "image": f"{name}.{form}", "digit": digit}
        )
    (SAMPLES / "samples.json").write_text(json.dumps({"segments_s": clips, "items": items}, indent=1) + "\n")


if __name__ == "__main__":
    main()
