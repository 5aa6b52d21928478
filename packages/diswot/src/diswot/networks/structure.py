"""Structure strings: networks as chains of super blocks, e.g. `SuperConvK3BNRELU(3,64,1,1)SuperResK3K3(64,64,2,64,2)`.

Reading, writing and costs of the strings that ZenNAS and DisWOT search over (section 3.4); the networks are in
`diswot.networks.structure_net`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from diswot.networks.sizes import check_weights
from visionkernels.checks import InputError, check, check_known

__all__ = [
    "Structure",
    "SuperBlock",
    "block_kinds",
    "parse_block",
    "parse_structure",
]

_CHANNEL_LIMIT, _STRIDE_LIMIT, _LAYER_LIMIT, _BLOCK_LIMIT = 8192, 8, 64, 256

_CONV_KERNELS, _RESIDUAL_KERNELS = (1, 3, 5, 7), (3, 5, 7)


def block_kinds() -> dict[str, tuple[int, ...]]:
    """Return the kinds of super blocks with the kernel sizes of one sub-layer's convolutions."""
    kinds: dict[str, tuple[int, ...]] = {f"SuperConvK{k}BNRELU": (k,) for k in _CONV_KERNELS}
    kinds |= {f"SuperResK{k}K{k}": (k, k) for k in _RESIDUAL_KERNELS}
    return kinds | {f"SuperResK1K{k}K1": (1, k, 1) for k in _RESIDUAL_KERNELS}


_KINDS = block_kinds()


@dataclass(frozen=True)
class SuperBlock:
    """`layers` sub-layers of one kind; `bottleneck` is the inner width of a residual kind, and None for SuperConv."""

    kind: str
    channels_in: int
    channels_out: int
    stride: int
    bottleneck: int | None
    layers: int

    def __post_init__(self) -> None:
        check_known("block", self.kind, _KINDS)
        sizes = {"in-channels": self.channels_in, "out-channels": self.channels_out}
        if self.bottleneck is not None:
            sizes["bottleneck"] = self.bottleneck
        for name, value in sizes.items():
            check(1 <= value <= _CHANNEL_LIMIT, name, value, f"from 1 to {_CHANNEL_LIMIT}")
        check(1 <= self.stride <= _STRIDE_LIMIT, "stride", self.stride, f"from 1 to {_STRIDE_LIMIT}")
        check(1 <= self.layers <= _LAYER_LIMIT, "sub-layers", self.layers, f"from 1 to {_LAYER_LIMIT}")

    def __str__(self) -> str:
        inner = () if self.bottleneck is None else (self.bottleneck,)
        numbers = (self.channels_in, self.channels_out, self.stride, *inner, self.layers)
        return f"{self.kind}({','.join(map(str, numbers))})"

    @property
    def is_residual(self) -> bool:
        return self.bottleneck is not None

    @property
    def kernels(self) -> tuple[int, ...]:
        """Kernel sizes of one residual branch, or of one plain convolution."""
        return _KINDS[self.kind]

    def branches(self) -> list[tuple["Convolution", ...]]:
        """Return the convolutions of each residual branch (of each plain sub-layer) in order.

        A sub-layer of a bottleneck kind is two branches. The first branch alone changes channels and resolution.
        """
        num_branches = self.layers * (2 if len(self.kernels) == 3 else 1)
        inner = self.bottleneck or self.channels_out
        branches = []
        for index in range(num_branches):
            channels, stride = (self.channels_out, 1) if index else (self.channels_in, self.stride)
            widths = (channels, *[inner] * (len(self.kernels) - 1), self.channels_out)
            # in a bottleneck the middle convolution is the strided one, else the first
            strided = len(self.kernels) // 2 if len(self.kernels) == 3 else 0
            branches.append(
                tuple(
                    Convolution(widths[i], widths[i + 1], kernel, stride if i == strided else 1)
                    for i, kernel in enumerate(self.kernels)
                )
            )
        return branches


@dataclass(frozen=True)
class Convolution:
    """A convolution that keeps the size at stride 1; a norm of `channels_out` follows it."""

    channels_in: int
    channels_out: int
    kernel: int
    stride: int

    @property
    def num_weights(self) -> int:
        return self.channels_in * self.channels_out * self.kernel**2


@dataclass(frozen=True)
class Structure:
    """A chain of super blocks, in which a block takes the channels that the one before it gives."""

    blocks: tuple[SuperBlock, ...]

    def __post_init__(self) -> None:
        check(1 <= len(self.blocks) <= _BLOCK_LIMIT, "structure", str(self), f"of 1 to {_BLOCK_LIMIT} blocks")
        for index, (block, following) in enumerate(pairwise(self.blocks), 1):
            if block.channels_out != following.channels_in:
                raise InputError(
                    f"block {index} of the structure, {following}, takes {following.channels_in} channels; "
                    f"expected {block.channels_out}, which {block} gives"
                )
        size = self.count_parameters(num_classes=0)
        check_weights("structure", str(self), size)

    def __str__(self) -> str:
        return "".join(map(str, self.blocks))

    @property
    def num_layers(self) -> int:
        return sum(block.layers for block in self.blocks)

    @classmethod
    def of(cls, blocks: Sequence[SuperBlock]) -> "Structure":
        """Return the chain of `blocks`, whose input channels become those that the block before gives."""
        chain = list(blocks[:1])
        for block in blocks[1:]:
            chain.append(replace(block, channels_in=chain[-1].channels_out))
        return cls(tuple(chain))

    def split(self, threshold: int = 6) -> "Structure":
        """Return the structure with blocks of `threshold` sub-layers and more cut in two, threshold // 2 and the rest.

        The second part has stride 1, and as it is a block of its own, it starts with a projection.
        """
        check(threshold >= 2, "threshold", threshold, "at least 2")
        blocks = []
        for block in self.blocks:
            if block.layers < threshold:
                blocks.append(block)
                continue
            first = threshold // 2
            rest = replace(block, channels_in=block.channels_out, stride=1, layers=block.layers - first)
            blocks += [replace(block, layers=first), rest]
        return Structure(tuple(blocks))

    def count_parameters(self, *, num_classes: int) -> int:
        """Count all parameters of the network, without building it."""
        total = (self.blocks[-1].channels_out + 1) * num_classes
        for block in self.blocks:
            convolutions = [layer for branch in block.branches() for layer in branch]
            total += sum(layer.num_weights + 2 * layer.channels_out for layer in convolutions)
            if block.is_residual:
                total += (block.channels_in + 3) * block.channels_out
        return total

    def official_model_size(self, *, num_classes: int) -> int:
        """Count parameters as the official budget does, which is too few.

        A norm counts C instead of 2 C, the projection's norm nothing, and the classifier's bias 1.
        """
        total = self.blocks[-1].channels_out * num_classes + 1
        for block in self.blocks:
            convolutions = [layer for branch in block.branches() for layer in branch]
            total += sum(layer.num_weights + layer.channels_out for layer in convolutions)
            if block.is_residual:
                total += (block.channels_in + 1) * block.channels_out
        return total

    def official_flops(self, *, resolution: int, num_classes: int) -> float:
        """Count multiply-adds at `resolution` x `resolution` pixels as the official budget does.

        Norms count C H W, which is no multiply-add of ours, and projections are taken as if after one more stride,
        which is too few.
        """
        check(resolution >= 1, "resolution", resolution, "at least 1")
        total, side = 0.0, float(resolution)
        for block in self.blocks:
            for index, branch in enumerate(block.branches()):
                for layer in branch:
                    side = side // layer.stride
                    total += (layer.num_weights + layer.channels_out) * side**2
                if block.is_residual and index == 0:
                    total += (block.channels_in + 1) * block.channels_out * (side / block.stride) ** 2
        return total + self.blocks[-1].channels_out * num_classes


_BLOCK = re.compile(r"([A-Za-z]\w*)\(")
_NUMBER = re.compile(r"\s*(-?\d+)\s*")


def parse_structure(text: str) -> Structure:
    """Read a structure string; ValueError tells the position and what was expected there."""
    blocks: list[SuperBlock] = []
    position = 0
    while position < len(text) or not blocks:
        block, end = _parse_block(text, position)
        if blocks and blocks[-1].channels_out != block.channels_in:
            raise InputError(
                f"structure {_shortened(text)}: the block at position {position}, {block}, takes {block.channels_in} "
                f"channels; expected {blocks[-1].channels_out}, which {blocks[-1]} gives"
            )
        check(len(blocks) < _BLOCK_LIMIT, "structure", _shortened(text), f"of at most {_BLOCK_LIMIT} blocks")
        blocks.append(block)
        position = end
    return Structure(tuple(blocks))


def parse_block(text: str) -> SuperBlock:
    """Read the string of one super block."""
    block, end = _parse_block(text, 0)
    if end < len(text):
        raise _malformed(text, end, "the end")
    return block


def _parse_block(text: str, start: int) -> tuple[SuperBlock, int]:
    match = _BLOCK.match(text, start)
    if match is None:
        raise _malformed(text, start, "a block, e.g. SuperResK3K3(64,64,1,64,2)")
    kind, position = match[1], match.end()
    try:
        check_known("block", kind, _KINDS)
        names = ["in-channels", "out-channels", "stride", "sub-layers"]
        if kind.startswith("SuperRes"):
            names.insert(3, "bottleneck")
        numbers: list[int] = []
        for index, name in enumerate(names):
            number = _NUMBER.match(text, position)
            if number is None or len(number[1]) > 9:
                raise _malformed(text, position, f"a number, the {name} of {kind}({','.join(names)})")
            numbers.append(int(number[1]))
            position, mark = number.end(), "," if index + 1 < len(names) else ")"
            if not text.startswith(mark, position):
                raise _malformed(text, position, f"{mark!r}, as in {kind}({','.join(names)})")
            position += 1
        bottleneck = numbers[3] if kind.startswith("SuperRes") else None
        channels_in, channels_out, stride = numbers[:3]
        return SuperBlock(kind, channels_in, channels_out, stride, bottleneck, numbers[-1]), position
    except ValueError as error:
        if str(error).startswith("structure "):
            raise
        raise InputError(f"structure {_shortened(text)} at position {start}: {error}") from error


def _malformed(text: str, position: int, expected: str) -> InputError:
    seen = repr(text[position : position + 12]) if position < len(text) else "the end"
    return InputError(f"structure {_shortened(text)} has {seen} at position {position}; expected {expected}")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")
