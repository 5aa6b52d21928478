"""Files of every version of the format decode for ever, to the same samples."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import tinc

VERSIONS = sorted((Path(__file__).parent / "files").glob("v*"))
FILES = [(version, name) for version in VERSIONS for name in json.loads((version / "index.json").read_text())]


@pytest.mark.parametrize(("version", "name"), FILES, ids=[f"{version.name}-{name}" for version, name in FILES])
def test_decodes(version: Path, name: str) -> None:
    expected = json.loads((version / "index.json").read_text())[name]
    file = tinc.open(version / f"{name}.tinc")
    assert [list(file.shape), file.dtype.name] == [expected["shape"], expected["dtype"]]
    for level, digest in enumerate(expected["sha256"]):
        samples = np.ascontiguousarray(file.decode(level=level)).astype(file.dtype.newbyteorder("<"))
        assert hashlib.sha256(samples.tobytes()).hexdigest() == digest, level


def test_every_kind_is_there() -> None:
    parts = {key for version, name in FILES for key in tinc.open(version / f"{name}.tinc").info()}
    assert any(
        "background" in tinc.open(version / f"{name}.tinc").info().get("residual", {}) for version, name in FILES
    )
    assert {"tree", "residual", "exact", "metadata"} <= parts
