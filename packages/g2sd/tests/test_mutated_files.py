"""Official files whose tensors are missing, renamed, or of other shapes and types: a model, or an error of ours."""

from pathlib import Path
from random import Random

import pytest
import torch

from g2sd.inspection import inspect_file
from g2sd.official import load_classifier, load_encoder, load_official, load_teacher
from g2sd.opening import open_official
from g2sd.vit import DistilledViT
from visionkernels.checks import InputError
from visionkernels.testing.mutations import MutatedReader, assert_no_faults, mutated_state, read_mutations
from visionkernels.weights import CheckpointError, read_checkpoint

LAYOUTS = ("gd_tiny_all/teacher", "gd_tiny_all/student", "vit_distilled/model")


@pytest.fixture
def reader(official) -> MutatedReader:
    states = [official(layout) for layout in LAYOUTS]

    def write(folder: Path, random: Random) -> Path:
        torch.save({"model": mutated_state(random.choice(states), random)}, folder / "x.pth")
        return folder / "x.pth"

    return MutatedReader("g2sd states", write, read)


def read(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    calls = [
        lambda: load_official(checkpoint, num_heads=3, decoder_num_heads=4), lambda: load_official(checkpoint),
        lambda: load_classifier(checkpoint), lambda: load_teacher(checkpoint, num_heads=3, decoder_num_heads=4),
        lambda: open_official(checkpoint, None), lambda: inspect_file(path),
        lambda: load_encoder(DistilledViT(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3), checkpoint),
    ]  # fmt: skip
    refused = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            if not isinstance(error, InputError):
                raise
            refused.append(error)
    if refused:
        raise refused[0]


@pytest.mark.parametrize(
    ("key", "shape"),
    [("patch_embed.proj.weight", (48, 3, 0, 8)), ("patch_embed.proj.weight", (2**31 - 1, 3, 0, 8)),
     ("pos_embed", (1, 0, 48)), ("pos_embed", (48,)), ("decoder_pos_embed", (17,)), ("decoder_pos_embed", ()),
     ("decoder_embed.weight", (2**31 - 1, 0))],
)  # fmt: skip
def test_shapes(official, tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    """Patches, positions and widths of no size, and of others than two or three axes."""
    state = official("gd_tiny_all/teacher") | {key: torch.zeros(shape)}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=key):
        load_official(tmp_path / "x.pth", num_heads=3, decoder_num_heads=4)


def test_some(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(20)))


@pytest.mark.slow
def test_many(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(500), seed=1))
