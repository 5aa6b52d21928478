from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from biformer import BiLevelRoutingAttention
from biformer.baselines import StraightforwardAttention
from biformer.full_attention import ConvolutionalMixer, FullAttention
from biformer.regional import regional_routing_attention
from visionkernels.testing.adapters import ADAPTERS

BRA = partial(BiLevelRoutingAttention, 16, num_heads=2, n_win=4, topk=3)


class TestBiLevelRoutingAttention:
    @pytest.mark.parametrize("gather", ["expanded", "index_select"])
    def test_straightforward(self, gather):
        """The layer equals the algorithm written out, outputs and gradients."""
        layer = BRA().double()
        plain = StraightforwardAttention(layer, gather)
        x = torch.randn(2, 8, 12, 16, dtype=torch.float64)
        gradients = []
        for module in (layer, plain):
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            out.square().sum().backward()
            gradients.append((out, leaf.grad))
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected)

    def test_all_regions_are_dense(self):
        """With topk = regions it is full attention at scale dim ** -0.5."""
        layer = BRA(topk=16, side_dwconv=0)
        x = torch.randn(1, 8, 8, 16)
        query, key, value = (p.flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2) for p in layer.qkv(x).chunk(3, -1))
        dense = F.scaled_dot_product_attention(query, key, value, scale=16**-0.5).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(layer(x), layer.proj(dense))

    @pytest.mark.parametrize("backend", ["eager", "reference"])
    @pytest.mark.parametrize("pad_mode", ["official", "masked"])
    @pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 2), (13, 18), (16, 7), (9, 9)], ids=str)
    def test_shapes(self, size, pad_mode, backend):
        layer = BRA(pad_mode=pad_mode, backend=backend)
        x = torch.randn(2, *size, 16)
        out = layer(x)
        assert out.shape == x.shape
        assert out.isfinite().all()

    def test_backends_agree(self):
        x = torch.randn(2, 13, 18, 16)
        eager, reference = BRA(backend="eager"), BRA(backend="reference")
        reference.load_state_dict(eager.state_dict())
        torch.testing.assert_close(eager(x), reference(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
    @pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
    def test_adapters(self, change, data_format):
        """Routing sees what the layer `qkv` computes, also where that is more than its parameters."""
        torch.manual_seed(0)
        layer = BRA(data_format=data_format).double()
        change(layer, "qkv")
        x = torch.randn(2, 16, 12, 16, dtype=torch.float64)
        eager = layer.double()(x)
        layer.backend = "reference"
        torch.testing.assert_close(eager, layer(x))

    def test_offloaded(self):
        """Weights that accelerate brings to the device at each call."""
        layer = BRA()
        x = torch.randn(2, 8, 12, 16)
        expected = layer(x)
        torch.testing.assert_close(cpu_offload(layer)(x), expected)

    def test_masked_ignores_padding(self):
        """Padding by the caller that is declared invalid equals padding by the layer."""
        official, masked = BRA(), BRA(pad_mode="masked")
        masked.load_state_dict(official.state_dict())
        x = torch.randn(1, 8, 12, 16)
        torch.testing.assert_close(masked(x), official(x))
        # 9 rows in regions of 3: the fourth row of regions is empty, and all but its padding takes part
        x = torch.randn(1, 9, 12, 16)
        everything = BRA(pad_mode="masked", topk=16)
        everything.load_state_dict(official.state_dict())
        query, key, value = (
            p.flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2) for p in official.qkv(x).chunk(3, -1)
        )
        dense = F.scaled_dot_product_attention(query, key, value, scale=16**-0.5).transpose(1, 2).reshape(x.shape)
        enhanced = official.lepe(official.qkv(x)[..., 32:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(everything(x), official.proj(dense + enhanced), rtol=1e-4, atol=1e-5)

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 1000), height=st.integers(1, 11), width=st.integers(1, 11), topk=st.integers(1, 9),
        pad_mode=st.sampled_from(["official", "masked"]),
    )  # fmt: skip
    def test_properties(self, seed, height, width, topk, pad_mode):
        """Images of a batch do not meet; the bias of the keys is nothing; float64 stays float64."""
        torch.manual_seed(seed)
        layer = BRA(n_win=3, topk=topk, pad_mode=pad_mode).double()
        x = torch.randn(2, height, width, 16, dtype=torch.float64)
        out = layer(x)
        torch.testing.assert_close(layer(x[1:])[0], out[1])
        with torch.no_grad():
            layer.qkv.bias[16:32] += 3
        torch.testing.assert_close(layer(x), out)
        assert out.dtype == torch.float64

    @pytest.mark.parametrize(
        "options",
        [
            {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
            {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 1},
            {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2},
            {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 1},
            {"soft_routing": True},
            {"soft_routing": True, "diff_routing": True},
            {"soft_routing": True, "diff_routing": True, "param_routing": True},
            {"qk_dim": 8, "qk_scale": 0.3, "param_attention": "qkv"},
            {"side_dwconv": 0},
            {"data_format": "NCHW"},
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_options(self, options):
        """Every option computes, and every parameter gets a gradient."""
        layer = BRA(**options)
        shape = (1, 16, 12, 8) if options.get("data_format") == "NCHW" else (1, 12, 8, 16)
        layer(torch.randn(shape)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())

    def test_detached_routing(self):
        """Without diff_routing no gradient reaches the router's way: soft weights are constants."""
        x = torch.randn(1, 8, 8, 16)
        gradients = []
        for differentiable in (False, True):
            torch.manual_seed(0)
            layer = BRA(soft_routing=True, diff_routing=differentiable)
            layer(x).square().sum().backward()
            gradients.append(layer.qkv.weight.grad)
        assert not torch.allclose(*gradients)

    def test_layouts(self):
        """Channels-last, sliced and transposed input give the same."""
        layer, x = BRA(), torch.randn(2, 8, 12, 16)
        expected = layer(x)
        torch.testing.assert_close(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), expected)
        torch.testing.assert_close(layer(torch.cat([x, x], -1)[..., :16]), expected)

    def test_edges(self):
        layer = BRA()
        assert layer(torch.randn(0, 8, 8, 16)).shape == (0, 8, 8, 16)
        assert layer(torch.ones(1, 8, 8, 16)).isfinite().all()
        x = torch.randn(1, 8, 8, 16)
        x[0, 0, 0, 0] = torch.nan
        assert layer(x).isnan().any()
        assert BRA().half()(torch.randn(1, 8, 8, 16).half() * 100).isfinite().all()

    def test_autocast(self):
        """Under bfloat16 the routing stays that of float32."""
        layer, x = BRA(), torch.randn(1, 16, 16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
            routed = layer.routing(x).index
        assert out.dtype == torch.bfloat16
        assert torch.equal(routed, layer.routing(x).index)
        torch.testing.assert_close(out.float(), layer(x), rtol=1.6e-2, atol=2e-2)

    def test_compile_export(self):
        layer, x = BRA().eval(), torch.randn(1, 13, 18, 16)
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_heads": 3}, ValueError, "dim=16 is not divisible by num_heads=3"),
            ({"qk_dim": 9}, ValueError, "qk_dim=9 is not divisible by num_heads=2"),
            ({"topk": 0}, ValueError, r"topk=0 is outside \[1, 16\]"),
            ({"topk": 17}, ValueError, r"topk=17 is outside \[1, 16\], the regions of a 4x4 grid"),
            ({"n_win": 0}, ValueError, "n_win=0 must be at least 1"),
            ({"side_dwconv": 4}, ValueError, "side_dwconv=4 is even"),
            ({"kv_downsample_mode": "fracpool"}, ValueError, "'fracpool' must be one of 'identity', 'ada_avgpool'"),
            ({"kv_downsample_mode": "ada_avgpool"}, ValueError, "needs kv_per_win >= 1, not None"),
            ({"qk_dim": 0}, ValueError, "qk_dim=0 must be at least 1"),
            ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 0}, ValueError, "ratio=0 must be at least 1"),
            ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of 'auto'"),
            ({"pad_mode": "none"}, ValueError, "pad_mode='none' must be one of 'official', 'masked'"),
            ({"data_format": "HWC"}, ValueError, "data_format='HWC' must be one of"),
            ({"diff_routing": True}, NotImplementedError, "set soft_routing=True"),
            ({"param_routing": True, "soft_routing": True}, ValueError, "nothing to learn from without diff_routing"),
            (
                {"pad_mode": "masked", "kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, ValueError,
                "pad_mode='masked' has no meaning with kv_downsample_mode='avgpool'",
            ),
        ],
    )  # fmt: skip
    def test_construction_errors(self, options, error, message):
        with pytest.raises(error, match=message):
            BRA(**options)

    @pytest.mark.parametrize(
        ("options", "shape", "message"),
        [
            ({}, (8, 8, 16), r"input has shape \[8, 8, 16\]; expected \[batch, height, width, dim\]"),
            ({}, (1, 8, 8, 12), "input has 12 channels; expected .* with dim=16"),
            ({}, (1, 0, 8, 16), "input has empty spatial size 0x8"),
            ({"auto_pad": False}, (1, 8, 9, 16), "a 8x9 map is not divisible by n_win=4; set auto_pad=True"),
            ({"data_format": "NCHW"}, (1, 16, 8, 3), "a 8x3 map has a side below n_win=4"),
            (
                {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 4}, (1, 8, 8, 16),
                r"kv_downsample_ratio=4 is larger than a region of \(2, 2\) tokens",
            ),
        ],
    )  # fmt: skip
    def test_input_errors(self, options, shape, message):
        with pytest.raises(ValueError, match=message):
            BRA(**options)(torch.randn(shape))

    def test_input_type(self):
        with pytest.raises(TypeError, match=r"input is torch.int64; expected a floating-point map"):
            BRA()(torch.ones(1, 8, 8, 16, dtype=torch.int64))

    def test_topk_above_ragged_regions(self):
        """The NCHW form may have more regions than n_win x n_win, never fewer."""
        assert BRA(data_format="NCHW", topk=16)(torch.randn(1, 16, 13, 18)).shape == (1, 16, 13, 18)

    def test_triton_needs_a_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match="Triton needs a GPU"):
            BRA(backend="triton")(torch.randn(1, 8, 8, 16))


class TestFullAttention:
    @pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
    def test_shapes(self, data_format):
        layer = FullAttention(16, data_format=data_format)
        shape = (2, 5, 7, 16) if data_format == "NHWC" else (2, 16, 5, 7)
        assert layer(torch.randn(shape)).shape == shape

    def test_errors(self):
        with pytest.raises(ValueError, match="dim=12 is not divisible by the 8 heads"):
            FullAttention(12)
        with pytest.raises(ValueError, match="input has 8 channels"):
            FullAttention(16)(torch.randn(1, 4, 4, 8))


class TestConvolutionalMixer:
    def test_reaches_two_pixels(self):
        layer = ConvolutionalMixer(4)
        x = torch.randn(1, 9, 9, 4)
        changed = x.clone()
        changed[0, 4, 4] += 1
        moved = (layer(changed) - layer(x)).abs().sum(-1)[0] > 1e-6
        assert moved[2:7, 2:7].all()
        assert int(moved.sum()) == 25


class TestRegionalRoutingAttention:
    def test_errors(self):
        x = torch.randn(1, 4, 6, 6)
        graph = torch.zeros(1, 2, 9, 1, dtype=torch.int64)
        run = partial(regional_routing_attention, x, x, x, region_size=(2, 2), scale=1.0)
        assert run(graph).shape == x.shape
        with pytest.raises(ValueError, match=r"region_graph has shape \[1, 9, 1\]"):
            run(graph[:, 0])
        with pytest.raises(ValueError, match=r"region_index spans \[9, 9\]; allowed is \[0, 8\]"):
            run(graph + 9)
        with pytest.raises(ValueError, match="channels divisible by 3 heads"):
            run(graph[:, :1].expand(1, 3, 9, 1))
        with pytest.raises(ValueError, match="region_index has shape"):
            run(graph[:, :, :5])
