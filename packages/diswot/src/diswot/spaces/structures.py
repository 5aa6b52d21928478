"""Chains of super blocks under their structure strings, and how the search changes them (sections 2.5 and 3.4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import timm
from torch import nn

from diswot.networks.structure import Structure, SuperBlock, parse_structure
from diswot.networks.structure_net import CIFAR_STRUCTURE, IMAGENET_STRUCTURE
from visionkernels.checks import InputError, check, check_choice

__all__ = ["StructureSpace", "mutation_candidates"]

BlockSpace = Literal["xxbl", "res18"]

_SMALLEST, _LARGEST, _MULTIPLE = 8, 2048, 8
_SPLIT_FROM = 6
# draws that may leave the space (too many layers) or change nothing before `mutate` gives up
_TRIES = 1000


@dataclass(frozen=True)
class _Choices:
    """Choices of a mutation."""

    multipliers: tuple[float, ...]
    layer_steps: tuple[int, ...]
    kinds: tuple[str, ...]
    initial: str
    image_size: int


_PLAIN = ("SuperResK3K3", "SuperResK5K5", "SuperResK7K7")
_CHOICES = {
    "xxbl": _Choices(
        multipliers=(2.5, 2, 1.5, 1.25, 1, 1 / 1.25, 1 / 1.5, 1 / 2, 1 / 2.5),
        layer_steps=(0, 1, -1, 2, -2),
        kinds=("SuperResK1K3K1", "SuperResK1K5K1", "SuperResK1K7K1", *_PLAIN),
        initial=CIFAR_STRUCTURE,
        image_size=32,
    ),
    "res18": _Choices(
        multipliers=(1.5, 1.25, 1, 1 / 1.25, 1 / 1.5),
        layer_steps=(0, 1, -1),
        kinds=_PLAIN,
        initial=IMAGENET_STRUCTURE,
        image_size=224,
    ),
}


def mutation_candidates(block: SuperBlock, space: BlockSpace) -> list[SuperBlock]:
    """Return the blocks that may replace `block`, without repeats and sorted by their text; `block` can be one.

    Residual blocks change their kind, output channels, bottleneck and sub-layers, plain convolutions their output
    channels only. Input channels and stride stay. (The official list holds some several times, since it grows while it
    is read; drawing from it favours kernels of 3.)
    """
    check_choice("space", space, BlockSpace)
    return sorted((_changed(block, values) for values in product(*_allowed(block, space))), key=str)


def _allowed(block: SuperBlock, space: BlockSpace) -> list[list[Any]]:
    """Return what kind, output channels, bottleneck and sub-layers may be; every combination is a candidate."""
    choices = _CHOICES[space]
    widths = _widths(block.channels_out, choices)
    if block.bottleneck is None:
        return [[block.kind], widths, [None], [1]]
    depths = [block.layers + step for step in choices.layer_steps if block.layers + step >= 1]
    return [list(choices.kinds), widths, _widths(block.bottleneck, choices), depths]


def _changed(block: SuperBlock, values: Sequence[Any]) -> SuperBlock:
    kind, channels_out, bottleneck, layers = values
    return SuperBlock(kind, block.channels_in, channels_out, block.stride, bottleneck, layers)


def _widths(channels: int, choices: _Choices) -> list[int]:
    clipped = (min(max(channels * factor, _SMALLEST), _LARGEST) for factor in choices.multipliers)
    return sorted({max(_MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE) for width in clipped})


class StructureSpace:
    """Keys are structure strings; the space is what `mutations` replacements of blocks lead to, again and again.

    `blocks` is "xxbl" (bottlenecks and plain residuals, from the CIFAR structure) or "res18" (plain residuals, from the
    ImageNet structure); `initial` replaces the structure that searches start from. A mutation draws `mutations` block
    numbers, one that comes again being left out, replaces these blocks, and cuts blocks of six sub-layers and more in
    two. Structures of more than `max_layers` sub-layers are not of the space.
    """

    size: int | None = None

    def __init__(
        self,
        blocks: BlockSpace = "res18",
        *,
        initial: str | None = None,
        max_layers: int = 18,
        mutations: int = 2,
        image_size: int | None = None,
    ) -> None:
        check_choice("blocks", blocks, BlockSpace)
        check(mutations >= 1, "mutations", mutations, "at least 1")
        check(image_size is None or image_size >= 8, "image_size", image_size, "at least 8")
        self.name: str = blocks
        self.blocks, self.max_layers, self.mutations = blocks, max_layers, mutations
        side = image_size or _CHOICES[blocks].image_size
        self.input_size = (3, side, side)
        self.initial = self.parse(initial or _CHOICES[blocks].initial)

    def sample(self, rng: np.random.Generator) -> str:
        """Draw a structure: 1 to 16 mutations from the initial one."""
        key = self.initial
        for _ in range(int(rng.integers(1, 17))):
            key = self.mutate(key, rng)
        return key

    def mutate(self, key: str, rng: np.random.Generator, *, replacements: int | None = None) -> str:
        """Replace `replacements` blocks (by default `mutations`); RuntimeError if no change keeps to `max_layers`."""
        structure = self._structure(key)
        for _ in range(_TRIES):
            changed = self._replaced(structure, rng, replacements or self.mutations)
            if changed is not None and changed.num_layers <= self.max_layers and changed != structure:
                return str(changed)
        raise RuntimeError(
            f"no mutation of {key!r} in {_TRIES} tries has at most max_layers={self.max_layers}; raise max_layers"
        )

    def _replaced(self, structure: Structure, rng: np.random.Generator, replacements: int) -> Structure | None:
        blocks = list(structure.blocks)
        chosen = dict.fromkeys(int(index) for index in rng.integers(len(blocks), size=replacements))
        for index in chosen:
            # a uniform draw from the candidates, of which there may be thousands
            allowed = _allowed(blocks[index], self.blocks)
            blocks[index] = _changed(blocks[index], [values[int(rng.integers(len(values)))] for values in allowed])
        try:
            return Structure.of(blocks).split(_SPLIT_FROM)
        except ValueError:
            # one of the limits of a structure
            return None

    def enumerate(self) -> Iterator[str]:
        raise InputError(f"space {self.name} has no list of its structures; sample or mutate them")

    def parse(self, key: str) -> str:
        return str(self._structure(key))

    def build(self, key: str, *, num_classes: int = 100, in_chans: int = 3) -> nn.Module:
        structure = self.parse(key)
        return timm.create_model("structure_net", structure=structure, num_classes=num_classes, in_chans=in_chans)

    def _structure(self, key: str) -> Structure:
        structure = parse_structure(key.strip())
        check(
            structure.num_layers <= self.max_layers,
            "key",
            key,
            f"a structure of at most max_layers={self.max_layers} sub-layers, not {structure.num_layers}",
        )
        return structure
