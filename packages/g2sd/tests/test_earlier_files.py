"""Weights files of releases before the record open as what they are; each is frozen as metadata and shapes."""

from pathlib import Path

import pytest

from visionkernels.testing.weights import write_earlier_file
from visionkernels.weights import open_trained

FROZEN = Path(__file__).parent / "files" / "before_records.json"
DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("file", "kind", "data"),
    [
        ("autoencoder", "autoencoder", "mnist5k"),
        ("generic", "autoencoder", "mnist5k"),
        ("probe", "probe", "mnist5k"),
        ("classifier", "classifier", "mnist5k"),
        ("segmenter", "segmenter", "shapes"),
        ("detector", "detector", "shapes"),
    ],
)
def test_opens(tmp_path, file, kind, data):
    trained = open_trained(write_earlier_file(FROZEN, file, tmp_path)).trained
    assert (trained.kind, trained.data) == (kind, data)
    assert trained.class_names == (DIGITS if kind in ("probe", "classifier") else None)
    if data == "mnist5k":
        assert (trained.inputs["size"], trained.inputs["mean"]) == (28, (0.1307,) * 3)
