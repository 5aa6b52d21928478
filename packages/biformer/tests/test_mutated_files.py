"""Official files whose tensors are missing, renamed, or of other shapes and types: a model, or an error of ours."""

import json
from pathlib import Path
from random import Random

import pytest
import torch

from biformer.official import load_official, open_official
from visionkernels.testing.mutations import MutatedReader, assert_no_faults, mutated_state, read_mutations
from visionkernels.weights import CheckpointError, read_checkpoint

LAYOUTS = json.loads((Path(__file__).parent / "golden" / "state_layout.json").read_text())


def write(folder: Path, random: Random) -> Path:
    layout = LAYOUTS[f"{random.choice(('biformer_tiny', 'biformer_stl'))}_224"]
    state = mutated_state({key: torch.zeros(shape) for key, shape in layout.items()}, random)
    torch.save({random.choice(("model", "model_ema")): state}, folder / "x.pth")
    return folder / "x.pth"


def read(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    name = Random(path.stat().st_size).choice((None, None, "biformer_tiny", "biformer_stl"))
    load_official(checkpoint, name)
    open_official(checkpoint, name)


READER = MutatedReader("biformer states", write, read)


@pytest.mark.parametrize("shape", [(), (1000,), (2**31 - 1, 0), (0, 512), (2, 3, 4)])
@pytest.mark.parametrize("name", [None, "biformer_tiny"])
def test_heads(tmp_path: Path, shape: tuple[int, ...], name: str | None) -> None:
    """No model of billions of classes is made, and no head is left out."""
    state = {key: torch.zeros(size) for key, size in LAYOUTS["biformer_tiny_224"].items()}
    torch.save(state | {"head.weight": torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth is damaged: head\.weight has shape"):
        load_official(tmp_path / "x.pth", name)


def test_some() -> None:
    assert_no_faults(read_mutations(READER, range(8)))


@pytest.mark.slow
def test_many() -> None:
    assert_no_faults(read_mutations(READER, range(200), seed=1))
