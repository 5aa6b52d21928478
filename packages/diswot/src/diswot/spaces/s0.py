"""S0: CIFAR ResNets that differ in the depths of their three stages (section 3.1)."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import timm
from torch import nn

from diswot.networks.cifar_resnet import S0_DEPTHS
from visionkernels.checks import InputError, check

__all__ = ["S0"]

_STAGES = 3


class S0:
    """Keys name the depths of the three stages, each one of `depths`: "713", or "10-2-14" where a depth has two digits.

    The default are the paper's 64 networks.
    """

    name = "s0"
    input_size = (3, 32, 32)

    def __init__(self, depths: Sequence[int] = S0_DEPTHS) -> None:
        self.depths = tuple(sorted(set(depths)))
        holds = len(self.depths) > 1 and all(1 <= depth <= 256 for depth in self.depths)
        check(holds, "depths", tuple(depths), "two or more different numbers from 1 to 256")
        self.size = len(self.depths) ** _STAGES
        self._joint = "" if self.depths[-1] < 10 else "-"

    def sample(self, rng: np.random.Generator) -> str:
        return self._key(rng.choice(self.depths, _STAGES).tolist())

    def mutate(self, key: str, rng: np.random.Generator) -> str:
        """Change the depth of one stage."""
        depths = self._depths(key)
        stage = int(rng.integers(_STAGES))
        depths[stage] = int(rng.choice([depth for depth in self.depths if depth != depths[stage]]))
        return self._key(depths)

    def enumerate(self) -> Iterator[str]:
        return map(self._key, product(self.depths, repeat=_STAGES))

    def parse(self, key: str) -> str:
        return self._key(self._depths(key))

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        depths = tuple(self._depths(key))
        # "s0_713" where timm has that name, which then stands in its configuration
        name = f"s0_{''.join(map(str, depths))}" if set(depths) <= set(S0_DEPTHS) else "cifar_resnet8"
        return timm.create_model(name, depths=depths, num_classes=num_classes, in_chans=in_chans)

    def _key(self, depths: Sequence[int]) -> str:
        return self._joint.join(map(str, depths))

    def _depths(self, key: str) -> list[int]:
        key = key.strip()
        parts = key.split("-") if "-" in key or self._joint else list(key)
        allowed = ", ".join(map(str, self.depths))
        position = 0
        for part in parts[:_STAGES]:
            if not (part.isascii() and part.isdigit() and int(part) in self.depths):
                raise InputError(
                    f"S0 key {key!r} has {part!r} at position {position}; expected a depth among {allowed}, "
                    f"as in {self._key(self.depths[:1] * _STAGES)!r}"
                )
            position += len(part) + len(self._joint)
        if len(parts) != _STAGES:
            raise InputError(f"S0 key {key!r} has {len(parts)} depths; expected {_STAGES}, each among {allowed}")
        return [int(part) for part in parts]
