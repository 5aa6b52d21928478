"""When the parameters of a layer may be used without calling it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations

from visionkernels.modules import copy_module, is_plain, is_untouched
from visionkernels.testing.adapters import ADAPTERS


class _Scaled(torch.Tensor):
    """Stands for a quantised weight, which is another kind of tensor under the same name."""


def parent(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


class TestIsPlain:
    @pytest.mark.parametrize("bias", [True, False])
    def test_stock(self, bias: bool) -> None:
        linear, conv = nn.Linear(3, 4, bias=bias), nn.Conv2d(3, 4, 1, bias=bias)
        assert is_plain(linear, nn.Linear) and is_plain(conv, nn.Linear, nn.Conv2d)
        assert not is_plain(conv, nn.Linear)
        assert is_plain(linear.double().requires_grad_(False), nn.Linear)
        assert is_plain(fuse_conv_bn_eval(conv.eval(), nn.BatchNorm2d(4).eval()), nn.Conv2d)

    @pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
    def test_changed(self, change) -> None:
        model = parent(nn.Linear(3, 4))
        change(model, "0")
        assert not is_plain(model[0], nn.Linear)

    def test_weight_norm(self) -> None:
        assert not is_plain(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear)
        with pytest.warns(FutureWarning, match="weight_norm"):
            assert not is_plain(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear)

    def test_other_tensors(self) -> None:
        linear = nn.Linear(3, 4)
        linear.weight = nn.Parameter(torch.randn(4, 3).as_subclass(_Scaled))
        assert not is_plain(linear, nn.Linear)

    def test_functional_call(self) -> None:
        """Parameters that a call replaces are tensors, and the layer is as plain as before."""
        linear = nn.Linear(3, 4)
        seen = []

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                seen.append(is_plain(self.linear, nn.Linear))
                return self.linear(x)

        torch.func.functional_call(Model(), {"linear.weight": torch.zeros(4, 3)}, torch.ones(1, 3))
        assert seen == [True]


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_is_untouched(change: str) -> None:
    model = parent(nn.ReLU())
    assert is_untouched(model[0])
    ADAPTERS[change](model, "0")
    assert not is_untouched(model[0])


class TestCopyModule:
    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_computed_weights(self) -> None:
        """Pruned and normed layers are copied, also inside a list that the module keeps; the copy trains by itself."""
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
        ADAPTERS["pruning"](model, "1")
        x = torch.randn(2, 3)
        model.kept = [model(x)]
        copied = copy_module(model)
        torch.testing.assert_close(copied.kept[0], model.kept[0])
        assert not copied.kept[0].requires_grad
        torch.testing.assert_close(copied(x), model(x))
        copied(x).sum().backward()
        assert all(value.grad is not None for value in copied.parameters())
        assert all(value.grad is None for value in model.parameters())
        with torch.no_grad():
            copied[0].weight_g.zero_()
        assert not torch.equal(copied(x), model(x))

    def test_shared_parameters_stay_shared(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        copied = copy_module(model)
        assert copied[1].weight is copied[0].weight is not model[0].weight
