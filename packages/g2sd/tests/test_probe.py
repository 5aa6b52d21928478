"""Probes tell good features from poor ones, and leave the encoder as it is."""

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.cli import main
from g2sd.mae import MaskedAutoencoder
from g2sd.official import load_official
from g2sd.probe import Encoder, LinearProbeTask, encoder_of, linear_probe, nearest_neighbours, recipe_for, vote
from g2sd.recipes import RECIPES
from visionkernels import tasks
from visionkernels.testing.pictures import write_colours
from visionkernels.weights import open_trained, read_checkpoint, save_weights

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3}


@pytest.fixture
def student(tmp_path):
    """A student of generic distillation, as a file."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SIZES, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4)
    path = tmp_path / "student.safetensors"
    save_weights(path, model.state_dict(), metadata={})
    return path, model.eval()


def probe_recipe(**changes):
    recipe = RECIPES["linear_mnist5k"]
    fit = replace(recipe.fit, epochs=12, batch_size=8, device="cpu")
    pictures = replace(recipe.pictures, size=16, resize=16)
    return replace(recipe, data=None, fit=fit, pictures=pictures, **changes)


class TestEncoderOf:
    @pytest.mark.parametrize("pool", ["class", "mean"])
    def test_features(self, student, pool):
        path, model = student
        images = torch.randn(2, 3, 16, 16)
        tokens = model.forward_features(images)
        expected = tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1)
        encoder = encoder_of(path, img_size=16, pool=pool)
        torch.testing.assert_close(encoder(images), expected)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())

    def test_other_size(self, student):
        assert encoder_of(student[0], img_size=32)(torch.randn(1, 3, 32, 32)).shape == (1, 192)

    def test_errors(self, student):
        with pytest.raises(ValueError, match="pool='max' must be 'class' or 'mean'"):
            encoder_of(student[0], img_size=16, pool="max")


class TestRecipeFor:
    def test_a_file_of_a_run(self, runs, micro, pictures):
        """Its pictures and their changes."""
        recipe = recipe_for(runs["generic"])
        assert recipe.pictures == micro["generic"].pictures
        assert (recipe.data, recipe.augmentation.random_crop) == (str(pictures), False)
        assert recipe.fit == RECIPES["linear_small_in1k"].fit

    def test_other_files(self, student):
        """ImageNet's pictures, at the size that the positions are for."""
        recipe = recipe_for(student[0])
        assert (recipe.pictures.size, recipe.pictures.resize) == (16, 18)
        assert recipe.pictures.mean == RECIPES["linear_small_in1k"].pictures.mean

    def test_no_square(self, tmp_path):
        model = MaskedAutoencoder(**(SIZES | {"img_size": (16, 24)}), decoder_embed_dim=64, decoder_depth=1)
        save_weights(tmp_path / "w.safetensors", model.state_dict(), metadata={})
        with pytest.raises(ValueError, match="positions for 6 patches, which are no square"):
            recipe_for(tmp_path / "w.safetensors")


class TestVote:
    def test_definition(self):
        generator = torch.Generator().manual_seed(0)
        known, features = (torch.randn(n, 5, generator=generator) for n in (40, 9))
        labels = torch.arange(40) % 4
        found = vote(features, known, labels, num_classes=4, num_neighbours=7, queries_at_once=4)
        for query, named in zip(features, found, strict=True):
            cosines = F.cosine_similarity(query[None], known)
            nearest = sorted(range(40), key=lambda i: -float(cosines[i]))[:7]
            votes = [sum(float((cosines[i] / 0.07).exp()) for i in nearest if labels[i] == c) for c in range(4)]
            assert int(named) == max(range(4), key=votes.__getitem__)

    def test_small_temperature_is_the_nearest(self):
        known = torch.eye(3)
        found = vote(known + 0.1, known, torch.tensor([2, 0, 1]), num_classes=3, num_neighbours=3, temperature=1e-4)
        assert found.tolist() == [2, 0, 1]

    def test_errors(self):
        known, labels = torch.eye(3), torch.arange(3)
        with pytest.raises(ValueError, match="num_neighbours=4 must be 1 to the 3 samples"):
            vote(known, known, labels, num_classes=3, num_neighbours=4)
        with pytest.raises(ValueError, match="temperature=0 must be above 0"):
            vote(known, known, labels, num_classes=3, num_neighbours=1, temperature=0)


class TestNearestNeighbours:
    def test_colours(self, student, tmp_path):
        """Plain colours lie apart even for random features."""
        data = write_colours(tmp_path / "colours")
        found = nearest_neighbours(
            encoder_of(student[0], img_size=16, pool="mean"), data, probe_recipe().pictures, num_neighbours=1
        )
        assert found.top1 > found.majority_top1 + 20
        assert found.count > 0


class TestLinearProbe:
    def test_colours(self, student, tmp_path):
        """The classifier learns, the encoder does not change, and the file opens as a probe only."""
        path, model = student
        data = write_colours(tmp_path / "colours")
        result = linear_probe(probe_recipe(), data, tmp_path / "run", init=path)
        assert result.metrics["top1"] > result.metrics["majority_top1"]
        state = read_checkpoint(result.weights).state
        assert {"head.0.running_mean", "head.1.weight", "norm.weight"} <= set(state)
        torch.testing.assert_close(state["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight.detach())
        # measured as in training, with the images and the data that it was trained on
        measured = tasks.evaluate(open_trained(result.weights), None, device=torch.device("cpu"))
        assert measured["loss"] == pytest.approx(result.metrics["val_loss"], rel=1e-5)
        assert measured["top1"] == result.metrics["top1"]
        with pytest.raises(ValueError, match="holds 'probe'"):
            load_official(result.weights)

    def test_task_trains_the_classifier_alone(self):
        encoder = Encoder(timm.create_model("g2sd_vit_tiny_patch16_224", distilled=False, num_classes=0, **SIZES))
        task = LinearProbeTask(encoder, 4)
        task(torch.randn(4, 3, 16, 16), torch.arange(4))["loss"].backward()
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())

    def test_neighbours_of_a_probe(self, runs, pictures, tmp_path, capsys):
        """The frozen encoder has the neighbours that it had before; the data are by default those of the file."""
        recipe = replace(probe_recipe(), pictures=recipe_for(runs["generic"]).pictures)
        probed = linear_probe(recipe, pictures, tmp_path / "run", init=runs["generic"]).weights
        printed = set()
        for file, *flags in ((runs["generic"],), (probed,), (probed, "--data", str(pictures))):
            assert main(["probe", "knn", str(file), *flags]) == 0
            printed.add(capsys.readouterr().out)
        assert len(printed) == 1
