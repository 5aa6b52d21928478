"""The backbone of segmentation models: maps, biases of attention and when they are kept, layer groups."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from g2sd.segmentation_backbone import (
    BiasedAttention,
    SegmentationBackbone,
    interpolate_biases,
    num_biases,
    relative_index,
)
from visionkernels.training import OptimizerRecipe
from visionkernels.training.optimization import create_optimizer


def micro(**options) -> SegmentationBackbone:
    sizes = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3)}
    backbone = SegmentationBackbone(**({"img_size": 32, "drop_path_rate": 0.0} | sizes | options))
    for name, parameter in backbone.named_parameters():
        if name.endswith("table") or "gamma" in name:
            nn.init.normal_(parameter)
    return backbone


def attention(grid: tuple[int, int] = (3, 4)) -> tuple[BiasedAttention, Tensor]:
    layer = BiasedAttention(12, 3, grid)
    nn.init.normal_(layer.relative_position_bias_table)
    return layer, relative_index(grid)


def written_out(layer: BiasedAttention, x: Tensor, index: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    query, key, value = layer.qkv(x).reshape(batch, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
    bias = layer.relative_position_bias_table[index].permute(2, 0, 1)
    scores = (query * layer.scale) @ key.transpose(-2, -1) + bias
    return layer.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width))


class TestRelativeIndex:
    @pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5)], ids=str)
    def test_reference(self, grid):
        rows, columns = grid
        places = [(row, column) for row in range(rows) for column in range(columns)]
        last = num_biases(grid)
        expected = torch.full((len(places) + 1,) * 2, last - 1)
        expected[0, 1:], expected[1:, 0] = last - 3, last - 2
        for i, (y, x) in enumerate(places):
            for j, (other_y, other_x) in enumerate(places):
                step = (y - other_y + rows - 1) * (2 * columns - 1) + x - other_x + columns - 1
                expected[i + 1, j + 1] = step
        assert torch.equal(relative_index(grid), expected)


class TestInterpolateBiases:
    def test_same_grid(self):
        table = torch.randn(num_biases((2, 3)), 2)
        assert interpolate_biases(table, (2, 3), source=(2, 3)) is table

    def test_values(self):
        steps = torch.linspace(-1, 1, 7)[:, None].expand(7, 5)
        table = torch.cat([steps.reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]])])
        found = interpolate_biases(table, (6, 4), source=(4, 3))
        assert found.shape == (num_biases((6, 4)), 1)
        assert found[-3:].flatten().tolist() == [7, 8, 9]
        expected = F.interpolate(steps[None, None], (11, 7), mode="bicubic")
        assert_close(found[:-3].view(11, 7), expected[0, 0])
        assert (found[:-3].view(11, 7).diff(dim=0) > 0).all()

    def test_errors(self):
        with pytest.raises(ValueError, match="rows of table=12 must be 28 for a grid of"):
            interpolate_biases(torch.zeros(12, 2), (4, 4), source=(3, 3))


class TestBiasedAttention:
    @pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
    def test_reference(self, is_training):
        layer, index = attention()
        layer.train(is_training).double()
        x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
        found, expected = layer(x, index), written_out(layer, x, index)
        assert_close(found, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            assert_close(layer(x, index), expected, rtol=1e-10, atol=1e-12)
        parameters = [x, *layer.parameters()]
        grads = [torch.autograd.grad(each.square().sum(), parameters) for each in (found, expected)]
        assert_close(*grads, rtol=1e-10, atol=1e-12)

    def test_no_bias(self):
        layer = BiasedAttention(12, 3, None)
        assert layer.relative_position_bias_table is None
        assert layer(torch.randn(1, 5, 12), None).shape == (1, 5, 12)

    def test_kept(self):
        layer, index = attention()
        layer.eval()
        with torch.no_grad():
            first = layer.bias(index, torch.float32)
            assert layer.bias(index, torch.float32) is first
            assert layer.bias(index, torch.bfloat16).dtype == torch.bfloat16
        # with gradients it is gathered anew, so that the table gets some
        assert layer.bias(index, torch.float32).requires_grad

    @pytest.mark.parametrize("change", ["load_state_dict", "in place", "train", "replaced", "data", "inference"])
    def test_kept_is_never_stale(self, change):
        layer, index = attention()
        x, other = torch.randn(1, 13, 12), attention()[0]
        layer.eval()
        with torch.no_grad():
            layer(x, index)
            match change:
                case "load_state_dict":
                    layer.load_state_dict(other.state_dict())
                case "in place":
                    torch._foreach_lerp_(list(layer.parameters()), list(other.parameters()), 0.5)
                case "train":
                    layer.relative_position_bias_table.data.mul_(3)
                    layer.train().eval()
                case "replaced":
                    layer.relative_position_bias_table = nn.Parameter(other.relative_position_bias_table.detach())
                case "data":
                    layer.relative_position_bias_table.data = other.relative_position_bias_table.data
                case "inference":
                    with torch.inference_mode():
                        layer.relative_position_bias_table.mul_(2)
            assert_close(layer(x, index), written_out(layer, x, index))

    def test_optimizer_step(self):
        layer, index = attention()
        x = torch.randn(1, 13, 12)
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
        layer.eval()
        for _ in range(2):
            with torch.no_grad():
                assert_close(layer(x, index), written_out(layer, x, index))
            layer(x, index).square().sum().backward()
            optimizer.step()

    def test_inference_mode(self):
        """Biases kept in inference mode serve without gradients, and not with them."""
        layer, index = attention()
        x = torch.randn(1, 13, 12)
        layer.eval()
        with torch.inference_mode():
            expected = layer(x, index).clone()
        with torch.no_grad():
            assert_close(layer(x, index), expected)
        layer(x, index).sum().backward()
        assert layer.relative_position_bias_table.grad is not None

    def test_copies(self):
        layer, index = attention()
        layer.eval()
        with torch.inference_mode():
            layer(torch.randn(1, 13, 12), index)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert (layer._kept is None, other._kept) == (False, None)
            assert_close(other.state_dict(), layer.state_dict())


class TestSegmentationBackbone:
    @pytest.mark.parametrize(
        ("img_size", "patch_size", "grid"),
        [(32, 8, (4, 4)), ((16, 24), 8, (2, 3)), ((20, 28), (4, 4), (5, 7))],
        ids=str,
    )
    def test_shapes(self, img_size, patch_size, grid):
        backbone = micro(img_size=img_size, patch_size=patch_size).eval()
        maps = backbone(torch.randn(2, 3, *backbone.img_size))
        rows, columns = grid
        assert [tuple(each.shape) for each in maps] == [
            (2, 12, 4 * rows, 4 * columns),
            (2, 12, 2 * rows, 2 * columns),
            (2, 12, rows, columns),
            (2, 12, rows // 2, columns // 2),
        ]

    def test_paper_sizes(self):
        with torch.device("meta"):
            backbone = SegmentationBackbone()
        assert backbone.grid == (32, 32)
        assert backbone.blocks[0].attn.relative_position_bias_table.shape == (63 * 63 + 3, 12)
        assert backbone.out_indices == (3, 5, 7, 11)
        assert backbone.blocks[11].drop_path.drop_prob == pytest.approx(0.1)
        fresh = micro().blocks[0], SegmentationBackbone(32, 16, embed_dim=8, depth=4, num_heads=1, out_indices=range(4))
        assert fresh[1].blocks[0].gamma_1.tolist() == [1] * 8
        assert not fresh[1].blocks[0].attn.relative_position_bias_table.any()

    def test_every_parameter_learns(self):
        backbone = micro(drop_path_rate=0.1).train()
        sum(each.square().mean() for each in backbone(torch.randn(4, 3, 32, 32))).backward()
        assert [name for name, each in backbone.named_parameters() if each.grad is None or not each.grad.any()] == []

    def test_plain(self):
        backbone = micro(has_relative_bias=False, init_values=None).eval()
        names = {name for name, _ in backbone.named_parameters()}
        assert not any("gamma" in name or "relative" in name for name in names)
        assert backbone(torch.randn(1, 3, 32, 32))[2].isfinite().all()

    def test_state(self):
        backbone, other = micro().eval(), micro().eval()
        images = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            other(images)
            other.load_state_dict(backbone.state_dict())
            assert_close(other(images), backbone(images), rtol=0, atol=0)
        assert not any("index" in key for key in backbone.state_dict())

    def test_autocast(self):
        backbone = micro().eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            exact = backbone(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = backbone(images)
        for ours, theirs in zip(rounded, exact, strict=True):
            assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()
        with torch.autocast("cpu", torch.bfloat16):
            backbone.train()(images)[0].float().mean().backward()
        assert backbone.blocks[0].attn.relative_position_bias_table.grad.isfinite().all()

    def test_layer_decay(self):
        backbone = micro()
        groups = create_optimizer(backbone, OptimizerRecipe(layer_decay=0.65)).param_groups
        names = {id(parameter): name for name, parameter in backbone.named_parameters()}
        found = {
            names[id(each)]: (group["lr_scale"], group["weight_decay"]) for group in groups for each in group["params"]
        }
        assert found["cls_token"] == found["pos_embed"] == (pytest.approx(0.65**5), 0)
        assert found["patch_embed.proj.weight"] == (pytest.approx(0.65**5), 0.05)
        for number in range(4):
            assert found[f"blocks.{number}.attn.qkv.weight"] == (pytest.approx(0.65 ** (4 - number)), 0.05)
            assert found[f"blocks.{number}.gamma_1"] == (pytest.approx(0.65 ** (4 - number)), 0)
        assert found["fpn1.0.weight"] == (1, 0.05)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"img_size": 30}, "img_size=30 and 30 must be multiples of patch_size=8 and 8"),
            ({"img_size": 8}, "img_size=8 and 8 must be two patches of 8 and 8 pixels or more"),
            ({"num_heads": 5}, "embed_dim=12 must be a multiple of num_heads=5"),
            ({"out_indices": (0, 1, 2, 4)}, r"out_indices=\(0, 1, 2, 4\) must be 4 rising numbers below depth=4"),
            ({"out_indices": (0, 1, 2)}, r"out_indices=\(0, 1, 2\) must be 4 rising"),
            ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            micro(**options)

    @pytest.mark.parametrize("shape", [(1, 3, 40, 32), (0, 3, 32, 32), (1, 3, 16, 16)], ids=str)
    def test_input_errors(self, shape):
        with pytest.raises(ValueError, match=r"images have shape .*; the model takes \[batch, channels, 32, 32\]"):
            micro()(torch.zeros(shape))
