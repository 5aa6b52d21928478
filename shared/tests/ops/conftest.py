"""Ops run with holes poisoned, and with Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator

import pytest
import torch

from visionkernels.testing.ops import poisoned_empty

if not torch.cuda.is_available():
    # before any kernel is imported; the compiler itself is tested in a process of its own
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _deterministic_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with poisoned_empty():
        yield
