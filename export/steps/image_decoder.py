"""A Triton python model: encoded JPEG or PNG bytes -> RGB pixels of one size, [3, height, width] UINT8.

How pictures are resized and cropped is in the parameters, as the checkpoint's own processor does it; and whether
colours come last ("layout"), and pixels are FP32, rescaled and normalised ("scale", "mean", "std").
"""

import io
import json

import numpy as np
import triton_python_backend_utils as pb_utils
from image_transform import fitted, normalized
from PIL import Image, UnidentifiedImageError

# Larger pictures are refused before they are decoded: a small file can announce gigabytes of pixels.
MAX_PIXELS = 64_000_000


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._name = config["name"]
        dims = pb_utils.get_output_config_by_name(config, "PIXELS")["dims"]
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._has_colours_last = parameters.get("layout", "chw") == "hwc"
        self._height, self._width = (int(size) for size in (dims[:2] if self._has_colours_last else dims[1:]))
        self._resize = parameters.get("resize", "exact")
        self._resample = int(parameters.get("resample", str(int(Image.Resampling.BILINEAR))))
        self._scale = float(parameters.get("scale", "0"))
        if self._scale:
            self._mean, self._std = (
                np.array(parameters[key].split(","), dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std")
            )

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        elements = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
        try:
            pixels = np.stack([self._decode(element) for element in elements])
        except Exception as error:
            reason = "got bytes that are neither" if isinstance(error, UnidentifiedImageError) else error
            message = f"model '{self._name}': input 'IMAGE': expected JPEG or PNG bytes: {reason}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("PIXELS", pixels)])

    def _decode(self, data):
        if not data:
            raise ValueError("got no bytes at all")
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"got {image.width}x{image.height} pixels, at most {MAX_PIXELS} are accepted")
            pixels = fitted(image, self._height, self._width, self._resize, self._resample)
        if self._has_colours_last:
            return pixels
        pixels = pixels.transpose(2, 0, 1)
        return normalized(pixels, self._scale, self._mean, self._std) if self._scale else pixels
