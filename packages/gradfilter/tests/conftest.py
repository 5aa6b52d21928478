"""Seeds, one thread, no network, and a small network of every kind of layer."""

import pytest
import torch
from torch import Tensor, nn

from visionkernels.testing.fixtures import reproducible  # noqa: F401 - every test uses it


class Net(nn.Module):
    """Four convolutions, the second depthwise, one ReLU called twice, and an activation called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2, self.relu6 = nn.BatchNorm2d(8), nn.ReLU6()
        self.middle = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.norm3 = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        x = self.relu6(self.norm2(self.depthwise(x)))
        x = self.relu(self.norm3(self.middle(x)))
        x = torch.relu(self.last(x))
        return self.head(self.dropout(x.mean((2, 3))))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 12)
