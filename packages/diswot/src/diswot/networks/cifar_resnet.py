"""ResNets for 32 x 32 pixels, and the space S0 of their depths (section 3.1).

Three stages of basic blocks follow a 3x3 stem; `s0_713` has 7, 1 and 3 blocks of 16, 32 and 64 channels. The other
networks are those that students and teachers are taken from: `cifar_resnet20`, `cifar_resnet32x4`, ...
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal, Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_sizes, check_weights
from diswot.networks.staged import BlockReLU, HeadOptions, LayeredClassifier, init_convolutions, stage_info
from visionkernels.checks import check_choice

__all__ = ["S0_DEPTHS", "BasicBlock", "BlockKind", "CifarResNet"]

BlockKind = Literal["basic", "zen"]

S0_DEPTHS = (1, 3, 5, 7)
_WIDTHS = (16, 16, 32, 64)
# 110 layers have 18 blocks a stage; what is far beyond is a mistake
_MAX_DEPTH, _MAX_WIDTH = 256, 4096


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C, H, W] to [B, C', H / stride, W / stride].

    The block of kind "zen" leaves the shortcut out, but has its modules.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, *, kind: BlockKind = "basic") -> None:
        super().__init__()
        self.adds_shortcut = kind == "basic"
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))
        self.last_relu = BlockReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last_relu(self.preactivate(x))

    def preactivate(self, x: Tensor) -> Tensor:
        """Return the output before the last ReLU."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.adds_shortcut:
            y = y + (x if self.downsample is None else self.downsample(x))
        return y


class CifarResNet(LayeredClassifier):
    """ResNet of basic blocks: takes images [B, in_chans, H, W], returns logits [B, num_classes].

    `depths` counts the blocks of the three stages, `widths` gives the channels of the stem and of the stages.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = _WIDTHS,
        *,
        block: BlockKind = "basic",
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check_choice("block", block, BlockKind)
        self.depths = check_sizes("depths", depths, 3, _MAX_DEPTH)
        widths = check_sizes("widths", widths, 4, _MAX_WIDTH)
        weights = sum(18 * depth * width**2 for depth, width in zip(self.depths, widths[1:], strict=True))
        check_weights("depths", self.depths, weights)
        self._set_stem(in_chans, widths[0], kernel=3)
        for stage, depth in enumerate(self.depths, 1):
            blocks = [BasicBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2, kind=block)]
            blocks += [BasicBlock(widths[stage], widths[stage], kind=block) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        info = stage_info(
            ("relu", widths[0], 1), ("layer1", widths[1], 1), ("layer2", widths[2], 2), ("layer3", widths[3], 4)
        )
        self._finish(info, widths[3], **head)
        init_convolutions(self)

    def chain(self) -> list[nn.Module]:
        stages = (getattr(self, f"layer{stage}") for stage in (1, 2, 3))
        return [self.conv1, self.bn1, self.relu, *(block for stage in stages for block in stage)]


_VARIANTS = {
    f"s0_{''.join(map(str, depths))}": (f"S0 network of depths {depths}.", {"depths": depths})
    for depths in product(S0_DEPTHS, repeat=3)
}
_VARIANTS |= {
    f"cifar_resnet{layers}": (f"ResNet of {layers} layers, {(layers - 2) // 6} blocks a stage.", {"depths": (n,) * 3})
    for layers in (8, 14, 20, 32, 44, 56, 110)
    for n in ((layers - 2) // 6,)
}
_VARIANTS |= {
    "cifar_resnet8x4": (
        "ResNet of 8 layers with stages four times as wide: 1.23 M parameters, 177.1 M multiply-adds.",
        {"depths": (1, 1, 1), "widths": (32, 64, 128, 256)},
    ),
    "cifar_resnet32x4": (
        "ResNet of 32 layers with stages four times as wide: 7.43 M parameters, 1083.0 M multiply-adds.",
        {"depths": (5, 5, 5), "widths": (32, 64, 128, 256)},
    ),
}
default_cfgs = generate_default_cfgs({name: network_cfg("conv1", "fc") for name in _VARIANTS})
register_variants(__name__, CifarResNet, _VARIANTS)
