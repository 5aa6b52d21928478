"""What the bench times computes the same thing, and every ratio that is asked for has a row with its target."""

from dataclasses import asdict

import pytest
import torch

from g2sd import bench
from g2sd.generic import GenericDistiller
from visionkernels.profiling import Timing

TARGETS = {
    "channel-wise/official": 2.0, "channel-wise/two softmaxes": 1.2, "attention/plain": 2.0,
    "attention/biased": 2.0, "generic step/float32": 1.15, "generic step/bfloat16": 1.8,
    "two students": 1 / 0.75, "saved activations": 1 / 0.6,
}  # fmt: skip


@pytest.fixture
def once(monkeypatch, teacher, student):
    """Small models, and each candidate called a single time."""

    def call(candidates, **options):
        for candidate in candidates.values():
            candidate()
        return {name: Timing(1.0, 0.0, (1.0,)) for name in candidates}

    def distiller(*names):
        ours = GenericDistiller(teacher(decoder_depth=4), [student() for _ in names])
        return ours, torch.randn(8, 3, 32, 32), torch.rand(8, 16)

    monkeypatch.setattr(bench, "compare", call)
    monkeypatch.setattr(bench, "_distiller", distiller)


class TestMeasure:
    def test_rows(self, once):
        rows = list(bench.measure())
        found = {row.id: row.target for row in rows}
        assert {name: found.get(name) for name in TARGETS} == pytest.approx(TARGETS)
        assert len(found) == len(rows)
        for row in rows:
            fields = ["id", "ours_s", "baseline_s", "ratio", "target", "threads", "dtype", "shape", "note"]
            assert list(asdict(row)) == fields
            assert row.shape and row.note and row.threads == 1 and row.ratio > 0
            assert row.dtype == ("bfloat16" if "bfloat16" in row.id else "float32")

    def test_saved_activations(self, once):
        """Counted, not timed: ours keeps less at any size."""
        row = bench._saved()
        assert row.ours_s is None and row.ratio > 1.2

    def test_sizes(self, monkeypatch):
        """What is timed is the paper's teacher and student at 224 pixels."""
        made = []
        monkeypatch.setattr(bench, "create_autoencoder", lambda name, **options: made.append((name, options)) or Tiny())
        monkeypatch.setattr(bench, "GenericDistiller", lambda teacher, students: (teacher, students))
        _, images, noise = bench._distiller("mae_vit_small_patch16")
        assert made == [
            ("mae_vit_small_patch16", {"teacher_width": 768, "teacher_decoder_width": 512}),
            ("mae_vit_base_patch16", {}),
        ]
        assert images.shape == (8, 3, 224, 224) and noise.shape == (8, 196)


class Tiny:
    """Stands for a model that is only counted."""
