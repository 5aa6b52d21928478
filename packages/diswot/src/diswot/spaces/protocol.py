"""The interface of a search space: architectures under text keys that can be drawn, mutated and built."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from torch import nn

__all__ = ["Space"]


@runtime_checkable
class Space(Protocol):
    """Architectures under canonical keys, which are plain text and stay the same between sessions.

    `rng` alone decides what `sample` and `mutate` return. Every method that takes a key raises ValueError for one that
    is malformed or not of the space.
    """

    name: str
    """Name under which `diswot.spaces.create` makes the space."""
    size: int | None
    """Number of keys; None where nobody counted them."""
    input_size: tuple[int, int, int]
    """Channels, height and width of the images that the networks are meant for."""

    def sample(self, rng: np.random.Generator) -> str:
        """Draw a key."""
        ...

    def mutate(self, key: str, rng: np.random.Generator) -> str:
        """Return the key of a neighbour, which is another architecture than `key`."""
        ...

    def enumerate(self) -> Iterator[str]:
        """Go through all keys; ValueError where `size` is None or too large to go through."""
        ...

    def parse(self, key: str) -> str:
        """Return the canonical form of `key`; ValueError says where it is wrong and what was expected."""
        ...

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        """Return the network of `key` with fresh weights."""
        ...
