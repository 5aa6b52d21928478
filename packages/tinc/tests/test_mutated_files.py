"""Readers return data or raise errors that they document, whatever a file holds: thousands of mutated files of each.

A fault names its reader, seed and index; `read_mutations(reader, range(index, index + 1), seed=seed)` repeats it.
"""

from pathlib import Path

import pytest

from visionkernels.testing.golden import load_module
from visionkernels.testing.mutations import MutatedReader, assert_no_faults, read_mutations

FOLDER = Path(__file__).parent
READERS: list[MutatedReader] = [
    *load_module(FOLDER / "mutated_volumes.py").VOLUME_READERS,
    *load_module(FOLDER / "mutated_codes.py").CODE_READERS,
]
by_reader = pytest.mark.parametrize("reader", READERS, ids=[reader.name.replace(" ", "_") for reader in READERS])


@by_reader
def test_some(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(15)))


@pytest.mark.slow
@by_reader
def test_many(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(1500), seed=1))
