"""VGG networks for 32 or 64 pixels a side: five stages of 3x3 convolutions with BatchNorm, one Linear at the end."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch.fx
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.sizes import check_sizes, check_weights
from diswot.networks.staged import BlockReLU, HeadOptions, StagedClassifier, init_convolutions, stage_info

__all__ = ["CifarVGG"]

_WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(StagedClassifier):
    """VGG whose stages have `depths` convolutions (with bias) each; the first stage is the stem of `forward_maps`."""

    classifier_name: ClassVar[str] = "classifier"

    def __init__(
        self,
        depths: Sequence[int] = (1, 1, 1, 1, 1),
        widths: Sequence[int] = _WIDTHS,
        *,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        depths, widths = check_sizes("depths", depths, 5, 64), check_sizes("widths", widths, 5, 4096)
        check_weights("depths", depths, sum(9 * depth * width**2 for depth, width in zip(depths, widths, strict=True)))
        channels = in_chans
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            layers: list[nn.Module] = []
            for index in range(depth):
                layers += [nn.ReLU()] if index else []
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                channels = width
            setattr(self, f"block{stage}", nn.Sequential(*layers))
            setattr(self, f"relu{stage}", BlockReLU())
        reductions = (1, 2, 4, 8, 8)
        info = stage_info(*((f"relu{stage}", widths[stage], reductions[stage]) for stage in range(5)))
        self._finish(info, widths[-1], **head)
        init_convolutions(self)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        return self.forward_stage_preact(x, stage)[1]

    def forward_stage_preact(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        before = getattr(self, f"block{stage}")(_pool_before(stage, x))
        return before, getattr(self, f"relu{stage}")(before)


# fx cannot trace the condition
@torch.fx.wrap
def _pool_before(stage: int, x: Tensor) -> Tensor:
    # before the last stage, 64 pixels have become 8, and only they are pooled
    return F.max_pool2d(x, 2) if stage in (1, 2, 3) or (stage == 4 and x.shape[-2] == 8) else x


_DEPTHS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_VARIANTS = {f"cifar_vgg{n}": (f"VGG{n} with BatchNorm and one Linear.", {"depths": _DEPTHS[n]}) for n in _DEPTHS}
default_cfgs = generate_default_cfgs({name: network_cfg("block0.0", "classifier") for name in _VARIANTS})
register_variants(__name__, CifarVGG, _VARIANTS)
