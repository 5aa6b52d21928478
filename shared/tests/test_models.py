"""A model by name: what is built, and what the error says of a name that is none."""

import pytest
import torch
import torchvision
from torch import nn

from visionkernels import models
from visionkernels.checks import InputError


def build(width=3, num_classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))


@pytest.mark.parametrize("name", ["test_resnet", "timm:test_resnet", "torchvision:squeezenet1_0", f"{__name__}:build"])
def test_names(name):
    model = models.create(name, num_classes=7)
    images = torch.randn(2, 3, 1, 1) if name.endswith("build") else torch.randn(2, 3, 64, 64)
    assert model.eval()(images).shape == (2, 7)
    assert models.create(name) is not None


def test_options():
    assert models.create(f"{__name__}:build", width=5)[1].in_features == 5
    assert models.create("test_resnet", in_chans=1, num_classes=0).conv1[0].in_channels == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_resnt", "unknown model 'test_resnt'; did you mean 'test_resnet'"),
        ("timm:test_resnt", "unknown model 'test_resnt'; did you mean 'test_resnet'"),
        ("", "unknown model ''"),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; did you mean 'resnet1"),
        ("no_such_module:f", "model 'no_such_module:f' cannot be imported: No module named"),
        ("math:network", "model 'math:network' cannot be imported: module 'math' has no attribute 'network'"),
        ("math:pi", "model 'math:pi' is a float, which cannot be called"),
        (":f", "model ':f' cannot be imported: Empty module name; give a name of timm, torchvision:NAME or module:"),
        ("os:getcwd", "model 'os:getcwd' gave a str; expected a torch.nn.Module"),
    ],
)
def test_errors(name, message):
    with pytest.raises(InputError, match=message):
        models.create(name)


def test_published_weights(monkeypatch):
    """Where they cannot be had, the error says which and why; a callable has none."""
    with pytest.raises(InputError, match=r"pretrained weights are published by timm and torchvision; math:hypot"):
        models.create("math:hypot", pretrained=True)

    def fail(*_, **__):
        from urllib.error import URLError

        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(InputError, match=r"weights of torchvision:resnet18 cannot be had: no network"):
        models.create("torchvision:resnet18", pretrained=True)
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("offline\nmore")))
    with pytest.raises(InputError, match=r"published weights of test_resnet cannot be had: offline$"):
        models.create("test_resnet", pretrained=True)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("test_resnet", "fc"),
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v2", "classifier.1"),
        ("torchvision:squeezenet1_0", "classifier.1"),
        (f"{__name__}:build", "1"),
    ],
)
def test_classifier_name(name, classifier):
    assert models.classifier_name(models.create(name)) == classifier


def test_no_classifier():
    with pytest.raises(InputError, match="ReLU has no classifier"):
        models.classifier_name(nn.ReLU())


def test_is_callable():
    assert models.is_callable("math:hypot")
    assert not any(map(models.is_callable, (None, "resnet18", "timm:resnet18", "torchvision:resnet18")))
    assert not models.is_callable("s0:111", sources=("s0",))
