import numpy as np
import pytest
import timm
import torch

from diswot.spaces import Choice, TimmSpace
from diswot.spaces.timm_models import TIMM_PRESETS

SMALL = {
    "resnet": "resnet18?layers=1,1,2,1&channels=32,64,128,256",
    "convnext": "convnext_atto?depths=1,1,1,1&dims=24,48,96,192",
    "vit": "vit_tiny_patch16_224?depth=4&embed_dim=96&num_heads=3&mlp_ratio=2",
    "efficientnet": "efficientnet_b0",
    "mobilenet": "mobilenetv3_small_050",
}


class TestTimmSpace:
    @pytest.mark.parametrize("name", TIMM_PRESETS)
    def test_presets(self, name):
        """timm takes the arguments, and the network is that of the key."""
        space = TimmSpace.preset(name, image_size=64)
        key = space.parse(SMALL[name])
        model = space.build(key, num_classes=5, in_chans=1)
        assert space.input_size == (3, 64, 64)
        assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 5)
        if name == "resnet":
            assert len(model.layer3) == 2
            assert model.num_features == 256
        if name == "vit":
            assert len(model.blocks) == 4
            assert model.embed_dim == 96

    @pytest.mark.parametrize("name", TIMM_PRESETS)
    def test_models_exist(self, name):
        assert set(TIMM_PRESETS[name].models) <= set(timm.list_models())
        assert TimmSpace.preset(name).input_size[0] == 3

    def test_heads_divide(self):
        """Every width of the preset goes with every number of heads."""
        choices = TIMM_PRESETS["vit"].choices
        assert all(width % heads == 0 for width in choices["embed_dim"].values for heads in choices["num_heads"].values)

    def test_key(self):
        space = TimmSpace(("resnet18", "resnet34"), {"layers": Choice((1, 2), 4), "drop_rate": (0.0, 0.1)})
        assert space.size == 2 * 16 * 2
        assert space.parse("resnet34?drop_rate=0.1&layers=1,2,1,1") == "resnet34?layers=1,2,1,1&drop_rate=0.1"
        assert len(set(space.enumerate())) == 64
        assert space.build("resnet18?layers=1,1,1,1&drop_rate=0.1").drop_rate == 0.1

    def test_mutate(self):
        """One entry of one value changes."""
        space = TimmSpace.preset("resnet")
        generator = np.random.default_rng(0)
        key = space.sample(generator)
        for _ in range(20):
            child = space.mutate(key, generator)
            (layers, channels), (other, others) = (
                text.removeprefix("resnet18?layers=").split("&") for text in (key, child)
            )
            changed = sum(one != two for one, two in zip(layers.split(","), other.split(","), strict=True))
            assert changed + (channels != others) == 1
            key = child

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("resnet81?layers=1,1,1,1", "unknown model 'resnet81'; did you mean 'resnet18'"),
            ("resnet18?layer=1,1,1,1", "at position 9: unknown argument 'layer'; did you mean 'layers'"),
            ("resnet18?layers=1,1,1", "at position 9: '1,1,1' has 3 values; expected 4, each among 1 2 3"),
            ("resnet18?layers=1,1,1,9", "value '9' is not allowed; expected one of 1 2 3"),
            ("resnet18?layers", "at position 9 has 'layers'; expected argument=value"),
            ("resnet18?layers=1,1,1,1&layers=1,1,1,1", "at position 24 has .* each argument once"),
            ("resnet18?layers=1,1,1,1", "lacks channels; expected e.g. 'resnet18"),
            ("resnet18", "lacks layers, channels"),
        ],
    )
    def test_errors(self, key, message):
        with pytest.raises(ValueError, match=message):
            TimmSpace.preset("resnet").parse(key)

    def test_bad_spaces(self):
        with pytest.raises(ValueError, match="unknown timm model 'resnet17'"):
            TimmSpace("resnet17", {"layers": [1, 2]})
        with pytest.raises(ValueError, match="of two or more architectures"):
            TimmSpace("resnet18")
        with pytest.raises(ValueError, match=r"values=.* all different"):
            TimmSpace("resnet18", {"layers": [(1, 1, 1, 1), (1, 1, 1, 1)]})
        with pytest.raises(ValueError, match=r"values=.* without"):
            Choice(("a&b",))
        with pytest.raises(ValueError, match="single values where length is given"):
            Choice(((1, 2),), 2)
        with pytest.raises(ValueError, match="unknown preset 'resnest'; did you mean 'resnet'"):
            TimmSpace.preset("resnest")
        with pytest.raises(ValueError, match="resnet18 does not take wings"):
            TimmSpace("resnet18", {"wings": (1, 2)}).build("resnet18?wings=1")
