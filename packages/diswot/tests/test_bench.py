"""What the bench compares with computes the same."""

import pytest
import timm
import torch

from diswot.baselines import dense_semantic, looped_nst, plain_score
from diswot.data import patches
from diswot.initialisation import draws_of, initialise
from diswot.losses import create
from diswot.scoring import TeacherCache
from diswot.similarity import semantic_loss


def test_losses() -> None:
    pair = torch.randn(2, 230, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense_semantic(*pair), semantic_loss(*pair))
    maps = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(looped_nst(*maps), create("nst")([maps[0]], [maps[1]]))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_score(init: str) -> None:
    batch = patches(8)
    teacher, student = timm.create_model("s0_131"), timm.create_model("s0_113")
    found = TeacherCache(teacher, [batch], 1, init).score(student, key="113")  # type: ignore[arg-type]
    for network, key in ((teacher, "teacher"), (student, "113")):
        initialise(network.train(), init, draws_of(0, key, "own"))  # type: ignore[arg-type]
    semantic, relation = plain_score(teacher, student, *batch)
    assert found.semantic == pytest.approx(semantic, rel=1e-4) and found.relation == pytest.approx(relation, rel=1e-4)
