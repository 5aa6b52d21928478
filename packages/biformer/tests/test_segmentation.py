"""Segmentation: the model under both heads, its loss, inference and metrics, and training."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from biformer.official import load_model, official_rules
from biformer.recipes import RECIPES, SegmentationRecipe
from biformer.segmentation import SegmentationModel, segmentation_model, train
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, open_scenes
from visionkernels.tasks.segmentation import SegmentationTask, evaluate, predict
from visionkernels.weights import CheckpointError

HEADS = ("fpn", "upernet")
LAYOUT = json.loads((Path(__file__).parent / "golden" / "state_layout.json").read_text())
SCENE = SceneRecipe(short_side=96, long_side=192, crop=64, stride=40)


def micro_model(head: str, **options) -> SegmentationModel:
    sizes = {"depth": (1,) * 4, "embed_dim": (32, 32, 64, 64), "topks": (1, 4, 4, -2), "n_win": 4}
    options = {"num_classes": 4, "decoder_channels": 32, "scene": SCENE} | sizes | options
    return segmentation_model("biformer_tiny", head, **options)


def micro_recipe(head: str, **fit) -> SegmentationRecipe:
    recipe = RECIPES["biformer_micro_shapes_fpn"]
    return replace(
        recipe,
        head=head,
        auxiliary_weight=0.4 if head == "upernet" else 0.0,
        scene=replace(recipe.scene, short_side=96, long_side=128, crop=96, scale_range=(0.9, 1.2)),
        fit=replace(recipe.fit, **fit),
    )


def batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = open_scenes("shapes", "validation", replace(SCENE, short_side=64, long_side=96), num_classes=4)
    images, labels = zip(*(scenes[index] for index in range(count)), strict=True)
    return torch.stack(images), torch.stack(labels)


class TestSegmentationModel:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 70)], ids=str)
    def test_shapes(self, head, size):
        model = micro_model(head)
        images = torch.randn(2, 3, *size)
        assert model.eval()(images).shape == (2, 4, *size)
        assert [logits.shape for logits in model.train()(images)] == [(2, 4, *size)] * (2 if head == "upernet" else 1)

    @pytest.mark.parametrize("head", HEADS)
    def test_padding(self, head):
        model, image = micro_model(head).eval(), torch.randn(1, 3, 40, 90)
        padded = F.pad(image, (0, 6, 0, 24))
        assert_close(model(image), model(padded)[..., :40, :90], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("head", HEADS)
    def test_every_parameter_learns(self, head):
        model = micro_model(head).train()
        sum(logits.square().sum() for logits in model(torch.randn(2, 3, 64, 64))).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_paper_sizes(self):
        with torch.device("meta"):
            upernet = segmentation_model("biformer_small", drop_path_rate=0.3)
            fpn = segmentation_model("biformer_base", "fpn")
        assert [block[1][0].out_channels for block in upernet.decoder.psp.blocks] == [512] * 4
        assert [block[0].output_size for block in upernet.decoder.psp.blocks] == [1, 2, 3, 6]
        assert upernet.auxiliary[0][0].kernel_size == (3, 3)
        assert (upernet.auxiliary[0][0].in_channels, upernet.auxiliary[0][0].out_channels) == (256, 256)
        assert (upernet.classifier[0].p, upernet.classifier[1].in_channels, upernet.num_classes) == (0.1, 512, 150)
        assert (fpn.decoder.p5.in_channels, fpn.decoder.p5.out_channels) == (768, 256)
        assert (fpn.decoder.dropout.p, fpn.classifier[1].in_channels, fpn.auxiliary) == (0.1, 128, None)
        assert {block.attn.n_win for stage in fpn.backbone.model.stages[:3] for block in stage} == {8}

    def test_norms(self):
        """Only the stages' own norms lie between backbone and decoder."""
        keys = set(micro_model("upernet").state_dict())
        assert {f"backbone.extra_norms.{stage}.weight" for stage in range(4)} <= keys
        assert not any("feature_norms" in key for key in keys)

    def test_official_checkpoint(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        official = {
            key: torch.rand(shape, generator=generator) if shape else torch.tensor(3)
            for key, shape in LAYOUT["biformer_tiny_224"].items()
        }
        torch.save({"model": official}, tmp_path / "official.pth")
        model = segmentation_model("biformer_tiny", "fpn", num_classes=5, init=tmp_path / "official.pth")
        loaded = model.backbone.state_dict()
        renamed = official_rules(model.backbone).rename(
            {key: value for key, value in official.items() if not key.startswith(("norm.", "head."))}
        )
        assert {key for key in loaded if not key.startswith("extra_norms.")} == set(renamed)
        for key, value in renamed.items():
            assert torch.equal(loaded[key], value), key

    def test_smp_encoder(self):
        """Models registered in timm are also encoders for all decoders of segmentation-models-pytorch."""
        model = smp.Unet("tu-biformer_tiny", encoder_weights=None, classes=5).eval()
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 64, 96)

    def test_smp_dilated(self):
        model = smp.DeepLabV3Plus("tu-biformer_tiny", encoder_weights=None, classes=5).eval()
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 64, 96)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "resnet50"}, "unknown model 'resnet50'; known: biformer_tiny"),
            ({"head": "deeplab"}, "unknown head 'deeplab'; known: upernet, fpn"),
            ({"num_classes": 0}, "num_classes=0 must be 1 to 255"),
            ({"num_classes": 256}, "num_classes=256 must be 1 to 255"),
            ({"head": "fpn", "decoder_channels": 48}, "decoder_channels=48 must be a multiple of 32 for fpn"),
            ({"decoder_channels": 33}, "decoder_channels=33 must be a multiple of 2 for upernet"),
            ({"decoder_channels": 0}, "decoder_channels=0 must be a multiple of 2"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            segmentation_model(**({"name": "biformer_tiny"} | arguments))

    def test_input_error(self):
        with pytest.raises(ValueError, match=r"images have shape \[3, 64, 64\]"):
            micro_model("fpn")(torch.zeros(3, 64, 64))

    def test_missing_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.decoders", None)
        with pytest.raises(ImportError, match=r"pip install 'biformer\[dense\]'"):
            micro_model("fpn")


class TestSegmentationTask:
    def test_loss(self):
        model, (images, labels) = micro_model("upernet", dropout=0.0).train(), batch()
        labels[:, :9] = IGNORED
        losses = SegmentationTask(model, auxiliary_weight=0.4)(images, labels)
        main, auxiliary = (
            F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean() for logits in model(images)
        )
        assert_close(losses["main_loss"], main)
        assert_close(losses["loss"], main + 0.4 * auxiliary)
        assert losses["loss"].dtype == torch.float32

    def test_no_labels(self):
        model = micro_model("fpn").train()
        loss = SegmentationTask(model)(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), IGNORED))["loss"]
        loss.backward()
        assert loss.item() == 0
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    @pytest.mark.parametrize("head", HEADS)
    def test_loss_falls(self, head):
        images, labels = batch()
        task = SegmentationTask(micro_model(head).train())
        optimizer = torch.optim.AdamW(task.parameters(), 2e-3)
        losses = []
        for _ in range(30):
            loss = task(images, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]


class TestPredict:
    IMAGE = torch.linspace(-1, 1, 3 * 50 * 130).reshape(3, 50, 130).sin()

    def test_probabilities(self):
        model = micro_model("upernet", scene=replace(SCENE, test_scales=(0.5, 1.0), test_flip=True)).eval()
        probabilities = predict(model, self.IMAGE, model.scene)
        assert probabilities.shape == (4, 50, 130)
        assert_close(probabilities.sum(0), torch.ones(50, 130))
        assert_close(predict(model, self.IMAGE.flip(-1), model.scene).flip(-1), probabilities, rtol=0, atol=1e-6)


class TestTrain:
    @pytest.mark.slow
    def test_fpn_learns(self, tmp_path):
        metrics = train(micro_recipe("fpn", updates=150), None, tmp_path / "run").metrics
        assert metrics["miou"] > metrics["majority_miou"] + 5

    def test_fpn(self, tmp_path):
        recipe = micro_recipe("fpn", updates=2, batch_size=4)
        result = train(recipe, None, tmp_path / "run")
        model = load_model(result.weights)
        assert (model.scene, model.training) == (recipe.scene, False)
        scenes = open_scenes("shapes", "validation", recipe.scene, num_classes=4)
        measured = evaluate(model, scenes, model.scene, num_classes=4, show_progress=False)
        assert measured["miou"] == pytest.approx(result.metrics["miou"])

    @pytest.mark.slow
    def test_upernet(self, tmp_path):
        result = train(micro_recipe("upernet", updates=200), None, tmp_path / "run")
        assert result.metrics["miou"] > result.metrics["majority_miou"] + 10
        assert load_model(result.weights).auxiliary is not None

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="has no built-in data; give --data FOLDER"):
            train(RECIPES["biformer_small_ade20k_fpn"], None, tmp_path / "run")
        with pytest.raises(ValueError, match="batch_size=1 norms 1 pictures at a time; UperNet needs 2"):
            train(micro_recipe("upernet", batch_size=1), None, tmp_path / "run")
        torch.save({"model": {"stages.0.0.norm1.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other.pth fits none of biformer_tiny"):
            load_model(tmp_path / "other.pth")
