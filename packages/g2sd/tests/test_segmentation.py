"""Segmentation: files into models, recipes, distillation from a teacher, and training."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from g2sd.mae import MaskedAutoencoder
from g2sd.positions import interpolate_positions
from g2sd.recipes import RECIPES, SegmentationRecipe, SegmentationSizes
from g2sd.recipes.segmentation import SEGMENTATION
from g2sd.segmentation import (
    SegmentationDistillTask,
    load_official_segmentation,
    load_segmentation_encoder,
    segmentation_model,
    train,
)
from g2sd.segmentation_backbone import relative_index
from g2sd.segmentation_losses import channel_wise_loss, pixel_kl_loss
from g2sd.upernet import SegmentationModel
from visionkernels.pictures import shapes
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, open_scenes
from visionkernels.recipes import choose, settings
from visionkernels.tasks.segmentation import SegmentationTask, evaluate
from visionkernels.training.optimization import LearningRate, create_optimizer
from visionkernels.weights import CheckpointError

SPECIFIC = RECIPES["specific_shapes"]
BLOCKS = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 3}


@pytest.fixture(autouse=True, scope="module")
def _few_pictures() -> Iterator[None]:
    """Draw few pictures, and each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.NUM_PICTURES, "train", 128)
        patch.setitem(shapes.NUM_PICTURES, "validation", 24)
        patch.setattr(shapes, "read_shapes", cache(shapes.read_shapes))
        yield


def micro(**options) -> SegmentationModel:
    sizes = BLOCKS | {"out_indices": (0, 1, 2, 3), "img_size": 32, "num_classes": 4, "auxiliary_channels": 8}
    model = segmentation_model("tiny", **(sizes | {"drop_path_rate": 0.0, "dropout": 0.0} | options))
    for name, parameter in model.named_parameters():
        if name.endswith("table") or "gamma" in name:
            nn.init.normal_(parameter)
    return model


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 4, (count, 32, 32))
    labels[:, :5] = IGNORED
    return torch.randn(count, 3, 32, 32), labels


def with_indices(model: SegmentationModel) -> dict[str, Tensor]:
    """The state of a model as official files hold it."""
    index = model.backbone.relative_position_index
    blocks = range(len(model.backbone.blocks))
    return model.state_dict() | {f"backbone.blocks.{i}.attn.relative_position_index": index for i in blocks}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


class TestLoadOfficialSegmentation:
    OUT = (0, 1, 2, 3)

    def test_plain(self, tmp_path):
        model, images = micro().eval(), torch.randn(1, 3, 32, 32)
        torch.save({"state_dict": with_indices(model), "meta": {"iter": 3}}, tmp_path / "plain.pth")
        found = load_official_segmentation(tmp_path / "plain.pth", out_indices=self.OUT)
        assert_close(found(images), model(images), rtol=0, atol=0)
        assert (found.training, found.img_size, found.scene.crop) == (False, (32, 32), 32)

    @pytest.mark.parametrize("part", ["student", "teacher"])
    def test_distiller(self, tmp_path, part):
        models = {"student": micro().eval(), "teacher": micro(embed_dim=24).eval()}
        state = {"student_decode_head_conv_seg": torch.zeros(2, 4, 8, 8)} | {
            "teacher_decode_head_conv_seg": torch.ones(1)
        }
        for name, model in models.items():
            state |= prefixed(with_indices(model), name)
        torch.save({"state_dict": state}, tmp_path / "distiller.pth")
        found = load_official_segmentation(tmp_path / "distiller.pth", part=part, out_indices=self.OUT)
        assert_close(found.state_dict(), models[part].state_dict(), rtol=0, atol=0)

    def test_other_size(self, tmp_path):
        model = micro()
        torch.save(with_indices(model), tmp_path / "model.pth")
        found = load_official_segmentation(tmp_path / "model.pth", out_indices=self.OUT, img_size=48)
        assert found(torch.randn(1, 3, 48, 48)).shape == (1, 4, 48, 48)
        expected = interpolate_positions(model.backbone.pos_embed, (6, 6))
        assert_close(found.backbone.pos_embed, expected)
        tables = [each.backbone.blocks[1].attn.relative_position_bias_table for each in (found, model)]
        assert_close(tables[0][-3:], tables[1][-3:])

    def test_without_relative_positions(self, tmp_path):
        model = micro(has_relative_bias=False, init_values=None, auxiliary_channels=None)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        with pytest.raises(ValueError, match="a file of width 12 has no known number of heads"):
            load_official_segmentation(tmp_path / "model.pth", out_indices=self.OUT)
        found = load_official_segmentation(tmp_path / "model.pth", out_indices=self.OUT, num_heads=3)
        assert_close(found.state_dict(), model.state_dict())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"backbone.norm.weight": torch.ones(12)},
                "0 keys missing, 1 keys unexpected .first: backbone.norm.weight",
            ),
            ({"backbone.cls_token": torch.zeros(1, 1, 13)}, "1 keys misshapen .first: backbone.cls_token"),
            (
                {"backbone.blocks.2.attn.relative_position_index": relative_index((4, 4)).T},
                "blocks.2.* not the index of",
            ),
            ({"backbone.pos_embed": torch.zeros(1, 16, 12)}, "positions for 15 patches, which are no square"),
            ({"student.x": torch.zeros(1)}, "keys of neither student nor teacher"),
            ({"backbone.pos_embed": None}, "holds no segmentation model of G2SD: backbone.pos_embed missing"),
        ],
    )
    def test_errors(self, tmp_path, change, message):
        state = with_indices(micro()) | change
        torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=message):
            load_official_segmentation(tmp_path / "model.pth", out_indices=self.OUT)

    def test_other_files(self, tmp_path):
        encoder = MaskedAutoencoder(32, **BLOCKS, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
        torch.save({"model": encoder.state_dict()}, tmp_path / "mae.pth")
        with pytest.raises(CheckpointError, match=r"holds no segmentation model of G2SD.*; it holds 'mae'"):
            load_official_segmentation(tmp_path / "mae.pth")
        torch.save(micro().state_dict(), tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match="holds one model and no teacher"):
            load_official_segmentation(tmp_path / "model.pth", part="teacher")
        with pytest.raises(ValueError, match=r"out_indices=\(3, 5, 7, 11\) must be 4 rising numbers below depth=4"):
            load_official_segmentation(tmp_path / "model.pth")


class TestLoadSegmentationEncoder:
    @pytest.fixture
    def student(self) -> MaskedAutoencoder:
        heads = {"teacher_width": 16, "teacher_decoder_width": 8}
        return MaskedAutoencoder(24, **BLOCKS, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, **heads)

    def test_generic(self, tmp_path, student):
        torch.save({"model": student.state_dict(), "epoch": 1}, tmp_path / "generic.pth")
        model = micro()
        tables = [block.attn.relative_position_bias_table.clone() for block in model.backbone.blocks]
        told = load_segmentation_encoder(model.backbone, tmp_path / "generic.pth")
        assert "(generic)" in told
        assert_close(model.backbone.pos_embed, interpolate_positions(student.pos_embed, (4, 4)))
        assert model.backbone.pos_embed.requires_grad
        found, expected = model.backbone.state_dict(), student.state_dict()
        shared = [key for key in expected if key.startswith(("cls_token", "patch_embed", "blocks"))]
        assert_close({key: found[key] for key in shared}, {key: expected[key] for key in shared}, rtol=0, atol=0)
        assert_close([block.attn.relative_position_bias_table for block in model.backbone.blocks], tables)

    def test_same_features(self, tmp_path):
        """Without biases and layer scale the last map is the encoder's before its norm."""
        student = MaskedAutoencoder(32, **BLOCKS, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
        torch.save({"model": student.state_dict()}, tmp_path / "mae.pth")
        model = segmentation_model("tiny", **BLOCKS, out_indices=(0, 1, 2, 3), img_size=32).eval()
        load_segmentation_encoder(model.backbone, tmp_path / "mae.pth")
        images = torch.randn(2, 3, 32, 32)
        tokens = student.encode(images)[:, 1:].mT.unflatten(2, (4, 4))
        assert_close(model.backbone(images)[3], F.max_pool2d(tokens, 2))

    def test_errors(self, tmp_path, student):
        torch.save({"model": student.state_dict()}, tmp_path / "generic.pth")
        with pytest.raises(CheckpointError, match="misshapen"):
            load_segmentation_encoder(micro(embed_dim=24).backbone, tmp_path / "generic.pth")
        with pytest.raises(CheckpointError, match=r"blocks.4.norm1.weight"):
            load_segmentation_encoder(micro(depth=5).backbone, tmp_path / "generic.pth")
        torch.save(micro().state_dict(), tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match="holds 'mmseg', whose encoder starts no other kind"):
            load_segmentation_encoder(micro().backbone, tmp_path / "model.pth")


class TestSegmentationDistillTask:
    @pytest.mark.parametrize("mode", ["channel_wise", "pixel_kl"])
    def test_loss(self, mode):
        student, teacher, (images, labels) = micro(), micro(embed_dim=24), batch()
        task = SegmentationDistillTask(student, teacher, mode=mode, weight=2.0, temperature=1.5, auxiliary_weight=0.3)
        assert task.train().teacher.training is False
        found = task(images, labels)
        losses = SegmentationTask(student, auxiliary_weight=0.3)(images, labels)
        loss = {"channel_wise": channel_wise_loss, "pixel_kl": pixel_kl_loss}[mode]
        distillation = loss(student.class_maps(images)[0], teacher.class_maps(images)[0], temperature=1.5)
        assert_close(found["distillation_loss"], distillation)
        assert_close(found["main_loss"], losses["main_loss"])
        assert_close(found["loss"], losses["loss"] + 2.0 * distillation)
        assert_close(found["output"], losses["output"])

    def test_gradients(self):
        task = SegmentationDistillTask(micro(), micro(embed_dim=24)).train()
        task(*batch())["loss"].backward()
        assert [n for n, each in task.trainable_module.named_parameters() if each.grad is None] == []
        assert all(each.grad is None and not each.requires_grad for each in task.teacher.parameters())

    def test_other_classes(self):
        """A 1x1 convolution meets the teacher's classes; the loss is divided by the student's, 4 of 6."""
        student, teacher, (images, labels) = micro(), micro(num_classes=6), batch()
        task = SegmentationDistillTask(student, teacher).train()
        align = task.trainable_module.align
        aligned = align(student.class_maps(images)[0])
        found = task(images, labels)["distillation_loss"]
        assert_close(found, channel_wise_loss(aligned, teacher.class_maps(images)[0]) * 6 / 4)
        found.backward()
        assert align.weight.grad.any()
        assert set(task.final_state(task.trainable_module.state_dict())) == set(student.state_dict())

    def test_no_labels(self):
        images, labels = batch()
        found = SegmentationDistillTask(micro(), micro()).train()(images, torch.full_like(labels, IGNORED))
        assert (found["main_loss"].item(), bool(found["loss"].isfinite())) == (0, True)

    def test_autocast(self):
        task, (images, labels) = SegmentationDistillTask(micro(), micro()).train(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            found = task(images, labels)
        found["loss"].backward()
        assert {found[name].dtype for name in ("loss", "main_loss", "distillation_loss")} == {torch.float32}
        assert all(each.grad.isfinite().all() for each in task.trainable_module.parameters())

    def test_layer_decay(self):
        recipe = RECIPES["specific_tiny_ade20k"]
        with torch.device("meta"):
            models = [segmentation_model(**recipe.model.options()) for _ in range(2)]
        module = SegmentationDistillTask(*models).trainable_module
        optimizer = create_optimizer(module, recipe.fit.optimizer)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        scales, decays = {}, {}
        for group in optimizer.param_groups:
            for each in group["params"]:
                scales[names[id(each)]], decays[names[id(each)]] = group["lr_scale"], group["weight_decay"]
        assert scales["model.backbone.pos_embed"] == pytest.approx(0.65**13)
        assert scales["model.backbone.patch_embed.proj.bias"] == pytest.approx(0.65**13)
        for block in range(12):
            assert scales[f"model.backbone.blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.65 ** (12 - block))
        for name in ("backbone.fpn1.0.weight", "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"):
            assert scales[f"model.{name}"] == 1
        assert (decays["model.backbone.cls_token"], decays["model.decode_head.conv_seg.weight"]) == (0, 0.05)
        rate = LearningRate(optimizer, recipe.fit.schedule, updates_per_epoch=1263, total_updates=160_000)
        for update, expected in ((0, 1e-10), (750, 0.5e-4), (80_000, 0.5e-4), (159_999, 1e-4 / 160_000)):
            rate.set(update)
            assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "hard"}, "mode='hard' must be one of 'channel_wise', 'pixel_kl'"),
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
            ({"weight": -1.0}, "weight=-1.0 must be at least 0"),
            ({"reduction": "none"}, "reduction='none' must be one of"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            SegmentationDistillTask(micro(), micro(), **options)

    def test_other_grid(self):
        with pytest.raises(
            ValueError, match="teacher has 5x5 patches of images of 40x40 pixels, the student 4x4 of 32x32"
        ):
            SegmentationDistillTask(micro(), micro(img_size=40))


class TestRecipes:
    @pytest.mark.parametrize("name", [recipe.name for recipe in SEGMENTATION])
    def test_read_back(self, tmp_path, name):
        recipe = RECIPES[name]
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"recipe": asdict(recipe.fit), "details": {"settings": settings(recipe)}}))
        assert choose(str(path), RECIPES) == recipe
        with torch.device("meta"):
            model = segmentation_model(img_size=recipe.scene.crop, **recipe.model.options())
        assert model.num_classes == recipe.model.num_classes

    def test_paper(self):
        for size in ("tiny", "small"):
            recipe = RECIPES[f"specific_{size}_ade20k"]
            assert (recipe.mode, recipe.weight, recipe.temperature, recipe.auxiliary_weight) == (
                "channel_wise",
                3,
                1,
                0.4,
            )
            assert (recipe.fit.updates, recipe.fit.batch_size, recipe.scene.crop, recipe.scene.stride) == (
                160_000, 16, 512, 341,
            )  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mode": "nkd"}, "mode='nkd' must be channel_wise, pixel_kl or None"),
            ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
            ({"scene": SceneRecipe()}, "scene.inference='whole' must be 'slide'"),
            ({"scene": SceneRecipe(crop=500, inference="slide")}, "scene.crop=500 must be a multiple of patch_size=8"),
        ],
    )
    def test_errors(self, change, message):
        with pytest.raises(ValueError, match=message):
            replace(SPECIFIC, **change)

    def test_size_errors(self):
        with pytest.raises(ValueError, match="size='huge' must be one of"):
            SegmentationSizes(size="huge")
        with pytest.raises(ValueError, match=r"dropout=1 must be in \[0, 1\)"):
            SegmentationSizes(dropout=1)


def short(name: str, *, lr: float = 4e-3, **fit) -> SegmentationRecipe:
    recipe = RECIPES[name]
    optimizer = replace(recipe.fit.optimizer, lr=lr)
    return replace(
        recipe,
        fit=replace(recipe.fit, **({"updates": 100, "batch_size": 4, "device": "cpu", "optimizer": optimizer} | fit)),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Weights of a teacher that was trained for a moment."""
    torch.set_num_threads(1)
    return train(short("finetune_teacher_shapes", updates=4), None, tmp_path_factory.mktemp("teacher")).weights


class TestTrain:
    def test_distillation(self, tmp_path, teacher):
        recipe = short("specific_shapes", updates=4)
        result = train(recipe, None, tmp_path / "run", teacher=teacher)
        assert {"main_loss", "distillation_loss", "miou", "majority_miou"} <= set(result.metrics)
        model = load_official_segmentation(result.weights)
        assert (model.scene, model.backbone.embed_dim) == (recipe.scene, 24)
        scenes = open_scenes("shapes", "validation", recipe.scene, num_classes=4)
        other = load_official_segmentation(result.weights, img_size=32).scene
        assert (other.crop, other.stride, other.short_side) == (32, 21, 64)
        measured = evaluate(model, scenes, model.scene, num_classes=4, show_progress=False)
        assert measured["miou"] == pytest.approx(result.metrics["miou"])

    @pytest.mark.slow
    def test_learns(self, tmp_path):
        teacher = train(short("finetune_teacher_shapes"), None, tmp_path / "teacher").weights
        result = train(short("specific_shapes", updates=132), None, tmp_path / "run", teacher=teacher)
        first, *_, last = result.history
        assert last["main_loss"] < 0.8 * first["main_loss"]
        assert last["distillation_loss"] < first["distillation_loss"]
        assert result.metrics["miou"] > result.metrics["majority_miou"] + 10

    @pytest.mark.slow
    def test_recipes(self, tmp_path):
        """The student learns more from a teacher than alone."""
        recipes = [RECIPES[f"{name}_shapes"] for name in ("finetune_teacher", "specific", "finetune")]
        big = train(recipes[0], None, tmp_path / "teacher")
        taught = train(recipes[1], None, tmp_path / "taught", teacher=big.weights)
        alone = train(recipes[2], None, tmp_path / "alone")
        assert big.metrics["miou"] > big.metrics["majority_miou"] + 30
        assert taught.metrics["miou"] > alone.metrics["miou"] + 5

    def test_loss_falls(self, teacher):
        """On a few pictures, a few tens of updates."""
        recipe = short("specific_shapes")
        scenes = open_scenes("shapes", "train", recipe.scene, num_classes=4)
        images, labels = (torch.stack(each) for each in zip(*(scenes[index] for index in range(4)), strict=True))
        student = segmentation_model(img_size=64, **recipe.model.options())
        lively = load_official_segmentation(teacher)
        nn.init.normal_(lively.decode_head.conv_seg.weight, std=0.08)
        task = SegmentationDistillTask(student, lively).train()
        optimizer = torch.optim.AdamW(task.trainable_module.parameters(), 5e-3)
        maps = task.teacher.class_maps(images)[0].detach()
        floor = channel_wise_loss(maps, maps).item()
        main, above = [], []
        for _ in range(40):
            losses = task(images, labels)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            main.append(losses["main_loss"].item())
            above.append(losses["distillation_loss"].item() - floor)
        assert main[-1] < 0.5 * main[0]
        assert 0 < above[-1] < 0.5 * above[0]

    def test_start(self, tmp_path):
        student = MaskedAutoencoder(
            32, 8, embed_dim=24, depth=4, num_heads=3, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
            teacher_decoder_width=8,
        )  # fmt: skip
        torch.save({"model": student.state_dict()}, tmp_path / "generic.pth")
        recipe = short("finetune_shapes", updates=2)
        result = train(recipe, None, tmp_path / "run", init=tmp_path / "generic.pth")
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert "generic.pth (generic)" in run["trained"]["details"]["started_from"]
        found = load_official_segmentation(result.weights).backbone.blocks[0].attn.qkv.weight
        # moved a little from where it started
        assert 0 < (found - student.blocks[0].attn.qkv.weight).abs().max() < 0.01

    def test_errors(self, tmp_path, teacher):
        with pytest.raises(ValueError, match="recipe specific_shapes has mode='channel_wise' and needs --teacher"):
            train(SPECIFIC, None, tmp_path / "run")
        with pytest.raises(ValueError, match="recipe finetune_shapes does not take --teacher"):
            train(RECIPES["finetune_shapes"], None, tmp_path / "run", teacher=teacher)
        with pytest.raises(ValueError, match="recipe finetune_tiny_ade20k has no built-in data; give --data FOLDER"):
            train(RECIPES["finetune_tiny_ade20k"], None, tmp_path / "run")
        with pytest.raises(ValueError, match="batch_size=1 norms 1 pictures at a time; UperNet needs 2"):
            train(short("finetune_shapes", batch_size=1), None, tmp_path / "run")
        assert not (tmp_path / "run").exists()
