"""The module under the name that models import, for processes that a model starts itself."""

import sys

from tutti.backends.python import triton_python_backend_utils

sys.modules[__name__] = triton_python_backend_utils
