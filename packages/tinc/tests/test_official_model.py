"""The batched tree compared with a loop over nodes, initial weights, leaves and volumes, and timm's factory."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tinc.official.allocation import Dims, TreePlan, allocate, plan_tree
from tinc.official.model import OctreeMLP, SegmentStack, assemble, coordinate_grid, decode, split
from tinc.official.volume import SideInfo, normalise
from tinc.recipes import RECIPES, Level


def make_plan(name: str = "default", shape: tuple[int, int, int] = (8, 8, 12), *, ratio: float = 0.2) -> TreePlan:
    volume = np.random.default_rng(0).gamma(0.5, size=shape).astype(np.float32)
    return plan_tree(replace(RECIPES[name], ratio=ratio), normalise(volume)[0], volume.nbytes)


def reference(model: OctreeMLP, points: Tensor) -> Tensor:
    """Evaluate one node after the other, with the weights under their official names."""
    weights, plan = dict(model.node_parameters()), model.plan
    features: dict[tuple, Tensor] = {}
    leaves = []
    for node in plan.nodes:
        parent = (node.level - 1, *(place // 2 for place in node.index))
        x = features[parent] if node.level else model.grid.T[points]
        is_leaf = node.level == plan.num_levels - 1
        for layer in range(node.dims.layers):
            x = x @ weights[f"{node.name}/{layer}-W"].T + weights[f"{node.name}/{layer}-B"]
            if not (is_leaf and layer == node.dims.layers - 1):
                x = torch.sin((plan.w0 if layer == 0 and node.dims.layers > 1 else 30) * x)
        features[(node.level, *node.index)] = x
        if is_leaf:
            leaves.append(x)
    return torch.stack(leaves)


class TestOctreeMLP:
    @pytest.mark.parametrize("name", RECIPES)
    def test_reference(self, name: str) -> None:
        """`default` has leaves of several widths."""
        model = OctreeMLP(make_plan(name)).double()
        points = torch.tensor([0, 3, 3, 11])
        ours, theirs = model(points), reference(model, points)
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        gradients = []
        for loss in (ours.square().sum(), theirs.square().sum()):
            model.zero_grad()
            loss.backward()
            gradients.append([value.clone() for _, value in model.node_gradients()])
        assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-9)
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_unequal_widths_at_every_level(self) -> None:
        levels = (Level(1.0, 2), Level(1.0, 2, allocation="aoi"), Level(1.5, 3, allocation="var"))
        volume = np.random.default_rng(1).gamma(0.5, size=(8, 8, 8)).astype(np.float32)
        # zeros, unevenly spread
        volume[:4] *= np.random.default_rng(2).random((4, 8, 8)) > 0.7
        recipe = replace(RECIPES["multi2"], levels=levels, ratio=0.1)
        plan = plan_tree(recipe, normalise(volume)[0], volume.nbytes)
        assert len({node.dims.output for node in plan.on_level(1)}) > 1
        model = OctreeMLP(plan).double()
        points = torch.arange(8)
        assert_close(model(points), reference(model, points), rtol=1e-10, atol=1e-10)

    def test_features(self) -> None:
        model = OctreeMLP(make_plan())
        features = model.features(torch.tensor([1, 5]))
        assert [len(level) for level in features] == [1, 8, 64]
        assert_close(torch.stack(features[2]), model(torch.tensor([1, 5])))
        assert features[1][0].shape == (2, model.plan.on_level(1)[0].dims.output)

    def test_parameters_are_views(self) -> None:
        model = OctreeMLP(make_plan())
        with torch.no_grad():
            for _, value in model.node_parameters():
                value.zero_()
        assert not any(parameter.any() for parameter in model.parameters())
        assert sum(value.numel() for _, value in model.node_parameters()) == model.plan.num_parameters
        assert not any(value.any() for _, value in model.node_gradients())

    def test_seed(self) -> None:
        plan = make_plan()
        first, again, other = (OctreeMLP(plan, seed=seed)() for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_state(self) -> None:
        plan = make_plan()
        model, twin = OctreeMLP(plan, seed=1), OctreeMLP(plan, seed=2)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(model(), twin())

    def test_compile_export(self) -> None:
        model, points = OctreeMLP(make_plan(shape=(8, 8, 8))), torch.tensor([0, 2, 5])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(points), model(points))
        exported = torch.export.export(model, (points,)).module()
        assert_close(exported(points), model(points))


class TestSegmentStack:
    @pytest.mark.parametrize("activation", ["Sine", "ReLU"])
    def test_initial_weights(self, activation: str) -> None:
        dims = Dims(5, 40, 40, 3)
        stack = SegmentStack(
            dims, 50, activation=activation, w0=20, activates_output=True, generator=torch.Generator().manual_seed(0)
        )
        inner = (6 / 40) ** 0.5 / 30 if activation == "Sine" else 40**-0.5
        first = 1 / 5 if activation == "Sine" else 5**-0.5
        for weight, bound in zip(stack.weights, (first, inner, inner), strict=True):
            assert weight.abs().max().item() == pytest.approx(bound, rel=0.01) and weight.abs().max() <= bound
            assert weight.mean().abs() < 0.03 * bound
        for bias, bound in zip(stack.biases, (5**-0.5, 40**-0.5, 40**-0.5), strict=True):
            assert bias.abs().max().item() == pytest.approx(bound, rel=0.02)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="activation='Sinus' must be one of"):
            SegmentStack(Dims(3, 2, 1, 2), 1, activation="Sinus", w0=30, activates_output=False)


class TestVolume:
    @given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
    def test_split_assemble(self, levels: int, depth: int, height: int, width: int, channels: int) -> None:
        parts = 2 ** (levels - 1)
        shape = (depth * parts, height * parts, width * parts, channels)
        volume = torch.randn(shape)
        leaves = split(volume, levels)
        assert leaves.shape == (8 ** (levels - 1), depth * height * width, channels)
        assert torch.equal(assemble(leaves, shape[:3]), volume)

    def test_leaf_order(self) -> None:
        volume = torch.arange(64.0).reshape(4, 4, 4, 1)
        plan = TreePlan(
            nodes=allocate(RECIPES["multi2"].levels, 1000), volume_shape=(4, 4, 4), activations=("Sine",) * 3
        )
        for leaf, node in zip(split(volume, 3), plan.on_level(2), strict=True):
            assert leaf.item() == volume[node.index].item()

    def test_grid(self) -> None:
        assert coordinate_grid((1, 2, 1)).tolist() == [[-1, -1, -1], [-1, 1, -1]]

    def test_decode(self) -> None:
        model = OctreeMLP(make_plan(shape=(8, 8, 16)))
        side = SideInfo(shape=(8, 8, 16, 1), dtype="uint16", data_min=0.0, data_max=1000.0)
        whole = decode(model, side)
        assert whole.shape == (8, 8, 16, 1) and whole.dtype == np.uint16
        for batch_size in (1, 5, 16):
            assert np.abs(decode(model, side, batch_size=batch_size).astype(int) - whole).max() <= 1
        with pytest.raises(ValueError, match=r"side_info.shape=\(8, 8, 8, 1\) must be \(8, 8, 16, 1\)"):
            decode(model, replace(side, shape=(8, 8, 8, 1)))
        with pytest.raises(ValueError, match="batch_size=0"):
            decode(model, side, batch_size=0)


class TestTimm:
    @pytest.mark.parametrize("name", RECIPES)
    def test_create(self, name: str) -> None:
        model = timm.create_model(f"tinc_{name}", volume_shape=(8, 8, 12), parameters=3000, channels=2)
        assert isinstance(model, OctreeMLP)
        assert model().shape == (8 ** (model.plan.num_levels - 1), 768 // 8 ** (model.plan.num_levels - 1), 2)
        assert 2000 < sum(parameter.numel() for parameter in model.parameters()) <= 3000
        assert model.default_cfg["architecture"] == f"tinc_{name}"

    def test_errors(self) -> None:
        shape = {"volume_shape": (8, 8, 8), "parameters": 3000}
        with pytest.raises(ValueError, match="no weights to download"):
            timm.create_model("tinc_multi1", pretrained=True, **shape)
        with pytest.raises(ValueError, match="needs parameters="):
            timm.create_model("tinc_multi1", volume_shape=(8, 8, 8))
        with pytest.raises(ValueError, match="has no option in_chans"):
            timm.create_model("tinc_multi1", in_chans=1, **shape)
        with pytest.raises(ValueError, match="height=9 is not divisible"):
            timm.create_model("tinc_multi1", volume_shape=(8, 9, 8), parameters=3000)
        with pytest.raises(ValueError, match="the narrowest tree"):
            timm.create_model("tinc_multi2", volume_shape=(8, 8, 8), parameters=100)
