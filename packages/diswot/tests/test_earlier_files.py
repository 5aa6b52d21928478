"""Weights files of releases before the record open as what they are; each is frozen as metadata and shapes."""

from pathlib import Path

from visionkernels.testing.weights import write_earlier_file
from visionkernels.weights import open_trained

FROZEN = Path(__file__).parent / "files" / "before_records.json"
DIGITS = tuple("0123456789")


def test_opens(tmp_path):
    opened = open_trained(write_earlier_file(FROZEN, "classifier", tmp_path))
    trained = opened.trained
    assert (trained.kind, trained.model, trained.data) == ("classifier", "s0_111", "mnist5k")
    assert trained.class_names == opened.model.pretrained_cfg["label_names"] == DIGITS
    assert (trained.inputs["size"], trained.versions) == (28, {"diswot": "0.1.0"})
