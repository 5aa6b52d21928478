"""All proxies through `compute`: names, draws, odd networks, and the network comes out as it went in."""

import copy
import math
import warnings

import pytest
import timm
import torch
from torch import nn

from diswot import proxies, spaces
from diswot.networks.counting import count_macs

NAMES = proxies.names()
EMPTY_CELL = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


class Odd(nn.Module):
    """One layer runs twice, one never, and a linear layer takes three axes."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.never, self.tokens, self.head = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.twice(self.relu(self.twice(x))))
        return self.head(self.tokens(x.flatten(2).mT).mean(1))


@pytest.fixture
def odd():
    return Odd()


def compute(names, model, batch, **options):
    return proxies.compute(names, model, *batch, **options)


class TestNames:
    def test_are_those_of_the_registry(self):
        assert set(NAMES) == set(proxies.PROXIES)
        assert {"grad_norm", "snip", "plain", "grasp", "synflow", "synflow_bn", "fisher", "jacov", "nwot", "epe_nas",
                "l2_norm", "zen", "bn_logvar", "ntk", "linear_regions", "params", "flops"} <= set(NAMES)  # fmt: skip


class TestCompute:
    def test_one_or_several(self, s0, batch):
        model = s0()
        several = compute(["snip", "params", "snip"], model, batch)
        assert list(several) == ["snip", "params"]
        assert compute("snip", model, batch) == {"snip": several["snip"]}
        assert all(isinstance(value, float) for value in several.values())

    def test_order_of_names_does_not_matter(self, s0, batch):
        several = compute(list(reversed(NAMES)), s0(), batch, init="gaussian", seed=1, key="a")
        for name in NAMES:
            torch.rand(5)
            assert compute(name, s0(), batch, init="gaussian", seed=1, key="a")[name] == several[name]

    @pytest.mark.parametrize("name", NAMES)
    def test_seed_and_key_decide(self, s0, batch, name):
        first = compute(name, s0(), batch, init="gaussian", seed=1, key="a")
        same_for_all = ("params", "flops", "linear_regions")
        for other in ({"seed": 2, "key": "a"}, {"seed": 1, "key": "b"}):
            changed = compute(name, s0(), batch, init="gaussian", **other)
            assert (changed == first) == (name in same_for_all)

    def test_draws(self, s0, batch):
        shared = [compute("l2_norm", s0(), batch, init="gaussian", key=key, draws="shared") for key in ("a", "b")]
        assert shared[0] == shared[1]

    def test_keep_is_the_default(self, s0, batch):
        model = s0()
        expected = sum(m.weight.norm().item() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        assert compute("l2_norm", model, batch)["l2_norm"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_network_is_not_changed(self, odd, batch, name):
        odd.eval()
        odd.stem.weight.requires_grad_(False)
        odd.head.weight.grad = torch.ones(5, 8)
        before = copy.deepcopy(odd)
        state = torch.random.get_rng_state()
        compute(name, odd, batch, init="gaussian")
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.testing.assert_close(odd.state_dict(), before.state_dict(), rtol=0, atol=0)
        assert [each.requires_grad for each in odd.parameters()] == [each.requires_grad for each in before.parameters()]
        assert not any(module.training for module in odd.modules())
        torch.testing.assert_close(odd.head.weight.grad, torch.ones(5, 8))
        assert odd.stem.weight.grad is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in odd.modules())

    @pytest.mark.parametrize("name", NAMES)
    def test_odd_networks(self, odd, batch, name):
        assert math.isfinite(compute(name, odd, batch, init="kaiming")[name])

    @pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nwot", "linear_regions")])
    def test_attention(self, batch, name):
        vit = timm.create_model("test_vit", img_size=16, num_classes=5)
        assert math.isfinite(compute(name, vit, batch)[name])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_precision(self, s0, batch, dtype):
        model = s0().to(torch.bfloat16)
        names = ("snip", "fisher", "jacov", "ntk", "zen", "synflow", "nwot")
        assert compute(names, model.to(dtype), batch) == pytest.approx(compute(names, model.float(), batch), rel=2e-2)

    def test_counts(self, s0, batch):
        found = compute(("params", "flops"), s0("131"), batch)
        assert found["params"] == sum(each.numel() for each in s0("131").parameters())
        assert found["flops"] == count_macs(s0("131"), (3, 16, 16))

    def test_under_no_grad(self, s0, batch):
        model = s0()
        with torch.no_grad():
            assert compute("snip", model, batch) == compute("snip", model, batch)


class TestValuesThatAreNone:
    def test_cell_without_operations(self, batch):
        """Its outputs do not depend on the images."""
        model = spaces.create("nasbench201", width=8, cells=1).build(EMPTY_CELL, num_classes=5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = compute(NAMES, model, batch, init="gaussian")
        assert found["nwot"] == found["zen"] == found["ntk"] == -math.inf
        assert math.isnan(found["jacov"])
        assert math.isnan(found["epe_nas"])
        assert {str(each.message) for each in seen} == {
            "jacov is nan; it counts as NaN and ranks last", "epe_nas is nan; it counts as NaN and ranks last"
        }  # fmt: skip
        assert found["snip"] == found["grad_norm"] == found["fisher"] == 0

    @pytest.mark.parametrize(
        "name", [name for name in NAMES if name not in ("params", "flops", "linear_regions", "nwot")]
    )
    def test_nan_weights(self, s0, batch, name):
        model = s0()
        model.conv1.weight.data.fill_(math.nan)
        with pytest.warns(RuntimeWarning, match=f"{name} is nan; it counts as NaN and ranks last"):
            assert math.isnan(compute(name, model, batch)[name])

    def test_infinity_is_nan(self, s0, batch):
        model = s0("131")
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.fill_(1e38)
        with pytest.warns(RuntimeWarning, match="synflow is (inf|nan)"):
            assert math.isnan(compute("synflow", model, batch)["synflow"])

    def test_singular_kernels(self, s0, batch):
        images, labels = batch
        found = compute(("nwot", "linear_regions"), s0(), (images[:1].expand(6, -1, -1, -1), labels))
        assert found == {"nwot": -math.inf, "linear_regions": 1}


class TestErrors:
    def test_names(self, s0, batch):
        with pytest.raises(ValueError, match="unknown proxy 'snap'; did you mean 'snip'"):
            compute(["params", "snap"], s0(), batch)

    @pytest.mark.parametrize("name", ["snip", "grasp"])
    def test_labels(self, s0, batch, name):
        images, labels = batch
        with pytest.raises(ValueError, match="labels reach from 1 to 5; the network has 5 classes"):
            compute(name, s0(), (images, labels + 1))
        with pytest.raises(ValueError, match=r"labels are torch.float32"):
            compute(name, s0(), (images, labels.float()))
        with pytest.raises(ValueError, match=r"labels are torch.int64 \[2\]"):
            compute(name, s0(), (images, labels[:2]))

    def test_options(self, s0, batch):
        with pytest.raises(ValueError, match="init='none' must be one of"):
            compute("snip", s0(), batch, init="none")
        with pytest.raises(ValueError, match="draws='none' must be one of"):
            compute("snip", s0(), batch, draws="none")

    def test_networks(self, batch):
        with pytest.raises(ValueError, match="Flatten has no parameters"):
            compute("snip", nn.Flatten(), batch)
        vit = timm.create_model("test_vit", img_size=16, num_classes=5)
        with pytest.raises(ValueError, match="VisionTransformer has no ReLU modules, which nwot and linear_regions"):
            compute("nwot", vit, batch)
