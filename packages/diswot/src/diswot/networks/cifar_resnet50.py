"""ResNet-50 of bottlenecks for 32 x 32 pixels: a 3x3 stem of stride 1 and no pooling before the stages."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_sizes, check_weights
from diswot.networks.staged import BlockReLU, HeadOptions, LayeredClassifier, init_convolutions, stage_info

__all__ = ["Bottleneck", "CifarBottleneckResNet"]

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3 (strided), 1x1 to four times `width`; a shortcut is added."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = width * _EXPANSION
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.last_relu = BlockReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last_relu(self.preactivate(x))

    def preactivate(self, x: Tensor) -> Tensor:
        """Return the output before the last ReLU."""
        y = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(y)) + self.shortcut(x)


class CifarBottleneckResNet(LayeredClassifier):
    """ResNet of four stages of `depths` bottlenecks, `width` times 1, 2, 4 and 8 wide inside."""

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        depths, (width,) = check_sizes("depths", depths, 4, 256), check_sizes("width", (width,), 1, 512)
        check_weights("depths", depths, sum(17 * depth * (width * 2**i) ** 2 for i, depth in enumerate(depths)))
        self._set_stem(in_chans, width, kernel=3)
        channels, stages = width, [("relu", width, 1)]
        for stage, depth in enumerate(depths, 1):
            inner = width * 2 ** (stage - 1)
            blocks = []
            for index in range(depth):
                blocks.append(Bottleneck(channels, inner, 2 if stage > 1 and index == 0 else 1))
                channels = inner * _EXPANSION
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            stages.append((f"layer{stage}", channels, 2 ** (stage - 1)))
        info = stage_info(*stages)
        self._finish(info, channels, **head)
        init_convolutions(self)


_VARIANTS = {"cifar_resnet50": ("ResNet-50: 23.7 M parameters.", {"depths": (3, 4, 6, 3)})}
default_cfgs = generate_default_cfgs({name: network_cfg("conv1", "linear") for name in _VARIANTS})
register_variants(__name__, CifarBottleneckResNet, _VARIANTS)
