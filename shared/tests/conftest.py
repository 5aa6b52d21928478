"""Every test starts from the same random numbers."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    torch.manual_seed(0)
