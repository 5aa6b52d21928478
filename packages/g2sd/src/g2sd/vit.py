"""Vision transformers for specific distillation: a class token and a distillation token (G2SD, sec. 3.3).

The distillation token has no position. It is second here, where timm's tools expect tokens that are no patches;
blocks do not care for the order, so that logits are those of the official model, which appends it.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.fx
from timm.layers import PatchDropout, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from g2sd.blocks import LeanAttention, LeanMlp, norm_layer
from g2sd.positions import interpolate_positions
from visionkernels.checks import InputError, check, check_choice

__all__ = ["DistilledViT"]

EvalHead = Literal["mean", "class"]


class DistilledViT(VisionTransformerDistilled):
    """Logits of two heads: in training, with `distilled_training`, both (class, distillation), else their mean.

    `eval_head="class"` gives those of the class token alone, as after NKD. Images have the model's `img_size`, a number
    of pixels or (height, width), divisible by `patch_size`.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(self, *args: Any, eval_head: EvalHead = "mean", **kwargs: Any) -> None:
        check_choice("eval_head", eval_head, EvalHead)
        for name, only in _FIXED.items():
            value = kwargs.get(name, only)
            check(value == only, name, value, f"{only!r} for a model with a distillation token")
        super().__init__(*args, **kwargs)
        _check_divisible(self.patch_embed.img_size, self.patch_embed.patch_size)
        self.eval_head = eval_head
        self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, :-1].clone())
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.num_prefix_tokens = self.num_prefix_tokens

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of layers; the distillation token belongs to the heads."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size, in pixels; the positions are interpolated. Raises ValueError as models do."""
        source = tuple(self.patch_embed.grid_size)
        embed = self.patch_embed
        _check_divisible(
            embed.img_size if img_size is None else img_size, embed.patch_size if patch_size is None else patch_size
        )
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        grid = tuple(self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(interpolate_positions(self.pos_embed.detach(), grid, source=source))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones; `num_classes=0` leaves the mean of the two tokens."""
        check(global_pool in (None, "", "token"), "global_pool", global_pool, "'token': heads read their tokens")
        super().reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return normed tokens: class, distillation, patches. ValueError for images of another size."""
        _check_images(x, self.patch_embed.img_size)
        tokens: Tensor = super().forward_features(x, *args, **options)
        return tokens

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.pos_drop(torch.cat([x[:, :1], self.dist_token.expand(x.shape[0], -1, -1), x[:, 1:]], 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Return logits of normed tokens, or the features before the heads."""
        if self.eval_head == "mean" or (self.training and self.distilled_training):
            return super().forward_head(x, pre_logits)
        features = self.head_drop(x[:, 0])
        return features if pre_logits else self.head(features)


# options of timm that a distillation token leaves no choice of
_FIXED: dict[str, Any] = {
    "no_embed_class": False, "dynamic_img_size": False, "dynamic_img_pad": False, "reg_tokens": 0, "class_token": True,
    "pos_embed": "learn", "global_pool": "token",
}  # fmt: skip


# a leaf of traces by fx, which cannot follow the condition
@torch.fx.wrap
def _check_images(x: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    if x.ndim != 4 or x.shape[2:] != (height, width):
        raise InputError(
            f"images have shape {list(x.shape)}; the model takes [batch, channels, {height}, {width}]: resize "
            "them, or interpolate its positions with set_input_size"
        )


def _check_divisible(img_size: Any, patch_size: Any) -> None:
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    if height < 1 or width < 1 or height % rows or width % columns:
        raise InputError(f"img_size={height}x{width} must be a multiple of patch_size={rows}x{columns}")


def _filter(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fit a pre-trained state dict to the grid of `model`, as timm's filter does."""
    if not isinstance(model, DistilledViT):
        return checkpoint_filter_fn(state, model)
    # timm's takes the distillation token for one that has a position
    table = state.get("pos_embed")
    fitted = checkpoint_filter_fn({key: value for key, value in state.items() if key != "pos_embed"}, model)
    if table is not None and table.shape != model.pos_embed.shape:
        table = interpolate_positions(table, tuple(model.patch_embed.grid_size))
    return fitted if table is None else {**fitted, "pos_embed": table}


_SIZES = {
    "tiny": (192, 12, 3, 16), "small": (384, 12, 6, 16), "base": (768, 12, 12, 16), "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}  # fmt: skip
_VARIANTS: dict[str, dict[str, Any]] = {
    f"g2sd_vit_{size}_patch{patch}_224": {
        "embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch
    }
    for size, (width, depth, heads, patch) in _SIZES.items()
}  # fmt: skip
_CFG = {
    "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.875,
    "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj", "classifier": ("head", "head_dist"), "fixed_input_size": True,
}  # fmt: skip
default_cfgs = generate_default_cfgs(dict.fromkeys(_VARIANTS, _CFG))


def _entry_point(name: str, sizes: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, distilled: bool = True, **kwargs: Any) -> nn.Module:
        common: dict[str, Any] = {"norm_layer": norm_layer, "attn_layer": LeanAttention, "mlp_layer": LeanMlp}
        if not distilled:
            overlay = {"classifier": "head", **(kwargs.get("pretrained_cfg_overlay") or {})}
            kwargs = {"global_pool": "avg", **kwargs, "pretrained_cfg_overlay": overlay}
            if not kwargs.get("dynamic_img_pad"):
                _check_divisible(kwargs.get("img_size") or 224, kwargs.get("patch_size") or sizes["patch_size"])
        model: nn.Module = build_model_with_cfg(
            DistilledViT if distilled else VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=_filter,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(common | sizes | kwargs),
        )
        return model

    create.__module__, create.__name__, create.__qualname__ = __name__, name, name
    create.__doc__ = (
        f"ViT of width {sizes['embed_dim']} and {sizes['depth']} blocks; `distilled=False`: the mean of the patches is "
        "classified, as by MAE's fine-tuned teachers."
    )
    return create


for _name, _arguments in _VARIANTS.items():
    setattr(sys.modules[__name__], _name, register_model(_entry_point(_name, _arguments)))
