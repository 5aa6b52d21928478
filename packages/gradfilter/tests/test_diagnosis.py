"""Diagnosis of layers with other padding than given zeros, and of layers that were built filtered."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from gradfilter import CompactConv2d, FilteredConv2d
from gradfilter.diagnosis import diagnose


class TestDiagnosis:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
    @pytest.mark.parametrize(
        ("conv", "pad"),
        [
            # columns 10, rows 9
            (lambda: Conv2dSame(3, 4, 3, stride=2), nn.ZeroPad2d((0, 1, 1, 1))),
            (lambda: Conv2dSame(3, 4, 4, stride=3), nn.ZeroPad2d((1, 2, 0, 1))),
            (lambda: nn.Conv2d(3, 4, 3, padding="same"), nn.ZeroPad2d(1)),
            (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), nn.ZeroPad2d((1, 2, 0, 1))),
            (lambda: nn.Conv2d(3, 4, 3, padding="valid"), nn.ZeroPad2d(0)),
            (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReflectionPad2d(1)),
        ],
        ids=["timm", "timm-even", "same", "same-even", "valid", "reflect"],
    )
    def test_padding(self, conv, pad):
        """Figures of the weight equal those for a map that was padded beforehand."""
        layer, x = conv(), torch.randn(2, 3, 9, 10)
        bare = nn.Conv2d(3, 4, layer.kernel_size, layer.stride)
        bare.load_state_dict(layer.state_dict())
        target = torch.randn_like(layer(x))
        compared = []
        for model in (nn.Sequential(layer), nn.Sequential(pad, bare)):
            (figures,) = diagnose(model, (x, target), lambda out, target: (out * target).sum()).layers
            assert 0 < figures.weight_error <= figures.weight_error_bound
            compared.append(
                [value for name, value in vars(figures).items() if name.startswith(("w", "gr", "input_en"))]
            )
        assert compared[0] == pytest.approx(compared[1])

    @pytest.mark.parametrize("conv", [Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, padding="same")], ids=str)
    def test_bound_with_covered_border(self, conv):
        x = torch.randn(2, 3, 5, 6)
        (layer,) = diagnose(
            nn.Sequential(conv), (x, torch.randn_like(conv(x))), lambda out, target: (out * target).sum(),
            border="covered",
        ).layers  # fmt: skip
        assert 0 < layer.weight_error <= layer.weight_error_bound

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    def test_own_layer(self, kind):
        """A layer that was built filtered is compared with its exact twin, and stays what it is."""
        layer, x = kind(3, 4, 3, padding=1, radius=4), torch.randn(2, 3, 9, 10)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
        (figures,) = diagnose(model, (x, None), lambda out, _: out.square().sum()).layers
        assert figures.radius == (4, 4) and figures.weight_error > 0.01
        assert type(layer) is kind

    def test_wrong_border(self):
        with pytest.raises(ValueError, match="border='x' must be 'plain' or 'covered'"):
            diagnose(nn.Conv2d(3, 4, 3), (torch.ones(1, 3, 9, 9), None), border="x")
