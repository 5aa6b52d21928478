"""Ops run from one seed, in one thread, with holes poisoned."""

from collections.abc import Iterator

import pytest
import torch

from visionkernels.testing.ops import poisoned_empty


@pytest.fixture(autouse=True)
def _deterministic_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with poisoned_empty():
        yield
