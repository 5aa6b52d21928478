from pathlib import Path

import pytest

from visionkernels.testing.pictures import write_colours


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three colours: 16 pictures each to train, 4 to validate."""
    return write_colours(tmp_path_factory.mktemp("pictures"))
