"""The cells of NAS-Bench-201: five operations on six edges (section 3.2)."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import timm
from torch import nn

from diswot.networks.nb201 import NB201_OPS, nb201_text, parse_nb201
from visionkernels.checks import check

__all__ = ["NasBench201"]

_EDGES = 6


class NasBench201:
    """Keys are the benchmark's strings, `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|`: 15,625 of them.

    The networks have `cells` cells a group, of `width`, 2 `width` and 4 `width` channels.
    """

    name = "nasbench201"
    size = len(NB201_OPS) ** _EDGES

    def __init__(self, width: int = 16, cells: int = 5, *, image_size: int = 32) -> None:
        check(image_size >= 8, "image_size", image_size, "at least 8")
        self.width, self.cells = width, cells
        self.input_size = (3, image_size, image_size)

    def sample(self, rng: np.random.Generator) -> str:
        return nb201_text(rng.choice(NB201_OPS, _EDGES).tolist())

    def mutate(self, key: str, rng: np.random.Generator) -> str:
        """Replace the operation on one edge by another one."""
        operations = list(parse_nb201(key.strip()))
        edge = int(rng.integers(_EDGES))
        operations[edge] = str(rng.choice([name for name in NB201_OPS if name != operations[edge]]))
        return nb201_text(operations)

    def enumerate(self) -> Iterator[str]:
        return map(nb201_text, product(NB201_OPS, repeat=_EDGES))

    def parse(self, key: str) -> str:
        return nb201_text(parse_nb201(key.strip()))

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        return timm.create_model(
            "nb201",
            arch=self.parse(key),
            width=self.width,
            cells=self.cells,
            num_classes=num_classes,
            in_chans=in_chans,
        )
