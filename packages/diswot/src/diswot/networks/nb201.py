"""NAS-Bench-201: a cell of four nodes, repeated between two reductions (Dong and Yang 2020; section 3.2)."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_weights
from diswot.networks.staged import HeadOptions, StagedClassifier, check_images, stage_info
from visionkernels.checks import InputError, check, check_known

__all__ = ["NB201_OPS", "NB201_WINNERS", "NasBench201Network", "nb201_text", "parse_nb201"]

NB201_OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# the edges of a cell, (target node, source node), in the order of strings and state dicts
EDGES = tuple((target, source) for target in (1, 2, 3) for source in range(target))

_OPERATION = re.compile(r"([^|~+]*)~(\d*)")


def parse_nb201(text: str) -> tuple[str, ...]:
    """Return the operations on the six edges of a cell, `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`.

    Raises ValueError with the position and what was expected there.
    """
    operations: list[str] = []
    position = 0
    for target in (1, 2, 3):
        position = _expect(text, position, "|" if target == 1 else "+|")
        for source in range(target):
            match = _OPERATION.match(text, position)
            if match is None:
                raise _malformed(text, position, f"an operation and ~{source}")
            try:
                check_known("operation", match[1], NB201_OPS)
            except ValueError as error:
                raise InputError(f"NAS-Bench-201 cell {_shortened(text)} at position {position}: {error}") from error
            if match[2] != str(source):
                raise _malformed(text, match.start(2), f"the input node {source}")
            operations.append(match[1])
            position = _expect(text, match.end(), "|")
    if position < len(text):
        raise _malformed(text, position, "the end")
    return tuple(operations)


def nb201_text(operations: Sequence[str]) -> str:
    """Return the string of a cell from the operations on its six edges."""
    parts = iter(operations)
    nodes = ["".join(f"{next(parts)}~{source}|" for source in range(target)) for target in (1, 2, 3)]
    return "+".join(f"|{node}" for node in nodes)


def _expect(text: str, position: int, mark: str) -> int:
    if not text.startswith(mark, position):
        raise _malformed(text, position, repr(mark))
    return position + len(mark)


def _malformed(text: str, position: int, expected: str) -> InputError:
    seen = repr(text[position : position + 12]) if position < len(text) else "the end"
    return InputError(f"NAS-Bench-201 cell {_shortened(text)} has {seen} at position {position}; expected {expected}")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


class ActivatedConvolution(nn.Module):
    """ReLU, convolution, norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, (kernel - 1) // 2, bias=False)
        self.op = nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Zero(nn.Module):
    """Zero times the input, so that an infinity stays visible as NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Cell(nn.Module):
    """Four nodes; each is the sum of the operations on the nodes before it, and the last one is the output."""

    def __init__(self, operations: Sequence[str], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_operation(name, width) for name in operations)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        layers = iter(self.layers)
        for target in (1, 2, 3):
            value = next(layers)(nodes[0])
            for source in range(1, target):
                value = value + next(layers)(nodes[source])
            nodes.append(value)
        return nodes[3]


def _operation(name: str, width: int) -> nn.Module:
    match name:
        case "none":
            return Zero()
        case "skip_connect":
            return nn.Identity()
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        case _:
            return ActivatedConvolution(width, width, 3 if name == "nor_conv_3x3" else 1)


class Reduction(nn.Module):
    """Residual block of stride 2 whose shortcut is a mean of 2x2 pixels and a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv_a = ActivatedConvolution(channels_in, channels_out, 3, 2)
        self.conv_b = ActivatedConvolution(channels_out, channels_out, 3)
        # an odd size is rounded up, as the convolution does
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.downsample = nn.Sequential(pool, nn.Conv2d(channels_in, channels_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


NB201_WINNERS = {
    "diswot": "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|",
    "diswot_sp": "|nor_conv_1x1~0|+|nor_conv_3x3~0|none~1|+|nor_conv_3x3~0|skip_connect~1|nor_conv_3x3~2|",
    "diswot_ss": "|skip_connect~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|",
    "rminas": "|nor_conv_1x1~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|",
    "ea": "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|",
    "nwot": "|nor_conv_1x1~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_1x1~2|",
    "zen": "|skip_connect~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|skip_connect~1|nor_conv_3x3~2|",
    "darts": nb201_text(["skip_connect"] * 6),
    "enas": "|skip_connect~0|+|avg_pool_3x3~0|skip_connect~1|+|avg_pool_3x3~0|skip_connect~1|skip_connect~2|",
    "gdas": "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
}


class NasBench201Network(StagedClassifier):
    """Stem, `cells` cells of `width` channels, reduction, cells of 2 `width`, reduction, cells of 4 `width`.

    `arch` is the string of the cell. The maps of the stages are the last cells of the three groups.
    """

    classifier_name: ClassVar[str] = "classifier"

    def __init__(
        self,
        arch: str = NB201_WINNERS["diswot"],
        width: int = 16,
        cells: int = 5,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check(1 <= width <= 512, "width", width, "from 1 to 512")
        check(1 <= cells <= 64, "cells", cells, "from 1 to 64")
        # six convolutions of 3x3, in cells of three widths
        check_weights("width", width, 54 * cells * (1 + 4 + 16) * width**2)
        operations = parse_nb201(arch)
        self.arch, self.num_cells = nb201_text(operations), cells
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        for group in range(3):
            channels = width * 2**group
            if group:
                self.cells.append(Reduction(channels // 2, channels))
            self.cells.extend(Cell(operations, channels) for _ in range(cells))
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * width), nn.ReLU())
        self._ends = tuple((cells + 1) * (group + 1) - 1 for group in range(3))
        groups = ((f"cells.{end - 1}", width * 2**group, 2**group) for group, end in enumerate(self._ends))
        info = stage_info(("stem", width, 1), *groups)
        self._finish(info, 4 * width, **head)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        if stage == 0:
            return self.stem(x)
        for index in range(self._ends[stage - 2] if stage > 1 else 0, self._ends[stage - 1]):
            x = self.cells[index](x)
        return x

    def forward_last(self, x: Tensor) -> Tensor:
        return self.lastact(x)

    def forward_maps(self, x: Tensor, *, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return [stem, every cell and reduction, pooled] and the logits; cells end without an activation."""
        check_images(x)
        maps = [self.stem(x)]
        for cell in self.cells:
            maps.append(cell(maps[-1]))
        return self._with_head(maps, maps[-1])

    def forward_group_maps(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return [last cell of the first group, of the second, activated map before pooling, pooled] and the logits.

        DisWOT's scores of this space are those of the last two.
        """
        check_images(x)
        first = self.forward_stage(self.stem(x), 1)
        second = self.forward_stage(first, 2)
        last = self.forward_last(self.forward_stage(second, 3))
        pooled = last.mean((2, 3))
        return [first, second, last, pooled], self.get_classifier()(pooled)


_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nb201": ("NAS-Bench-201 network of the cell `arch`, by default DisWOT's.", {"width": 16, "cells": 5}),
    **{
        f"nb201_{name}": (f"NAS-Bench-201 network of the cell that {name} found: {arch}.", {"arch": arch})
        for name, arch in NB201_WINNERS.items()
    },
}
default_cfgs = generate_default_cfgs({name: network_cfg("stem.0", "classifier") for name in _VARIANTS})
register_variants(__name__, NasBench201Network, _VARIANTS)
