"""The base of all networks: a stem, stages, global average pooling and one Linear, with timm's interface."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

import torch.fx
from jaxtyping import Float
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError, check

__all__ = [
    "BlockReLU",
    "HeadOptions",
    "LayeredClassifier",
    "StagedClassifier",
    "batch_norm_output",
    "check_images",
    "init_convolutions",
    "stage_info",
]


class BlockReLU(nn.Module):
    """The ReLU that closes a block: its input is the block's map before activation.

    It is no `nn.ReLU`, since proxies that count ReLU modules (nwot, section 5) leave these out.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class HeadOptions(TypedDict, total=False):
    """What timm gives every network about its head; the defaults are those of `StagedClassifier._finish`."""

    num_classes: int
    global_pool: str
    drop_rate: float


class StagedClassifier(nn.Module):
    """A network of `num_stages` steps (0 is the stem) whose last map is pooled and classified by one Linear.

    A subclass registers its modules in the order in which they run, gives `forward_stage`, and calls `_finish` at the
    end of its constructor. The outputs of the modules that `feature_info` names are the maps of the stages.
    """

    classifier_name: ClassVar[str] = "fc"

    num_classes: int
    num_features: int
    feature_info: list[dict[str, Any]]
    is_pruned = False

    def _finish(
        self,
        feature_info: list[dict[str, Any]],
        num_features: int,
        *,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        check(0 <= drop_rate < 1, "drop_rate", drop_rate, "from 0 to below 1")
        self.feature_info, self.num_stages = feature_info, len(feature_info)
        self.num_features = self.head_hidden_size = num_features
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Float[Tensor, "batch in_chans height width"]) -> Tensor:
        """Classify images, normalised as `default_cfg` says: logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map before pooling, [B, num_features, H', W']."""
        check_images(x)
        for stage in range(self.num_stages):
            x = self.forward_stage(x, stage)
        return self.forward_last(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of `forward_features` and classify it; `pre_logits` stops before the classifier."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Go from the map before (or the images) to that of `stage`."""
        raise NotImplementedError

    def chain(self) -> list[nn.Module]:
        """Return modules that `forward_features` applies first, one after another and with nothing between."""
        return []

    def forward_last(self, x: Tensor) -> Tensor:
        """Apply what stands between the last stage and the pooling."""
        return x

    def forward_stage_preact(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Return the map of `stage` before and after its last activation; the same one where it ends without one."""
        x = self.forward_stage(x, stage)
        return x, x

    def forward_maps(
        self, x: Float[Tensor, "batch in_chans height width"], *, preact: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return the list of features, [stem, stages..., pooled], and the logits (section 3.1).

        `preact` takes the stages before their last activation; the stem stays as it is.
        """
        check_images(x)
        maps = []
        for stage in range(self.num_stages):
            if preact and stage:
                before, x = self.forward_stage_preact(x, stage)
                maps.append(before)
            else:
                x = self.forward_stage(x, stage)
                maps.append(x)
        return self._with_head(maps, x)

    def _with_head(self, maps: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Add the pooled vector to `maps`; `x` is the map of the last stage."""
        pooled = self.forward_last(x).mean((2, 3))
        return [*maps, pooled], self.get_classifier()(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stages in `indices` by timm's protocol; there is no `norm` to apply to them."""
        check(output_fmt == "NCHW", "output_fmt", output_fmt, "'NCHW'")
        check(not norm, "norm", norm, "False: the maps of the stages have no norm of their own")
        check_images(x)
        take, last = feature_take_indices(len(self.feature_info), _listed(indices))
        maps = []
        for stage in range(last + 1 if stop_early or self.is_pruned else self.num_stages):
            x = self.forward_stage(x, stage)
            if stage in take:
                maps.append(x)
        if intermediates_only:
            return maps
        return (self.forward_last(x) if last + 1 == self.num_stages or not stop_early else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the modules that the maps of `indices` do not need, by timm's protocol; `forward` is then of no use."""
        take, last = feature_take_indices(len(self.feature_info), _listed(indices))
        top, _, inner = self.feature_info[last]["module"].partition(".")
        names = [name for name, _ in self.named_children()]
        for name in names[names.index(top) + 1 :]:
            setattr(self, name, nn.Identity())
        container = getattr(self, top)
        if inner and isinstance(container, nn.ModuleList | nn.Sequential):
            setattr(self, top, container[: int(inner.partition(".")[0]) + 1])
        self.is_pruned, self.num_classes = True, 0
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last Linear; an Identity with 0 classes."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes remove it, and `global_pool=""` the pooling."""
        pool = getattr(self, "global_pool", "avg") if global_pool is None else global_pool
        check(pool in ("avg", ""), "global_pool", pool, "'avg', or '' for none")
        check(0 <= num_classes <= 10**6, "num_classes", num_classes, "from 0 to 1000000")
        check(bool(pool) or not num_classes, "global_pool", pool, "'avg' where num_classes is not 0")
        self.num_classes, self.global_pool = num_classes, pool
        classifier: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            classifier = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        parent, _, name = self.classifier_name.rpartition(".")
        setattr(self.get_submodule(parent), name, classifier)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raise ValueError: BatchNorm would count a batch twice, and the networks are small."""
        check(not enable, "enable", enable, "False: BatchNorm would take a recomputed batch into its statistics twice")


class LayeredClassifier(StagedClassifier):
    """A network of the stem `conv1`, `bn1`, `relu` and of the stages `layer1`, `layer2`, ..., sequences of blocks.

    The last block of a stage has `preactivate` and `last_relu`, from which its map before the activation comes.
    """

    def _set_stem(self, in_chans: int, width: int, kernel: int) -> None:
        self.conv1 = nn.Conv2d(in_chans, width, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        return self.relu(self.bn1(self.conv1(x))) if stage == 0 else getattr(self, f"layer{stage}")(x)

    def forward_stage_preact(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        *blocks, last = getattr(self, f"layer{stage}")
        for block in blocks:
            x = block(x)
        return self.forward_block_preact(last, x)

    def forward_block_preact(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map of a block before and after its last activation."""
        before = block.preactivate(x)
        return before, block.last_relu(before)


def _listed(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return indices if indices is None or isinstance(indices, int) else list(indices)


# a leaf of traces by fx, which cannot follow the condition
@torch.fx.wrap
def check_images(x: Tensor) -> None:
    """Raise ValueError unless `x` has four dimensions."""
    if x.ndim != 4:
        raise InputError(f"input has shape {list(x.shape)}; expected images [batch, channels, height, width]")


def stage_info(*stages: tuple[str, int, int]) -> list[dict[str, Any]]:
    """Return timm's `feature_info` from (module, channels, reduction) of the stem and each stage."""
    return [{"module": name, "num_chs": width, "reduction": reduction} for name, width, reduction in stages]


def batch_norm_output(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what `norm` makes of `x`, without a second update of its running statistics."""
    if not norm.training:
        return norm(x)
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


def init_convolutions(module: nn.Module) -> None:
    """Draw every convolution from the normal distribution of He et al. with `fan_out`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
