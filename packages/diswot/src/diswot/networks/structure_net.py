"""Networks of structure strings as timm models: `structure_net` and the named ones of the paper (section 3.5)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.networks.registration import network_cfg, register_variants
from diswot.networks.staged import HeadOptions, StagedClassifier, stage_info
from diswot.networks.structure import Convolution, Structure, SuperBlock, parse_structure
from visionkernels.checks import check

__all__ = ["CIFAR_STRUCTURE", "IMAGENET_STRUCTURE", "NAMED_STRUCTURES", "StructureNet"]

_EPS = 1e-3


class NetBlock(nn.Module):
    """A layer under the name `netblock`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.netblock = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.netblock(x)


def _layers(convolutions: Sequence[Convolution], *, ends_activated: bool) -> nn.ModuleList:
    """Convolution, norm and ReLU of each; the last ReLU where `ends_activated`."""
    layers: list[nn.Module] = []
    for layer in convolutions:
        convolution = nn.Conv2d(
            layer.channels_in, layer.channels_out, layer.kernel, layer.stride, (layer.kernel - 1) // 2, bias=False
        )
        layers += [NetBlock(convolution), NetBlock(nn.BatchNorm2d(layer.channels_out, eps=_EPS)), nn.ReLU()]
    return nn.ModuleList(layers if ends_activated else layers[:-1])


class ResidualBranch(nn.Module):
    """Convolutions beside a shortcut; `stride` gives the shortcut a 1x1 convolution with bias, and a norm."""

    def __init__(self, convolutions: Sequence[Convolution], stride: int | None) -> None:
        super().__init__()
        self.module_list = _layers(convolutions, ends_activated=False)
        self.proj: nn.Sequential | None = None
        if stride is not None:
            channels_in, channels_out = convolutions[0].channels_in, convolutions[-1].channels_out
            self.proj = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out, eps=_EPS)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.module_list:
            y = layer(y)
        return y + (x if self.proj is None else self.proj(x))


class BlockChain(nn.Module):
    """The layers of one super block; a ReLU is the last."""

    def __init__(self, block: SuperBlock) -> None:
        super().__init__()
        branches = block.branches()
        if block.is_residual:
            layers: list[nn.Module] = []
            for index, branch in enumerate(branches):
                # the first branch has a projection even where its shapes agree
                layers += [ResidualBranch(branch, None if index else block.stride), nn.ReLU()]
            self.module_list = nn.ModuleList(layers)
        else:
            self.module_list = _layers([layer for branch in branches for layer in branch], ends_activated=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_pair(x)[1]

    def forward_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map before and after the last ReLU."""
        before = x
        for layer in self.module_list:
            before, x = x, layer(x)
        return before, x


class StructureNet(StagedClassifier):
    """The network of a structure string; each super block is a stage, the first one the stem of `forward_maps`.

    The first block takes `in_chans` channels whatever the string says. Block i of n drops its outputs with probability
    `block_drop_rate` * i / n in training.
    """

    classifier_name: ClassVar[str] = "fc_linear.netblock"

    def __init__(
        self,
        structure: str,
        *,
        block_drop_rate: float = 0.0,
        in_chans: int = 3,
        **head: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        check(0 <= block_drop_rate < 1, "block_drop_rate", block_drop_rate, "from 0 to below 1")
        first, *others = parse_structure(structure).blocks
        self.structure = Structure((replace(first, channels_in=in_chans), *others))
        self.block_drop_rate = block_drop_rate
        self.module_list = nn.ModuleList(BlockChain(block) for block in self.structure.blocks)
        self.fc_linear = NetBlock(nn.Identity())
        stages, reduction = [], 1
        for index, block in enumerate(self.structure.blocks):
            reduction *= block.stride
            stages.append((f"module_list.{index}", block.channels_out, reduction))
        width = self.structure.blocks[-1].channels_out
        self._finish(stage_info(*stages), width, **head)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        return self._drop(self.module_list[stage](x), stage)

    def chain(self) -> list[nn.Module]:
        return [] if self.block_drop_rate else list(self.module_list)

    def forward_stage_preact(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        chain: Any = self.module_list[stage]
        before, after = chain.forward_pair(x)
        return before, self._drop(after, stage)

    def _drop(self, x: Tensor, stage: int) -> Tensor:
        return F.dropout(x, self.block_drop_rate * stage / self.num_stages, self.training)


def _named(text: str) -> str:
    """Write out a structure that leaves out "Super", and "Res" for all but plain convolutions."""
    blocks = (f"Super{'Conv' if 'BNRELU' in block else 'Res'}{block}" for block in text.split())
    return "".join(blocks)


CIFAR_STRUCTURE = _named(
    "K3BNRELU(3,64,1,1) K1K5K1(64,168,1,16,3) K1K3K1(168,80,2,32,4) K1K5K1(80,112,2,16,3) K1K5K1(112,144,1,24,3) "
    "K1K3K1(144,32,2,40,1) K1BNRELU(32,512,1,1)"
)
IMAGENET_STRUCTURE = _named(
    "K7BNRELU(3,64,2,1) K3K3(64,64,2,64,2) K3K3(64,128,2,128,2) K3K3(128,256,2,256,2) K3K3(256,512,2,512,2)"
)
NAMED_STRUCTURES = {
    "zen_cifar_res32_05m": CIFAR_STRUCTURE,
    "zen_cifar_res32_1m": _named(
        "K3BNRELU(3,88,1,1) K1K7K1(88,120,1,16,1) K1K7K1(120,192,2,16,3) K1K5K1(192,224,1,24,4) K1K5K1(224,96,2,24,2) "
        "K1K3K1(96,168,2,40,3) K1K3K1(168,112,1,48,3) K1BNRELU(112,512,1,1)"
    ),
    "zen_cifar_res32_2m": _named(
        "K3BNRELU(3,32,1,1) K1K5K1(32,120,1,40,1) K1K5K1(120,176,2,32,3) K1K7K1(176,272,1,24,3) K1K3K1(272,176,1,56,3) "
        "K1K3K1(176,176,1,64,4) K1K5K1(176,216,2,40,2) K1K3K1(216,72,2,56,2) K1BNRELU(72,512,1,1)"
    ),
    "diswot_imagenet_res18_7m": _named(
        "K3BNRELU(3,256,2,1) K5K5(256,24,2,16,1) K1K7K1(24,720,2,80,1) K3K3(720,192,2,16,1) K7K7(192,328,2,64,3) "
        "K1BNRELU(328,208,1,1)"
    ),
    "diswot_imagenet_res18_8m": _named(
        "K7BNRELU(3,64,2,1) K3K3(64,64,2,64,2) K3K3(64,128,2,128,2) K3K3(128,256,2,256,2) K5K5(256,344,2,344,1)"
    ),
    "diswot_imagenet_res18_11m": _named(
        "K7BNRELU(3,96,2,1) K3K3(96,64,2,64,2) K3K3(64,128,2,128,2) K3K3(128,256,2,256,2) K3K3(256,512,2,512,2)"
    ),
    "diswot_imagenet_res18_11_6m": IMAGENET_STRUCTURE,
    "diswot_imagenet_res18_13m": _named(
        "K3BNRELU(3,48,2,1) K5K5(48,48,2,80,1) K5K5(48,216,2,24,1) K3K3(216,496,2,128,3) K7K7(496,256,2,80,3) "
        "K1BNRELU(256,2048,1,1)"
    ),
}

_VARIANTS = {"structure_net": ("Network of the string `structure`.", {"structure": CIFAR_STRUCTURE})}
_VARIANTS |= {name: (f"Network of {text}.", {"structure": text}) for name, text in NAMED_STRUCTURES.items()}


def _cfg(name: str) -> dict[str, Any]:
    first_conv, classifier = "module_list.0.module_list.0.netblock", "fc_linear.netblock"
    if "imagenet" in name:
        return network_cfg(first_conv, classifier, size=224, num_classes=1000)
    return network_cfg(first_conv, classifier)


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _VARIANTS})
register_variants(__name__, StructureNet, _VARIANTS)
