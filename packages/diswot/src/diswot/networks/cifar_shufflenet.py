"""ShuffleNets for 32 x 32 pixels: V1 (Zhang et al. 2018) of three groups, V2 (Ma et al. 2018) of width 1."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_sizes, check_weights
from diswot.networks.staged import BlockReLU, HeadOptions, LayeredClassifier, init_convolutions, stage_info
from visionkernels.checks import check

__all__ = ["CifarShuffleV1", "CifarShuffleV2", "DownUnit", "ShuffleUnit", "SplitUnit"]

_STEM = 24


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """V1: grouped 1x1, shuffle, depth-wise 3x3, grouped 1x1; added to the input, or beside it at stride 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        width = channels_out - channels_in if stride == 2 else channels_out
        hidden = width // 4
        # the stem is too narrow to be cut into groups
        self.groups = 1 if channels_in == _STEM else groups
        self.conv1 = nn.Conv2d(channels_in, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.last_relu = BlockReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last_relu(self.preactivate(x))

    def preactivate(self, x: Tensor) -> Tensor:
        """Return the output before the last ReLU."""
        y = shuffle_channels(self.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else y + x


class SplitUnit(nn.Module):
    """V2: the second half of the channels through 1x1, depth-wise 3x3 and 1x1; then halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.last_relu = BlockReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_pair(x)[1]

    def forward_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output before the last ReLU of the right branch, and after it, channels interleaved in both."""
        left, right = x.chunk(2, 1)
        right = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(right)))))
        return _join(left, left, self.bn3(self.conv3(right)), self.last_relu)


class DownUnit(nn.Module):
    """V2 at stride 2: both branches from all channels, each to half of `channels_out`."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, 2, 1, groups=channels_in, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv2 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.last_relu = BlockReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_pair(x)[1]

    def forward_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output before the last ReLU of both branches, and after it."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        return _join(left, self.last_relu(left), self.bn5(self.conv5(right)), self.last_relu)


def _join(before: Tensor, after: Tensor, right: Tensor, last_relu: nn.Module) -> tuple[Tensor, Tensor]:
    """Put the left branch, before and after its activation, beside the right one."""
    return (
        shuffle_channels(torch.cat([before, right], 1), 2),
        shuffle_channels(torch.cat([after, last_relu(right)], 1), 2),
    )


class CifarShuffleV1(LayeredClassifier):
    """ShuffleNet V1: a 1x1 stem of 24 channels and three stages of `depths` units, `widths` channels."""

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self,
        depths: Sequence[int] = (4, 8, 4),
        widths: Sequence[int] = (240, 480, 960),
        *,
        groups: int = 3,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        depths, widths = check_sizes("depths", depths, 3, 64), check_sizes("widths", widths, 3, 4096)
        _check_groups(widths, groups)
        self._set_stem(in_chans, _STEM, kernel=1)
        check_weights("depths", depths, sum(depth * width**2 for depth, width in zip(depths, widths, strict=True)))
        channels = _STEM
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            units = [
                ShuffleUnit(width if index else channels, width, 1 if index else 2, groups) for index in range(depth)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*units))
            channels = width
        info = stage_info(
            ("relu", _STEM, 1), ("layer1", widths[0], 2), ("layer2", widths[1], 4), ("layer3", widths[2], 8)
        )
        self._finish(info, channels, **head)
        init_convolutions(self)


def _check_groups(widths: Sequence[int], groups: int) -> None:
    for narrow, wide in zip((_STEM, *widths), widths, strict=False):
        for width in (wide, wide - narrow):
            holds = wide > narrow and width // 4 > 0 and width % groups == 0 and (width // 4) % groups == 0
            check(groups >= 1 and holds, "widths", tuple(widths), f"growing from {_STEM}, in multiples of {4 * groups}")


class CifarShuffleV2(LayeredClassifier):
    """ShuffleNet V2: a 1x1 stem of 24 channels, three stages of a down unit and `depths` more, 1x1 to 1024 channels."""

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self,
        depths: Sequence[int] = (3, 7, 3),
        widths: Sequence[int] = (116, 232, 464),
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        depths, widths = check_sizes("depths", depths, 3, 64), check_sizes("widths", widths, 3, 4096)
        check(not any(width % 2 for width in widths), "widths", widths, "even")
        self._set_stem(in_chans, _STEM, kernel=1)
        check_weights("depths", depths, sum(depth * width**2 for depth, width in zip(depths, widths, strict=True)))
        channels = _STEM
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            units = (SplitUnit(width) for _ in range(depth))
            setattr(self, f"layer{stage}", nn.Sequential(DownUnit(channels, width), *units))
            channels = width
        self.conv2 = nn.Conv2d(channels, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        info = stage_info(
            ("relu", _STEM, 1), ("layer1", widths[0], 2), ("layer2", widths[1], 4), ("layer3", widths[2], 8)
        )
        self._finish(info, 1024, **head)
        init_convolutions(self)

    def forward_last(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(x)))

    def forward_block_preact(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = block.forward_pair(x)
        return pair


_V1 = {"cifar_shufflenetv1": ("ShuffleNet V1, 3 groups: 949,258 parameters.", {"groups": 3})}
_V2 = {"cifar_shufflenetv2": ("ShuffleNet V2, width 1: 1,355,528 parameters.", {"depths": (3, 7, 3)})}
default_cfgs = generate_default_cfgs({name: network_cfg("conv1", "linear") for name in (*_V1, *_V2)})
register_variants(__name__, CifarShuffleV1, _V1)
register_variants(__name__, CifarShuffleV2, _V2)
