"""Wide ResNets for 32 x 32 pixels: pre-activation blocks, whose first norm and ReLU feed the shortcut too."""

from typing import Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_weights
from diswot.networks.staged import HeadOptions, StagedClassifier, batch_norm_output, init_convolutions, stage_info
from visionkernels.checks import check

__all__ = ["PreActivationBlock", "WideResNet"]


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, added to the shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.convShortcut: nn.Module | None = None
        if channels_in != channels_out:
            self.convShortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class BlockGroup(nn.Module):
    """The blocks of a stage, under `layer`."""

    def __init__(self, depth: int, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        blocks = [
            PreActivationBlock(channels_out if index else channels_in, channels_out, 1 if index else stride)
            for index in range(depth)
        ]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(StagedClassifier):
    """Wide ResNet of `depth` = 6n + 4 layers, `widen` times as wide as a ResNet of 16, 32 and 64 channels.

    The maps of the stages are sums of residuals; the norm and ReLU after the last one come with `forward_features`.
    With `preact`, a stage's map is under the norm that follows it.
    """

    def __init__(
        self,
        depth: int = 16,
        widen: int = 1,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check(depth % 6 == 4 and 10 <= depth <= 1000, "depth", depth, "6n + 4, from 10 to 1000")
        check(1 <= widen <= 64, "widen", widen, "from 1 to 64")
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        check_weights("widen", widen, sum(3 * (depth - 4) * width**2 for width in widths[1:]))
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            group = BlockGroup((depth - 4) // 6, widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            setattr(self, f"block{stage}", group)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        info = stage_info(
            ("conv1", widths[0], 1), ("block1", widths[1], 1), ("block2", widths[2], 2), ("block3", widths[3], 4)
        )
        self._finish(info, widths[3], **head)
        init_convolutions(self)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        return self.conv1(x) if stage == 0 else getattr(self, f"block{stage}")(x)

    def forward_last(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(x))

    def forward_stage_preact(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        x = self.forward_stage(x, stage)
        following = self.bn1 if stage == 3 else getattr(self, f"block{stage + 1}").layer[0].bn1
        return batch_norm_output(following, x), x


_VARIANTS = {
    "cifar_wrn_16_1": ("Wide ResNet of 16 layers, factor 1.", {"depth": 16, "widen": 1}),
    "cifar_wrn_16_2": ("Wide ResNet of 16 layers, factor 2: 703,284 parameters.", {"depth": 16, "widen": 2}),
    "cifar_wrn_40_1": ("Wide ResNet of 40 layers, factor 1.", {"depth": 40, "widen": 1}),
    "cifar_wrn_40_2": ("Wide ResNet of 40 layers, factor 2.", {"depth": 40, "widen": 2}),
}
default_cfgs = generate_default_cfgs({name: network_cfg("conv1", "fc") for name in _VARIANTS})
register_variants(__name__, WideResNet, _VARIANTS)
