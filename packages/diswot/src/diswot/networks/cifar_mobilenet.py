"""MobileNetV2 of half the width for 32 x 32 pixels (Sandler et al. 2018), with ReLU in place of ReLU6."""

from typing import ClassVar, Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.staged import HeadOptions, StagedClassifier, init_convolutions, stage_info
from visionkernels.checks import check

__all__ = ["CifarMobileNetV2", "InvertedResidual"]

# expansion, channels at full width, blocks, stride of the first
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# the entries of `blocks` that make a stage of `forward_maps`
_GROUPS = ((0, 2), (2, 3), (3, 5), (5, 7))


class InvertedResidual(nn.Module):
    """Expansion by 1x1, depth-wise 3x3, projection by 1x1; the input is added where shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.adds_shortcut = stride == 1 and channels_in == channels_out
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_shortcut else self.conv(x)


class CifarMobileNetV2(StagedClassifier):
    """MobileNetV2: a stem of stride 2, inverted residuals in four stages, 1x1 convolution to 1280 channels.

    The maps of the stages end in a projection without activation, so that `preact` changes nothing.
    """

    classifier_name: ClassVar[str] = "classifier.0"

    def __init__(
        self,
        width: float = 0.5,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check(0 < width <= 4, "width", width, "above 0, up to 4")
        channels = [max(1, int(32 * width)), *(max(1, int(full * width)) for _, full, _, _ in _STAGES)]
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        for index, (expansion, _, depth, stride) in enumerate(_STAGES):
            narrow, wide = channels[index], channels[index + 1]
            first = InvertedResidual(narrow, wide, stride, expansion)
            others = [InvertedResidual(wide, wide, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(nn.Sequential(first, *others))
        self.conv2 = nn.Sequential(nn.Conv2d(channels[-1], 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Identity())
        info = stage_info(
            ("conv1", channels[0], 2),
            ("blocks.1", channels[2], 2),
            ("blocks.2", channels[3], 4),
            ("blocks.4", channels[5], 8),
            ("blocks.6", channels[7], 16),
        )
        self._finish(info, 1280, **head)
        init_convolutions(self)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        if stage == 0:
            return self.conv1(x)
        for index in range(*_GROUPS[stage - 1]):
            x = self.blocks[index](x)
        return x

    def forward_last(self, x: Tensor) -> Tensor:
        return self.conv2(x)


_VARIANTS = {"cifar_mobilenetv2": ("MobileNetV2 of half the width: 812,836 parameters.", {"width": 0.5})}
default_cfgs = generate_default_cfgs({name: network_cfg("conv1.0", "classifier.0") for name in _VARIANTS})
register_variants(__name__, CifarMobileNetV2, _VARIANTS)
