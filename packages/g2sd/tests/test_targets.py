"""Stored targets are the teacher's, for the masks that come with them."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder
from g2sd.masking import mask_patches
from g2sd.targets import StoredTargets, store_targets

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3, "decoder_depth": 2}


@pytest.fixture
def distiller():
    teacher = MaskedAutoencoder(**SIZES, decoder_embed_dim=16, decoder_num_heads=4)
    student = MaskedAutoencoder(**SIZES, decoder_embed_dim=8, decoder_num_heads=4, teacher_decoder_width=16)
    return GenericDistiller(teacher, student, teacher_layer=1)


@pytest.fixture
def pictures():
    return TensorDataset(torch.randn(5, 3, 16, 16), torch.zeros(5, dtype=torch.int64))


class TestStoreTargets:
    def test_are_the_teachers(self, distiller, pictures, tmp_path):
        stored = StoredTargets(pictures, store_targets(distiller, pictures, tmp_path / "t", batch_size=2))
        assert len(stored) == 5
        seen = set()
        for _ in range(12):
            image, noise, hidden = stored[3]
            seen.add(noise.sum().item())
            expected = distiller.target(image[None], mask_patches(noise[None], 0.75))[0]
            torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)  # float16 on disk
        assert 1 < len(seen) <= 4

    def test_loss_is_that_without(self, distiller, pictures, tmp_path):
        stored = StoredTargets(pictures, store_targets(distiller, pictures, tmp_path / "t"))
        image, noise, hidden = (each[None] for each in stored[0])
        found = distiller(image, noise, hidden=hidden).loss
        torch.testing.assert_close(found, distiller(image, noise).loss, rtol=1e-3, atol=1e-4)

    def test_goes_on(self, distiller, pictures, tmp_path):
        folder = store_targets(distiller, pictures, tmp_path / "t")
        before = (folder / "targets.npy").stat().st_mtime_ns
        store_targets(distiller, pictures, tmp_path / "t")
        assert (folder / "targets.npy").stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="holds targets with other seed; give another folder"):
            store_targets(distiller, pictures, tmp_path / "t", seed=1)
        distiller.teacher.mask_token.data += 1
        with pytest.raises(ValueError, match="holds targets with other teacher"):
            store_targets(distiller, pictures, tmp_path / "t")

    def test_interrupted(self, distiller, pictures, tmp_path):
        """What a kill leaves has no targets.json, and is computed anew."""
        folder = store_targets(distiller, pictures, tmp_path / "t")
        (folder / "targets.json").unlink()
        (folder / "targets.npy").write_bytes(b"half")
        assert len(StoredTargets(pictures, store_targets(distiller, pictures, tmp_path / "t"))) == 5

    def test_errors(self, distiller, pictures, tmp_path):
        with pytest.raises(ValueError, match="masks_per_picture=0 must be at least 1"):
            store_targets(distiller, pictures, tmp_path / "t", masks_per_picture=0)
        distiller.teacher.decoder_blocks[0].mlp.fc2.bias.data += 1e6
        with pytest.raises(ValueError, match="exceed float16"):
            store_targets(distiller, pictures, tmp_path / "t")
        assert not (tmp_path / "t" / "targets.json").exists()


class TestStoredTargets:
    def test_errors(self, distiller, pictures, tmp_path):
        with pytest.raises(ValueError, match="holds no targets"):
            StoredTargets(pictures, tmp_path)
        folder = store_targets(distiller, pictures, tmp_path / "t")
        with pytest.raises(ValueError, match=r"expected .*, for 4 images"):
            StoredTargets(TensorDataset(torch.zeros(4, 3, 16, 16)), folder)
        content = (folder / "targets.npy").read_bytes()
        (folder / "targets.npy").write_bytes(content[:-100])
        with pytest.raises(ValueError, match="holds no targets"):
            StoredTargets(pictures, folder)
        np.save(folder / "targets.npy", np.zeros((5, 4, 17, 16), np.float32))
        with pytest.raises(ValueError, match="has targets"):
            StoredTargets(pictures, folder)
        (folder / "targets.json").write_text(json.dumps([1]))
        with pytest.raises(ValueError, match="holds no targets"):
            StoredTargets(pictures, folder)
