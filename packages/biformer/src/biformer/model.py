"""BiFormer as timm models: four stages of routed attention at strides 4, 8, 16 and 32 (BiFormer, sec. 3.3)."""

# B batch, H W map, C channels, S = n_win

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.fx
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from biformer.attention import BiLevelRoutingAttention, PadMode
from biformer.full_attention import ConvolutionalMixer, FullAttention
from biformer.maps import DataFormat
from visionkernels.checks import InputError, check_choice
from visionkernels.ops import Backend

__all__ = ["BiFormer", "BiFormerBackbone", "BiFormerBlock", "BiFormerSTL"]


class Mlp(nn.Module):
    """Linear, optional 3x3 depth-wise convolution, GELU, Linear on [B, H, W, C], or [B, C, H, W] for "NCHW"."""

    def __init__(self, dim: int, hidden: int, *, use_conv: bool = False, data_format: DataFormat = "NHWC") -> None:
        super().__init__()
        pointwise = nn.Linear if data_format == "NHWC" else partial(nn.Conv2d, kernel_size=1)
        self.fc1 = pointwise(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if use_conv else None
        self.act = nn.GELU()
        self.fc2 = pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.depthwise is not None:
            x = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class BiFormerBlock(nn.Module):
    """Block of position encoding (depth-wise convolution), attention and MLP, on maps in `data_format` (sec. 3.3).

    `topk` chooses the attention: above 0 bi-level routing to that many regions, 0 convolutions (NHWC), -1 full
    attention, -2 full attention with local enhancement (NHWC; the NCHW form has it at -1). `layer_scale_init_value`
    above 0 adds learnt scales to both branches. `pos_conv` is the position encoding's kernel: 3, or 0 for none.
    `pre_norm=False` normalises after each residual instead. `attention` goes to BiLevelRoutingAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        *,
        n_win: int = 7,
        mlp_ratio: float = 4,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        pos_conv: Literal[0, 3] = 3,
        layer_scale_init_value: float = 0,
        pre_norm: bool = True,
        drop_path: float = 0,
        data_format: DataFormat = "NHWC",
        **attention: Any,
    ) -> None:
        super().__init__()
        if pos_conv not in (0, 3):
            raise InputError(f"pos_conv={pos_conv} must be 3, or 0 for none")
        norm = partial(nn.LayerNorm if data_format == "NHWC" else LayerNorm2d, eps=1e-6)
        self.data_format, self.pre_norm = data_format, pre_norm
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if pos_conv else None
        self.norm1 = norm(dim)
        if topk > 0:
            self.attn: nn.Module = BiLevelRoutingAttention(
                dim, num_heads, n_win, topk, side_dwconv=side_dwconv, data_format=data_format, **attention
            )
        else:
            self.attn = _unrouted(dim, topk, side_dwconv, data_format)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), use_conv=mlp_dwconv, data_format=data_format)
        self.gamma1 = self.gamma2 = None
        if layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        """Transform [B, H, W, dim], or [B, dim, H, W] for "NCHW"."""
        if self.pos_embed is not None:
            x = x + (self.pos_embed(x) if self.data_format == "NCHW" else _convolve_nhwc(self.pos_embed, x))
        for norm, branch, gamma in ((self.norm1, self.attn, self.gamma1), (self.norm2, self.mlp, self.gamma2)):
            update = branch(norm(x) if self.pre_norm else x)
            if gamma is not None:
                update = update * (gamma if self.data_format == "NHWC" else gamma[:, None, None])
            x = x + self.drop_path(update)
            if not self.pre_norm:
                x = norm(x)
        return x


def _unrouted(dim: int, topk: int, side_dwconv: int, data_format: DataFormat) -> nn.Module:
    if data_format == "NCHW":
        if topk != -1:
            raise InputError(f"topk={topk} is unknown to the NCHW form; use topk >= 1, or -1 for full attention")
        return FullAttention(dim, side_dwconv=5, data_format="NCHW")
    if topk == 0:
        return ConvolutionalMixer(dim)
    if topk not in (-1, -2):
        raise InputError(f"topk={topk} is unknown; use >= 1, 0 (convolution), -1 (full attention) or -2 (with lepe)")
    return FullAttention(dim, side_dwconv=side_dwconv if topk == -2 else 0)


def _convolve_nhwc(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormer(nn.Module):
    """BiFormer, from images [B, in_chans, H, W] of any size to logits [B, num_classes].

    `depth`, `embed_dim`, `mlp_ratios`, `topks` and `qk_dims` (default `embed_dim`) give one value per stage; there are
    qk_dim // head_dim heads. `auto_pad` pads each layer's map to multiples of `n_win`; without it an indivisible size
    raises. Options of the attention (`pad_mode`, `kv_downsample_mode`, `soft_routing`, `backend`, ...) and of
    the block go on to BiFormerBlock. `drop_path_rate` grows linearly over the blocks. With an `output_stride` of 8 or
    16 the last stages keep the size of their map, and their convolutions are dilated, as DeepLab wants it.
    """

    def __init__(
        self,
        depth: Sequence[int] = (2, 2, 8, 2),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        topks: Sequence[int] = (1, 4, 16, -2),
        *,
        n_win: int = 7,
        head_dim: int = 32,
        qk_dims: Sequence[int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: Literal[8, 16, 32] = 32,
        auto_pad: bool = True,
        pad_mode: PadMode = "official",
        data_format: DataFormat = "NHWC",
        backend: Backend = "auto",
        **block: Any,
    ) -> None:
        super().__init__()
        qk_dims = tuple(embed_dim if qk_dims is None else qk_dims)
        lengths = {"depth": depth, "embed_dim": embed_dim, "mlp_ratios": mlp_ratios, "topks": topks, "qk_dims": qk_dims}
        for name, values in lengths.items():
            if len(values) != 4:
                raise InputError(f"{name}={tuple(values)} has {len(values)} values; give one for each of the 4 stages")
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, embed_dim[-1], embed_dim[-1]
        self.depth, self.data_format, self.grad_checkpointing = tuple(depth), data_format, False
        self.feature_info = [
            {"num_chs": width, "reduction": min(4 * 2**stage, output_stride), "module": f"stages.{stage}"}
            for stage, width in enumerate(embed_dim)
        ]
        rates = iter(drop_path_rate * block / max(1, sum(depth) - 1) for block in range(sum(depth)))
        self.downsample_layers = nn.ModuleList(self._downsample_layers(in_chans, embed_dim))
        self.stages = nn.ModuleList()
        for stage in range(4):
            options = dict(block)
            if topks[stage] > 0:
                options |= {"qk_dim": qk_dims[stage], "auto_pad": auto_pad, "pad_mode": pad_mode, "backend": backend}
            if qk_dims[stage] % head_dim:
                raise InputError(f"qk_dims[{stage}]={qk_dims[stage]} is not divisible by head_dim={head_dim}")
            blocks = [
                BiFormerBlock(
                    embed_dim[stage], qk_dims[stage] // head_dim, topks[stage], n_win=n_win,
                    mlp_ratio=mlp_ratios[stage], drop_path=next(rates), data_format=data_format, **options,
                )
                for _ in range(depth[stage])
            ]  # fmt: skip
            self.stages.append(nn.Sequential(*blocks))
        self.norm: nn.Module = nn.BatchNorm2d(embed_dim[-1])
        self.head = ClassifierHead(embed_dim[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self._dilate(output_stride)
        self.apply(_init_weights)

    def _dilate(self, output_stride: int) -> None:
        """Take the strides beyond `output_stride` away, and dilate what follows so that weights keep their reach."""
        check_choice("output_stride", output_stride, (8, 16, 32))
        dilation = 1
        for stage in range({8: 2, 16: 3, 32: 4}[output_stride], 4):
            (down,) = (layer for layer in self.downsample_layers[stage].children() if isinstance(layer, nn.Conv2d))
            if down.kernel_size != (3, 3):
                raise InputError(f"output_stride={output_stride} needs patches that overlap; use 32")
            down.stride, down.dilation, down.padding = (1, 1), (dilation, dilation), (dilation, dilation)
            dilation *= 2
            for layer in self.stages[stage].modules():
                if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1):
                    layer.dilation = (dilation, dilation)
                    layer.padding = tuple(dilation * (side // 2) for side in layer.kernel_size)

    @staticmethod
    def _downsample_layers(in_chans: int, embed_dim: Sequence[int]) -> list[nn.Sequential]:
        """Return overlapping 3x3 convolutions of stride 2, two of them in the stem."""
        half = embed_dim[0] // 2
        stem = [_stride2(in_chans, half), nn.BatchNorm2d(half), nn.GELU(), _stride2(half, embed_dim[0])]
        layers = [nn.Sequential(*stem, nn.BatchNorm2d(embed_dim[0]))]
        for narrow, wide in pairwise(embed_dim):
            layers.append(nn.Sequential(_stride2(narrow, wide), nn.BatchNorm2d(wide)))
        return layers

    def forward(self, x: Float[Tensor, "batch in_chans height width"]) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_chans, H, W] that are normalised as in `default_cfg`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed map of the last stage, [B, C, H / 32, W / 32]."""
        for stage in range(4):
            x = self.forward_stage(x, stage)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of `forward_features` and classify it; `pre_logits` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Down-sample and transform the output of the previous stage, or the images, to [B, C, H', W']."""
        if stage == 0:
            _check_images(x)
            # channels last throughout: token maps are then views, and depth-wise convolutions fastest
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.downsample_layers[stage](x)
        blocks = self.stages[stage]
        x = x if self.data_format == "NCHW" else x.permute(0, 2, 3, 1)
        x = checkpoint_seq(blocks, x) if self.grad_checkpointing and self.training else blocks(x)
        return x if self.data_format == "NCHW" else x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return stage maps [B, C, H', W'] by timm's protocol; `norm` applies the final norm to the last stage."""
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt={output_fmt!r} is unknown; BiFormer gives 'NCHW'")
        take, last = feature_take_indices(4, indices)
        intermediates = []
        for stage in range(last + 1 if stop_early else len(self.stages)):
            x = self.forward_stage(x, stage)
            if stage in take:
                intermediates.append(self.norm(x) if norm and stage == 3 else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if stage == 3 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the stages in `indices` do not need, by timm's protocol."""
        take, last = feature_take_indices(4, indices)
        self.downsample_layers, self.stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes remove it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, for timm's layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": [(blocks, None), (r"^downsample_layers\.(\d+)", (0,)), (r"^norm", (99999,))],
        }


class BiFormerSTL(BiFormer):
    """BiFormer in the layout of Swin-T, for comparing kinds of attention (sec. 4.4): patches do not overlap.

    Sizes are cut to multiples of 4 by the stem and halved, rounding down, between stages.
    """

    @staticmethod
    def _downsample_layers(in_chans: int, embed_dim: Sequence[int]) -> list[nn.Sequential]:
        layers = [nn.Sequential(nn.Conv2d(in_chans, embed_dim[0], 4, stride=4), nn.BatchNorm2d(embed_dim[0]))]
        for narrow, wide in pairwise(embed_dim):
            layers.append(nn.Sequential(nn.BatchNorm2d(narrow), nn.Conv2d(narrow, wide, 2, stride=2)))
        return layers


class BiFormerBackbone(nn.Module):
    """BiFormer that returns one map per stage, each with its own norm, for detection and segmentation.

    `out_indices` picks stages (0 to 3); maps are [B, C, H', W'] at strides 4, 8, 16, 32. The norms act on the outputs
    alone: the next stage takes the map before its norm. `norm_eval` keeps every BatchNorm in eval while training.
    """

    def __init__(self, model: BiFormer, out_indices: Sequence[int] = (0, 1, 2, 3), *, norm_eval: bool = False) -> None:
        super().__init__()
        stages = list(out_indices)
        if not stages or stages != sorted(set(stages) & {0, 1, 2, 3}):
            raise InputError(f"out_indices={tuple(out_indices)} must name stages among 0, 1, 2, 3 in rising order")
        model.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.model, self.out_indices, self.norm_eval = model, tuple(out_indices), norm_eval
        self.feature_info = [model.feature_info[stage] for stage in out_indices]
        self.extra_norms = nn.ModuleDict(
            {str(stage): LayerNorm2d(model.feature_info[stage]["num_chs"], eps=1e-6) for stage in out_indices}
        )

    def forward(self, x: Float[Tensor, "batch in_chans height width"]) -> list[Tensor]:
        """Return the normed maps of the chosen stages."""
        maps = self.model.forward_intermediates(x, list(self.out_indices), stop_early=True, intermediates_only=True)
        return [self.extra_norms[str(stage)](feature) for stage, feature in zip(self.out_indices, maps, strict=True)]

    def train(self, mode: bool = True) -> "BiFormerBackbone":
        """Set the mode; with `norm_eval` BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


# a leaf of traces by fx, which cannot follow the condition
@torch.fx.wrap
def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"input has shape {list(x.shape)}; expected images [batch, channels, height, width]")


def _stride2(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)


def _init_weights(module: nn.Module) -> None:
    # 1x1 convolutions of the NCHW form keep PyTorch's defaults, as in the official initialisation
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


# the official download links are dead, so no configuration names a file
default_cfgs = generate_default_cfgs(
    {f"biformer_{name}.in1k": _cfg() for name in ("tiny", "small", "base", "stl", "stl_nchw")}
)


def _create(variant: str, pretrained: bool, model_class: type[BiFormer] = BiFormer, **kwargs: Any) -> BiFormer:
    img_size = kwargs.pop("img_size", None)
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        kwargs["pretrained_cfg_overlay"] = {"input_size": (3, *size)} | (kwargs.get("pretrained_cfg_overlay") or {})
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(model_class, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 G multiply-adds at 224 (paper, table 2)."""
    sizes = {"depth": (2, 2, 8, 2), "embed_dim": (64, 128, 256, 512)}
    return _create("biformer_tiny", pretrained, **(sizes | kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 G multiply-adds at 224 (paper, table 2)."""
    sizes = {"depth": (4, 4, 18, 4), "embed_dim": (64, 128, 256, 512)}
    return _create("biformer_small", pretrained, **(sizes | kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 G multiply-adds at 224 (paper, table 2)."""
    sizes = {"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768)}
    return _create("biformer_base", pretrained, **(sizes | kwargs))


_STL = {"depth": (2, 2, 6, 2), "embed_dim": (96, 192, 384, 768), "mlp_ratios": (4, 4, 4, 4), "pos_conv": 0}


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL, the Swin-T layout: 28.4 M parameters, 4.6 G multiply-adds at 224 (paper, table 5)."""
    return _create("biformer_stl", pretrained, BiFormerSTL, **(_STL | kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL in the later channels-first form: 28.4 M parameters, 4.6 G multiply-adds at 224."""
    sizes = _STL | {"topks": (1, 4, 16, -1), "data_format": "NCHW"}
    return _create("biformer_stl_nchw", pretrained, BiFormerSTL, **(sizes | kwargs))
