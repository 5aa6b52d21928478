"""Seeds, one thread, and small networks that several tests score."""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import diswot.networks  # noqa: F401 - registers the models


@pytest.fixture(autouse=True)
def _one_thread_and_seeds() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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
