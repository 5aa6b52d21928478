"""Weights files of earlier releases open; the test keeps their metadata and shapes."""

from pathlib import Path

import pytest

from visionkernels.testing.weights import write_earlier_file
from visionkernels.weights import open_trained

FROZEN = Path(__file__).parent / "files" / "before_records.json"
DIGITS = tuple("0123456789")


@pytest.mark.parametrize("kind", ["classifier", "segmenter", "detector"])
def test_opens(tmp_path, kind):
    opened = open_trained(write_earlier_file(FROZEN, kind, tmp_path))
    trained = opened.trained
    assert (trained.kind, trained.model, trained.versions) == (kind, "biformer_tiny", {"biformer": "0.1.0"})
    assert trained.options["num_classes"] == (10 if kind == "classifier" else 4)
    assert trained.class_names == (DIGITS if kind == "classifier" else None)
    assert trained.settings["name"].startswith("biformer_micro_")


def test_inputs(tmp_path):
    """Images are prepared as they were in training."""
    opened = open_trained(write_earlier_file(FROZEN, "classifier", tmp_path))
    config = opened.model.pretrained_cfg
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 64, 64), 1.0, (0.1307,) * 3)
    segmenter = open_trained(write_earlier_file(FROZEN, "segmenter", tmp_path))
    assert (segmenter.trained.inputs["crop"], segmenter.trained.inputs["stride"]) == (128, 85)
