from dataclasses import asdict

import pytest
import timm
import torch

from biformer import bench
from biformer.baselines import straightforward_model


@pytest.mark.parametrize("gather", ["expanded", "index_select"])
def test_baseline_models_agree(gather):
    """What is timed side by side computes the same."""
    model = timm.create_model("biformer_tiny", depth=(1, 1, 1, 1), num_classes=5).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(straightforward_model(model, gather)(x), model(x))


def test_rows(monkeypatch):
    """Small rows of every kind: ids are unique, fields are those that the report reads."""
    sizes = (1, 8, 8, 16, 2, 2, 2)
    rows = list(bench._core_rows("tiny", sizes, 1, 1)) + list(bench._memory_rows("tiny", sizes))
    assert len({row.id for row in rows}) == len(rows) == 8
    fields = ["id", "ours_s", "baseline_s", "ratio", "target", "threads", "dtype", "shape", "note"]
    assert all(list(asdict(row)) == fields for row in rows)
    assert all(row.ratio > 0 for row in rows)


def test_memory_does_not_grow_with_topk():
    """The peak of the chunked path stays near its workspace; that of the gather grows with topk."""
    peaks = {}
    for topk in (2, 32):
        candidates = bench._core_candidates((1, 96, 96, 32, 16, topk, 2), True)
        peaks[topk] = {name: bench.peak_memory_bytes(candidates[name]) for name in ("ours", "index_select")}
    assert peaks[32]["ours"] < 1.5 * peaks[2]["ours"]
    assert peaks[32]["index_select"] > 5 * peaks[2]["index_select"]
