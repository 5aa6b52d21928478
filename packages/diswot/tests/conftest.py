"""Seeds, one thread, and small networks that several tests score."""

import pytest
import timm
import torch
from torch import Tensor, nn

import diswot.networks  # noqa: F401 - registers the models
from visionkernels.testing.fixtures import reproducible  # noqa: F401 - every test uses it


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 16, 16), torch.arange(6) % 5


@pytest.fixture
def s0():
    """Makes networks of S0 with five classes."""

    def make(key: str = "111", **options) -> nn.Module:
        return timm.create_model(f"s0_{key}", num_classes=5, **options)

    return make


@pytest.fixture(scope="session")
def photos() -> None:
    pytest.importorskip("skimage", reason="the patches come with scikit-image")
