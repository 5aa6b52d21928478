"""Activations that keep less: values and gradients of their stock classes, at the stated size."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from gradfilter import lean
from visionkernels.profiling import saved_activation_bytes

EXACT = [(nn.ReLU(), lean.LeanReLU()), (nn.ReLU6(), lean.LeanReLU6())]
CODED = [(nn.Hardswish(), lean.LeanHardswish(), 0.004), (nn.SiLU(), lean.LeanSiLU(), 0.0025)]


def gradients(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    (grad,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, out.numel()).view(out.shape))
    return out.detach(), grad


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1003])
def test_bits(numel):
    mask = torch.rand(numel) > 0.4
    packed = lean.pack_bits(mask)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-numel // 8))
    assert torch.equal(lean.unpack_bits(packed, mask.shape), mask)


class TestExact:
    @pytest.mark.parametrize(("stock", "ours"), EXACT, ids=["relu", "relu6"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_gradients(self, stock, ours, layout):
        x = (4 * torch.randn(2, 5, 7, 3)).contiguous(memory_format=layout)
        # torch's own ReLU6 takes NaN this way or that, by the layout
        x[0, 0, 0] = torch.tensor([0.0, 6.0, torch.nan if isinstance(stock, nn.ReLU) else -1.0])
        for value, expected in zip(gradients(ours, x), gradients(stock, x), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(("stock", "ours"), EXACT, ids=["relu", "relu6"])
    def test_keeps_a_bit(self, stock, ours):
        x = torch.randn(2, 8, 16, 16, requires_grad=True)
        assert saved_activation_bytes(lambda: ours(x)) == x.numel() // 8
        assert saved_activation_bytes(lambda: ours(x.detach())) == 0
        assert saved_activation_bytes(lambda: stock(x)) == 4 * x.numel()

    @pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
    def test_dropout(self, p):
        x, layer = torch.ones(4, 1000), lean.LeanDropout(p)
        torch.manual_seed(0)
        out, grad = gradients(layer, x)
        expected = torch.linspace(-1, 1, 4000).view(4, 1000)
        torch.testing.assert_close(grad, expected * out)
        assert out.unique().tolist() == pytest.approx(sorted({0.0 if p else 1.0, *([1 / (1 - p)] if p < 1 else [])}))
        assert abs(float((out == 0).float().mean()) - p) < 0.05
        assert torch.equal(layer.eval()(x), x)

    @pytest.mark.parametrize(("stock", "ours"), EXACT, ids=["relu", "relu6"])
    def test_is_its_stock_class(self, stock, ours):
        assert isinstance(ours, type(stock))

    def test_no_axes_but_one(self):
        for shape in ((9,), (3, 4), (2, 3, 4)):
            out, grad = gradients(lean.LeanReLU(), torch.randn(shape))
            assert out.shape == grad.shape == shape


class TestCoded:
    @pytest.mark.parametrize(("stock", "ours", "error"), CODED, ids=["hardswish", "silu"])
    def test_gradients(self, stock, ours, error):
        x = torch.linspace(-9, 9, 5001)
        value, grad = gradients(ours, x)
        expected, exact = gradients(stock, x)
        torch.testing.assert_close(value, expected)
        # the output gradient is at most 1
        assert (grad - exact).abs().max() <= error

    @pytest.mark.parametrize(("stock", "ours", "error"), CODED, ids=["hardswish", "silu"])
    def test_keeps_a_byte(self, stock, ours, error):
        x = torch.randn(2, 8, 16, 16, requires_grad=True)
        assert saved_activation_bytes(lambda: ours(x)) == x.numel()

    @pytest.mark.parametrize(("stock", "ours", "error"), CODED, ids=["hardswish", "silu"])
    def test_second_derivative(self, stock, ours, error):
        """A byte an element has no curvature to tell, so that a gradient penalty raises."""
        x = torch.randn(8, requires_grad=True)
        (grad,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{type(ours).__name__} has no second derivative"):
            torch.autograd.grad(grad.square().sum() + x.sum(), x)

    def test_forward_is_the_stock_one(self):
        x = torch.linspace(-9, 9, 5001)
        for stock, ours, _ in CODED:
            assert torch.equal(ours(x.clone().requires_grad_()), stock(x))


class TestFrozenNorm:
    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
    def test_is_evaluation(self, kind):
        norm = kind(6)
        with torch.no_grad():
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
        norm.requires_grad_(False)
        x = torch.randn(3, 6, 5, 4)
        expected = gradients(norm.eval(), x)
        norm.__class__ = lean.frozen_norms()[kind]
        for value, exact in zip(gradients(norm.train(), x), expected, strict=True):
            torch.testing.assert_close(value, exact)

    def test_keeps_a_number_a_channel(self):
        norm = lean.FrozenBatchNorm2d(6).requires_grad_(False)
        x = torch.randn(3, 6, 5, 4, requires_grad=True)
        assert saved_activation_bytes(lambda: norm(x)) == 4 * 6

    @pytest.mark.parametrize("axes", [(), (7,), (3, 4, 5)], ids=str)
    def test_other_axes(self, axes):
        """A synchronised norm also takes other shapes than images."""
        norm, x = nn.SyncBatchNorm(6).eval().requires_grad_(False), torch.randn(4, 6, *axes)
        norm.running_mean.normal_()
        expected = norm(x)
        norm.__class__ = lean.frozen_norms()[nn.SyncBatchNorm]
        torch.testing.assert_close(norm(x), expected)

    def test_without_affine(self):
        norm = lean.FrozenBatchNorm2d(6, affine=False)
        x = torch.randn(3, 6, 5, 4)
        torch.testing.assert_close(norm(x), nn.BatchNorm2d(6, affine=False).eval()(x))


class TestHalfPrecision:
    @pytest.mark.parametrize(("stock", "ours", "bound"), CODED, ids=["hardswish", "silu"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_coded_slopes(self, stock, ours, bound, dtype):
        """Every slope near that of the same input in float32, at the ends of the code too."""
        x = torch.linspace(-8, 8, 4001).to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(ours(x).float().sum(), x)
        wide = x.detach().float().requires_grad_()
        (expected,) = torch.autograd.grad(stock(wide).sum(), wide)
        # the code, and the rounding of a slope near 1 to the type
        torch.testing.assert_close(grad.float(), expected, rtol=0, atol=bound + torch.finfo(dtype).eps)

    def test_frozen_norm(self):
        """As near to float32 as the stock norm, where mean and shift nearly cancel."""
        stock = nn.BatchNorm2d(4).eval()
        stock.running_mean.copy_(torch.tensor([3.0, 10.0, -7.0, 1.3]))
        stock.running_var.copy_(torch.tensor([0.03, 0.2, 0.5, 2.0]))
        x = torch.randn(2, 4, 8, 8) * stock.running_var.sqrt()[:, None, None] + stock.running_mean[:, None, None]
        x = x.bfloat16()
        ours = lean.FrozenBatchNorm2d(4).eval()
        ours.load_state_dict(stock.state_dict())
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0.008 * 2)
        assert ours(x).dtype == torch.bfloat16
