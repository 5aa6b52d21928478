"""Networks by name."""

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from diswot import spaces
from diswot.models import create_network


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_networks.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=3, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Linear(width, num_classes))\n"
        "def nothing(**options): return 3\n"
        "size = 3\n"
        "def broken(num_classes): raise KeyError('theirs')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_networks"
    sys.modules.pop("their_networks", None)


class TestCreateNetwork:
    def test_timm(self):
        assert isinstance(create_network("resnet18", num_classes=7), timm.models.resnet.ResNet)
        assert create_network("s0_713", num_classes=7).get_classifier().out_features == 7
        assert create_network("cifar_resnet56").get_classifier().in_features == 64

    def test_torchvision(self):
        model = create_network("torchvision:resnet18", num_classes=7)
        assert isinstance(model, torchvision.models.ResNet)
        assert model.fc.out_features == 7
        assert create_network("torchvision:resnet18").fc.out_features == 1000

    @pytest.mark.parametrize(
        "name",
        [
            "s0:713",
            "nasbench201:|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|",
            f"timm_resnet:{next(spaces.create('timm_resnet').enumerate())}",
        ],
    )
    def test_space(self, name):
        model = create_network(name, num_classes=7)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)

    def test_options(self):
        assert create_network("s0:111", in_chans=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 100)
        assert create_network("s0_111", in_chans=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 100)

    def test_module(self, module):
        model = create_network(f"{module}:small", num_classes=9, width=5)
        assert isinstance(model, nn.Sequential)
        assert (model[1].in_features, model[1].out_features) == (5, 9)
        assert create_network(f"{module}:small")[1].out_features == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnet19", r"unknown model 'resnet19'; did you mean 'resnet\d+\w*'"),
            ("s0_712", r"unknown model 's0_712'; did you mean 's0_7\d\d'"),
            ("", "unknown model ''"),
            ("torchvision:resnet19", "unknown torchvision model 'resnet19'; did you mean 'resnet1"),
            ("torchvision:", "unknown torchvision model ''"),
            ("s0:712", "S0 key '712' has '2' at position 2; expected a depth among 1, 3, 5, 7"),
            ("nasbench201:|conv~0|", "conv"),
            (
                "no_such_module:f",
                "model 'no_such_module:f' cannot be imported: No module named 'no_such_module'; give a name of timm",
            ),
            ("math:network", "model 'math:network' cannot be imported: module 'math' has no attribute 'network'; give"),
            (
                ":f",
                "model ':f' cannot be imported: Empty module name; give a name of timm, torchvision:NAME",
            ),
            (".models:f", "model '.models:f' cannot be imported: .*; give a name of timm"),
            ("math:pi", "model 'math:pi' is a float, which cannot be called"),
        ],
    )
    def test_errors(self, name, message):
        with pytest.raises(ValueError, match=message):
            create_network(name)

    def test_what_a_module_gives(self, module):
        with pytest.raises(ValueError, match=f"model '{module}:nothing' gave a int; expected a torch.nn.Module"):
            create_network(f"{module}:nothing")
        with pytest.raises(ValueError, match=f"model '{module}:size' is a int, which cannot be called"):
            create_network(f"{module}:size")
        # a mistake of theirs is not hidden
        with pytest.raises(KeyError, match="theirs"):
            create_network(f"{module}:broken", num_classes=2)
