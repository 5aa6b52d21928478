"""ViTDet's windows, positions and pyramid, beside their definitions."""

import json
from pathlib import Path

import pytest
import torch

from g2sd.vitdet import LEVELS, SimpleFeaturePyramid, ViTDetBackbone, _Attention, _join, _windows

SIZES = {
    "img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "window_size": 3,
    "window_blocks": (0,), "pretrain_size": 32,
}  # fmt: skip
GOLDEN = Path(__file__).parent / "golden"


def lively(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


class TestViTDetBackbone:
    @pytest.mark.parametrize("size", [(64, 64), (40, 72)])
    def test_shapes(self, size):
        model = lively(ViTDetBackbone(**SIZES))
        assert model(torch.randn(2, 3, *size)).shape == (2, 24, size[0] // 8, size[1] // 8)

    def test_windows(self):
        x = torch.randn(2, 7, 5, 4)
        cut = _windows(x, 3)
        assert cut.shape == (2 * 3 * 2, 3, 3, 4)
        torch.testing.assert_close(cut[0], x[0, :3, :3])
        # the last window of the first picture: one row and two columns of it, and zeros
        torch.testing.assert_close(cut[5, :1, :2], x[0, 6:, 3:])
        assert not cut[5, 1:].any() and not cut[5, :, 2:].any()
        torch.testing.assert_close(_join(cut, 3, x.shape), x)

    @pytest.mark.parametrize("side", [4, 3])
    def test_attention_is_the_definition(self, side):
        """Scores written out, place by place; tables of another side are interpolated."""
        torch.manual_seed(0)
        module = lively(_Attention(8, 2, side)).double()
        x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
        query, key, value = module.qkv(x.view(1, 16, 8)).view(16, 3, 2, 4).unbind(1)
        tables = [
            torch.nn.functional.interpolate(table.T[None], size=7, mode="linear")[0].T
            for table in (module.rel_pos_h, module.rel_pos_w)
        ]
        mixed = torch.zeros(16, 2, 4, dtype=torch.float64)
        for head in range(2):
            for i in range(16):
                scores = torch.stack(
                    [
                        query[i, head] @ key[j, head] / 2
                        + query[i, head] @ tables[0][i // 4 - j // 4 + 3]
                        + query[i, head] @ tables[1][i % 4 - j % 4 + 3]
                        for j in range(16)
                    ]
                )
                mixed[i, head] = scores.softmax(0) @ value[:, head]
        torch.testing.assert_close(module(x), module.proj(mixed.view(1, 4, 4, 8)))

    def test_official_names(self):
        layout = json.loads((GOLDEN / "state_layout.json").read_text())["vitdet_backbone/backbone"]
        sizes = {"img_size": 96, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "window_size": 4}
        model = SimpleFeaturePyramid(ViTDetBackbone(**sizes, window_blocks=(0, 2), pretrain_size=64), 32)
        assert {name: list(value.shape) for name, value in model.state_dict().items()} == layout

    def test_every_parameter_learns(self):
        model = SimpleFeaturePyramid(lively(ViTDetBackbone(**SIZES)).train(), 8)
        sum(each.square().sum() for each in model(torch.randn(1, 3, 64, 64)).values()).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not without
        # the class token's position is not used
        assert not model.net.pos_embed.grad[:, 0].any()

    def test_bfloat16(self):
        model = lively(ViTDetBackbone(**SIZES))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model(images)
        # a few percent of the largest value, after two blocks
        torch.testing.assert_close(found.float(), model(images).detach(), rtol=0.05, atol=0.2)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"sides must be multiples of 8 pixels"):
            ViTDetBackbone(**SIZES)(torch.zeros(1, 3, 60, 64))
        with pytest.raises(ValueError, match=r"images have shape \[3, 64, 64\]"):
            ViTDetBackbone(**SIZES)(torch.zeros(3, 64, 64))
        with pytest.raises(ValueError, match="img_size=60 must be a multiple of patch_size=8"):
            ViTDetBackbone(**{**SIZES, "img_size": 60})
        with pytest.raises(ValueError, match="embed_dim=24 must be a multiple of num_heads=5"):
            ViTDetBackbone(**{**SIZES, "num_heads": 5})
        with pytest.raises(ValueError, match=r"window_blocks=\(2,\) must be in 0 to 1"):
            ViTDetBackbone(**{**SIZES, "window_blocks": (2,)})


class TestSimpleFeaturePyramid:
    def test_strides(self):
        model = SimpleFeaturePyramid(lively(ViTDetBackbone(**SIZES)), 8)
        maps = model(torch.randn(2, 3, 64, 64))
        assert tuple(maps) == LEVELS
        assert [each.shape[2] for each in maps.values()] == [32, 16, 8, 4, 2]
        assert {each.shape[:2] for each in maps.values()} == {(2, 8)}
        torch.testing.assert_close(maps["p6"], maps["p5"][:, :, ::2, ::2])
