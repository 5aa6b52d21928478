"""Weights files of earlier releases open; the test keeps their metadata and shapes."""

from pathlib import Path

import pytest

from visionkernels.testing.weights import write_earlier_file
from visionkernels.weights import open_trained

FROZEN = Path(__file__).parent / "files" / "before_records.json"
DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("kind", "model", "options"),
    [
        ("classifier", "torchvision:resnet18", {"num_classes": 10}),
        ("segmenter", "resnet18", {"head": "pspnet", "num_classes": 4}),
        ("digits", "tinyconv", {"widths": (16, 32, 64), "reduction": 1}),
    ],
)
def test_opens(tmp_path, kind, model, options):
    trained = open_trained(write_earlier_file(FROZEN, kind, tmp_path)).trained
    assert (trained.kind, trained.model, trained.options) == (kind, model, options)
    assert trained.versions == {"gradfilter": "0.1.0"}
    assert trained.class_names == (DIGITS if kind == "classifier" else None)
