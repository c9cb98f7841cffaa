"""A Triton python model: encoded JPEG or PNG bytes -> RGB pixels of one size, [3, height, width] UINT8.

How pictures are resized and cropped is in the parameters, as the checkpoint's own processor does it.
"""

import io
import json

import numpy as np
import triton_python_backend_utils as pb_utils
from image_transform import fitted
from PIL import Image, UnidentifiedImageError

# Larger pictures are refused before they are decoded: a small file can announce gigabytes of pixels.
MAX_PIXELS = 64_000_000


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._name = config["name"]
        dims = pb_utils.get_output_config_by_name(config, "PIXELS")["dims"]
        self._height, self._width = int(dims[1]), int(dims[2])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._resize = parameters.get("resize", "exact")
        self._resample = int(parameters.get("resample", str(int(Image.Resampling.BILINEAR))))

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
            return fitted(image, self._height, self._width, self._resize, self._resample)
