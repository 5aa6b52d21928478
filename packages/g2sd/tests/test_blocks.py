"""Blocks that keep less for the backward pass compute what timm's do, and give the same gradients."""

from functools import partial

import pytest
import torch
from timm.layers import Attention, LayerNorm, Mlp
from torch import nn

from g2sd.blocks import LeanAttention, LeanMlp, attend, create_block
from visionkernels.profiling import saved_activation_bytes
from visionkernels.testing.adapters import ADAPTERS
from visionkernels.testing.ops import TOLERANCES


def twins(ours, theirs, dtype=torch.float64):
    """Two modules of the same weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def run(module, x):
    """The output, and the gradients of input and parameters under fixed weights."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(2)
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (out * weights.to(out.dtype)).sum().backward()
    gradients = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_same(ours, theirs, x, dtype=torch.float64):
    rtol, atol = TOLERANCES[dtype][1]
    found, wanted = run(ours, x), run(theirs, x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol * max([1.0, *value.abs().flatten().tolist()])
        )


class TestLeanMlp:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1, 12), (2, 3, 2, 12), (0, 3, 12)], ids=str)
    def test_reference(self, shape, dtype):
        assert_same(*twins(LeanMlp(12, 20), Mlp(12, 20), dtype), torch.randn(shape, dtype=dtype), dtype)

    def test_not_contiguous(self):
        x = torch.randn(2, 12, 5, dtype=torch.float64).mT
        assert_same(*twins(LeanMlp(12, 20), Mlp(12, 20)), x)

    @pytest.mark.parametrize(
        "options",
        [
            {"drop": 0.5},
            {"drop": (0.0, 0.3)},
            {"act_layer": nn.ReLU},
            {"act_layer": partial(nn.GELU, approximate="tanh")},
            {"bias": False},
            {"bias": (False, True)},
            {"norm_layer": LayerNorm},
            {"out_features": 9},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_other_settings(self, options):
        """Whatever timm's module can, this one does alike, in training too."""
        ours, theirs = twins(LeanMlp(12, 20, **options), Mlp(12, 20, **options))
        assert_same(ours, theirs, torch.randn(3, 4, 12, dtype=torch.float64))

    @pytest.mark.parametrize("name", ["fc1", "fc2"])
    @pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
    def test_adapters(self, change, name):
        """The layers are called, whatever was done to them."""
        ours, theirs = LeanMlp(12, 48), Mlp(12, 48)
        for module in (ours, theirs):
            torch.manual_seed(4)
            change(module, name)
        assert_same(*twins(ours, theirs), torch.randn(3, 12, dtype=torch.float64))

    def test_use_conv(self):
        ours, theirs = twins(LeanMlp(12, 20, use_conv=True), Mlp(12, 20, use_conv=True))
        assert_same(ours, theirs, torch.randn(2, 12, 3, 4, dtype=torch.float64))

    @pytest.mark.parametrize("frozen", ["", "fc1.weight", "fc2.weight", "fc2.bias", "fc"], ids=lambda name: name or "-")
    def test_gradcheck(self, frozen):
        module = LeanMlp(3, 4).double()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *trained))
        assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, *trained))

    def test_autocast(self):
        """In bfloat16 both are as near to float64 as its rounding lets them."""
        ours, theirs = twins(LeanMlp(64, 128), Mlp(64, 128), torch.float32)
        x = torch.randn(5, 64)
        wide = run(twins(Mlp(64, 128), Mlp(64, 128))[0], x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found, plain = run(ours, x), run(theirs, x)
        for name, value in wide.items():
            assert found[name].dtype == plain[name].dtype
            errors = [(each[name].double() - value).norm() / value.norm() for each in (found, plain)]
            assert errors[0] < max(1.5 * errors[1], 0.01), name

    def test_keeps_less(self):
        ours, theirs = twins(LeanMlp(16, 64), Mlp(16, 64), torch.float32)
        x = torch.randn(100, 16)
        kept = [saved_activation_bytes(lambda module=module: module(x)) for module in (ours, theirs)]
        assert kept[1] - kept[0] == 100 * 64 * 4

    def test_compile_export(self):
        module, x = LeanMlp(12, 20), torch.randn(3, 5, 12)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same(compiled, module, x, torch.float32)
        exported = torch.export.export(module, (x,), strict=True).module()
        torch.testing.assert_close(exported(x), module(x))


class TestLeanAttention:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("tokens", "options"),
        [
            (1, {"num_heads": 3}),
            (17, {"num_heads": 3, "qkv_bias": True}),
            (50, {"num_heads": 1, "proj_bias": False}),
            (7, {"num_heads": 2, "attn_head_dim": 8, "dim_out": 10}),
        ],
    )
    def test_reference(self, tokens, options, dtype):
        ours, theirs = twins(LeanAttention(12, **options), Attention(12, **options), dtype)
        assert_same(ours, theirs, torch.randn(2, tokens, 12, dtype=dtype), dtype)

    def test_gradcheck(self):
        module = LeanAttention(4, 2, qkv_bias=True).double()
        x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()), fast_mode=True)

    def test_autocast(self):
        """The form with kept scores, which bfloat16 takes in training on a CPU, is as exact as timm's."""
        sizes = {"num_heads": 4, "qkv_bias": True}
        ours, theirs = twins(LeanAttention(32, **sizes), Attention(32, **sizes), torch.float32)
        x = torch.randn(2, 30, 32)
        wide = run(twins(Attention(32, **sizes), Attention(32, **sizes))[0], x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found, plain = run(ours, x), run(theirs, x)
        for name, value in wide.items():
            errors = [(each[name].double() - value).norm() / value.norm() for each in (found, plain)]
            assert errors[0] < max(1.5 * errors[1], 0.02), name

    def test_compile_export(self):
        module, x = LeanAttention(12, 3), torch.randn(2, 5, 12)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same(compiled, module, x, torch.float32)
        exported = torch.export.export(module, (x,), strict=True).module()
        torch.testing.assert_close(exported(x), module(x))

    def test_masks(self):
        module, x = LeanAttention(12, 3), torch.randn(2, 5, 12)
        for options in ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, {"is_causal": True}):
            with pytest.raises(ValueError, match="attn_mask='given' must be None"):
                module(x, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"qk_norm": True, "norm_layer": LayerNorm},
            {"scale_norm": True, "norm_layer": LayerNorm},
            {"gated": True},
            {"attn_drop": 0.1},
            {"proj_drop": 0.1},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_errors(self, options):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name}={value} must be left out"):
            LeanAttention(12, 3, **options)


class TestCreateBlock:
    def test_state(self, layouts):
        state = create_block(48, 6).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == layouts["block/block"]

    def test_definition(self):
        block = create_block(12, 3).double()
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        norm = partial(nn.functional.layer_norm, normalized_shape=(12,), eps=1e-6)
        after = x + block.attn(norm(x))
        wanted = after + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(norm(after))))
        torch.testing.assert_close(block(x), wanted)

    def test_no_parameter_without_gradient(self):
        block = create_block(12, 3)
        block(torch.randn(2, 7, 12)).sum().backward()
        assert [name for name, parameter in block.named_parameters() if parameter.grad is None] == []


class TestAttend:
    def test_goes_on(self):
        """From the projections of norm1(x) it is the block."""
        block = create_block(12, 3).double()
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        torch.testing.assert_close(attend(block, x, block.attn.qkv(block.norm1(x))), block(x))
