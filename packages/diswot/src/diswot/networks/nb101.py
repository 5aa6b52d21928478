"""NAS-Bench-101: stacks of one cell, a small graph of convolutions and pooling (Ying et al. 2019; section 3.3)."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.nb101_cell import NB101Cell
from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_weights
from diswot.networks.staged import HeadOptions, StagedClassifier, check_images, stage_info
from visionkernels.checks import check

__all__ = ["NasBench101Network"]

# of the benchmark's code, taken as PyTorch understands it: running statistics are nearly those of the last batch
_OUTER_MOMENTUM = 0.997

# the Inception-like cell that the benchmark is introduced with
_INCEPTION = (
    (0, 1, 1, 1, 0, 1, 0),
    (0, 0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 1, 0, 0),
    (0, 0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 0, 0, 0),
)
_INCEPTION_OPS = (
    "input",
    "conv1x1-bn-relu",
    "conv3x3-bn-relu",
    "conv3x3-bn-relu",
    "conv3x3-bn-relu",
    "maxpool3x3",
    "output",
)


class ConvBnRelu(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, momentum: float = 0.1) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2, bias=False)
        self.conv_bn_relu = nn.Sequential(convolution, nn.BatchNorm2d(channels_out, momentum=momentum), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_bn_relu(x)


class Conv3x3(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3x3 = ConvBnRelu(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3x3(x)


class Conv1x1(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1x1 = ConvBnRelu(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


class Unused(nn.Module):
    """Holds the place of a vertex without operation, with the number that checkpoints have there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(0.0))


def _vertex(op: str, channels: int) -> nn.Module:
    match op:
        case "conv3x3-bn-relu":
            return Conv3x3(channels)
        case "conv1x1-bn-relu":
            return Conv1x1(channels)
        case _:
            return nn.MaxPool2d(3, stride=1, padding=1)


class GraphCell(nn.Module):
    """A cell: the output concatenates the vertices that lead to it, and adds the projected input where that does.

    A vertex sums the vertices that lead to it, cut to its channels, and the input under a projection of its own.
    """

    def __init__(self, cell: NB101Cell, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.register_buffer("dev_param", torch.empty(0))
        self.vertex_channels = cell.vertex_channels(channels_in, channels_out)
        self._sources = [
            [source for source in range(vertex) if cell.matrix[source][vertex]] for vertex in range(len(cell.ops))
        ]
        operations = [_vertex(*vertex) for vertex in zip(cell.ops[1:-1], self.vertex_channels[1:-1], strict=True)]
        self.vertex_op = nn.ModuleList([Unused(), *operations])
        self.input_op = nn.ModuleList(
            ConvBnRelu(channels_in, width, 1, momentum=_OUTER_MOMENTUM) if 0 in sources else Unused()
            for width, sources in zip(self.vertex_channels, self._sources, strict=True)
        )
        # one module under two names, as in checkpoints; the later name is loaded last
        self.last_inop = self.input_op[-1]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for vertex in range(1, len(self._sources) - 1):
            width = self.vertex_channels[vertex]
            terms = [values[source][:, :width] for source in self._sources[vertex] if source]
            if 0 in self._sources[vertex]:
                terms.append(self.input_op[vertex](x))
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            values.append(self.vertex_op[vertex](total))
        joined = [values[source] for source in self._sources[-1] if source]
        if not joined:
            return self.last_inop(x)
        output = torch.cat(joined, 1) if len(joined) > 1 else joined[0]
        return output + self.last_inop(x) if 0 in self._sources[-1] else output


class NasBench101Network(StagedClassifier):
    """Stem of `stem_channels`, `stacks` stacks of `cells` cells; between stacks maps are halved and channels doubled.

    The cell is the graph of `matrix` and `ops`, without vertices that are on no path from input to output.
    """

    classifier_name: ClassVar[str] = "classifier"

    def __init__(
        self,
        matrix: Sequence[Sequence[int]] = _INCEPTION,
        ops: Sequence[str] = _INCEPTION_OPS,
        stem_channels: int = 128,
        stacks: int = 3,
        cells: int = 3,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check(1 <= stacks <= 5, "stacks", stacks, "from 1 to 5")
        check(1 <= cells <= 32, "cells", cells, "from 1 to 32")
        check(1 <= stem_channels <= 512, "stem_channels", stem_channels, "from 1 to 512")
        self.cell = NB101Cell.pruned(matrix, ops)
        widths = [stem_channels * 2**stack for stack in range(stacks)]
        check_weights("stem_channels", stem_channels, sum(cells * self.cell.count_weights(w, w) for w in widths))
        stem = ConvBnRelu(in_chans, stem_channels, 3, momentum=_OUTER_MOMENTUM)
        self.layers = nn.ModuleList([stem])
        channels, stages = stem_channels, [("layers.0", stem_channels, 1)]
        for stack, width in enumerate(widths):
            if stack:
                self.layers.append(nn.MaxPool2d(2))
            for _ in range(cells):
                self.layers.append(GraphCell(self.cell, channels, width))
                channels = width
            stages.append((f"layers.{len(self.layers) - 1}", width, 2**stack))
        self._ends = tuple(int(name.removeprefix("layers.")) + 1 for name, _, _ in stages)
        info = stage_info(*stages)
        self._finish(info, channels, **head)
        self._init_weights()

    def _init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, 0, (2 / fan_out) ** 0.5)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        for index in range(self._ends[stage - 1] if stage else 0, self._ends[stage]):
            x = self.layers[index](x)
        return x

    def forward_maps(self, x: Tensor, *, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return [stem, every cell and pooling, pooled] and the logits; `preact` changes nothing."""
        check_images(x)
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return self._with_head(maps, x)

    def forward_cell_maps(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return [every cell, pooled] and the logits; DisWOT's scores of this space are those of the last two."""
        maps, logits = self.forward_maps(x)
        cells = [value for value, layer in zip(maps, self.layers, strict=False) if isinstance(layer, GraphCell)]
        return [*cells, maps[-1]], logits


_VARIANTS = {"nb101": ("NAS-Bench-101 network of the cell `matrix`, `ops`.", {"stem_channels": 128})}
default_cfgs = generate_default_cfgs({name: network_cfg("layers.0.conv_bn_relu.0", "classifier") for name in _VARIANTS})
register_variants(__name__, NasBench101Network, _VARIANTS)
