"""Detection: both detectors, their losses and average precision, pictures in COCO's layout, and training."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import biformer.detection
from biformer.dense_data import ObjectPictures, open_objects, pair_up
from biformer.dense_recipes import DENSE_RECIPES
from biformer.detection import DetectionTask, detection_model, evaluate, load_detection_model, train
from visionkernels.checkpoints import CheckpointError

HEADS = ("retinanet", "maskrcnn")


def micro_model(head: str, **options):
    sizes = {"depth": (1,) * 4, "embed_dim": (32, 32, 64, 64), "topks": (1, 4, 4, -2), "n_win": 4}
    small = {"num_classes": 4, "min_size": 96, "max_size": 128, "pyramid_channels": 32, "regions_per_image": 32}
    return detection_model("biformer_tiny", head, **(small | sizes | options))


def micro_recipe(head: str, **fit):
    recipe = DENSE_RECIPES["biformer_micro_shapes_maskrcnn"]
    return replace(recipe, head=head, fit=replace(recipe.fit, **fit))


@pytest.fixture(scope="module")
def shapes() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Four pictures and their objects."""
    pictures = open_objects("shapes", "validation", num_classes=4)
    return pair_up([pictures[index] for index in range(4)])


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two splits of three pictures: a polygon and a crowd; nothing; a box without area."""
    polygon = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [4, 6, 8, 10], "iscrowd": 0, "area": 80}
    polygon["segmentation"] = [[4, 6, 12, 6, 12, 16, 4, 16]]
    crowd = {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 3], "iscrowd": 1, "area": 60}
    crowd["segmentation"] = {"size": [30, 20], "counts": [0, 3, *([27, 3] * 19), 27]}
    flat = {"id": 3, "image_id": 3, "category_id": 1, "bbox": [5, 5, 0, 4], "iscrowd": 0, "area": 0}
    flat["segmentation"] = [[5, 5, 5, 9, 5, 9]]
    content = {
        "images": [{"id": key, "file_name": f"{key}.png", "height": 30, "width": 20} for key in (1, 2, 3)],
        "annotations": [polygon, crowd, flat],
        "categories": [{"id": key, "name": str(key)} for key in (1, 2, 3)],
    }
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        for key in (1, 2, 3):
            Image.fromarray(np.full((30, 20, 3), 51 * key, np.uint8)).save(tmp_path / name / f"{key}.png")
        (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return tmp_path


class TestDetectionModel:
    @pytest.mark.parametrize(("head", "first"), [("retinanet", 8), ("maskrcnn", 4)])
    @pytest.mark.parametrize("size", [(96, 128), (75, 101)], ids=str)
    def test_levels(self, head, first, size):
        """Five levels, each half of the one before, rounded up."""
        maps = micro_model(head).backbone(torch.zeros(1, 3, *size))
        strides = [first * 2**level for level in range(5)]
        expected = [(1, 32, *(-(-side // stride) for side in size)) for stride in strides]
        assert [tuple(each.shape) for each in maps.values()] == expected

    def test_paper_settings(self):
        with torch.device("meta"):
            retinanet = detection_model("biformer_small", drop_path_rate=0.2)
            maskrcnn = detection_model("biformer_base", "maskrcnn")
        for model in (retinanet, maskrcnn):
            transform = model.transform
            assert (transform.min_size, transform.max_size, transform.size_divisible) == ((800,), 1333, 32)
            stages = model.backbone.stages
            assert stages.norm_eval
            assert {block.attn.n_win for stage in stages.model.stages[:3] for block in stage} == {16}
        assert retinanet.backbone.stages.out_indices == (1, 2, 3)
        assert retinanet.backbone.pyramid.extra_blocks.p6.in_channels == 512
        assert len(retinanet.head.classification_head.conv) == 4
        assert [sizes[0] for sizes in retinanet.anchor_generator.sizes] == [32, 64, 128, 256, 512]
        assert maskrcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
        assert maskrcnn.rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
        heads = maskrcnn.roi_heads
        assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == ((7, 7), (14, 14))
        assert (heads.box_head.fc6.in_features, heads.box_head.fc6.out_features) == (256 * 49, 1024)
        assert (heads.box_predictor.cls_score.out_features, heads.fg_bg_sampler.batch_size_per_image) == (91, 512)

    def test_level_6_comes_from_the_backbone(self):
        """Also where backbone and pyramid are equally wide, where torchvision would take level 5."""
        assert not micro_model("retinanet", pyramid_channels=64).backbone.pyramid.extra_blocks.use_P5

    @pytest.mark.parametrize("head", HEADS)
    def test_training_step(self, head, shapes):
        model = micro_model(head).train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        losses = DetectionTask(model)(*shapes)
        losses["loss"].backward()
        assert_close(losses["loss"], sum(value for name, value in losses.items() if name != "loss"))
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)  # BatchNorm's statistics stay

    @pytest.mark.parametrize("head", HEADS)
    def test_no_objects(self, head, shapes):
        images, targets = shapes
        empty = [{key: value[:0] for key, value in target.items()} for target in targets]
        loss = DetectionTask(micro_model(head).train())(images, empty)["loss"]
        loss.backward()
        assert torch.isfinite(loss)

    @pytest.mark.parametrize("head", HEADS)
    def test_loss_falls(self, head, shapes):
        images, targets = shapes
        task = DetectionTask(micro_model(head).train())
        optimizer = torch.optim.AdamW(task.parameters(), 2e-3)
        losses = []
        for _ in range(40):
            loss = task(images, targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        model = task.trainable_module.eval()
        if head == "retinanet":
            model.score_thresh = 0.0
        odd = [images[0], images[1][:, :77, :101]]
        for image, found in zip(odd, model(odd), strict=True):
            height, width = image.shape[-2:]
            count = len(found["boxes"])
            assert 0 < count <= 100
            assert (found["boxes"] >= 0).all() and (found["boxes"].amax(0) <= torch.tensor([width, height] * 2)).all()
            assert set(found["labels"].tolist()) <= {0, 1, 2, 3}
            if head == "maskrcnn":
                assert found["masks"].shape == (count, 1, height, width)
                assert found["masks"].min() >= 0 and found["masks"].max() <= 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "resnet50"}, "unknown model 'resnet50'; known: biformer_tiny"),
            ({"head": "yolo"}, "unknown head 'yolo'; known: retinanet, maskrcnn"),
            ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            detection_model(**({"name": "biformer_tiny"} | arguments))


class Oracle(nn.Module):
    """Finds what it was told, in order."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers, self.weight = iter(answers), nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return [next(self.answers)]


class TestEvaluate:
    def pictures(self, shapes) -> ObjectPictures:
        images, targets = shapes
        return ObjectPictures(lambda index: (images[index], targets[index]), len(images), lambda *sample: sample)

    def test_perfect(self, shapes):
        answers = [
            {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            for target in shapes[1]
        ]
        found = evaluate(Oracle(answers), self.pictures(shapes), show_progress=False)
        assert found == pytest.approx({"box_ap": 100, "box_ap50": 100, "box_ap75": 100})

    def test_wrong_classes(self, shapes):
        answers = [
            {"boxes": target["boxes"], "labels": target["labels"] % 3 + 1, "scores": torch.ones(len(target["labels"]))}
            for target in shapes[1]
        ]
        assert evaluate(Oracle(answers), self.pictures(shapes), show_progress=False)["box_ap"] < 50

    def test_missing_extra(self, shapes, monkeypatch):
        require = biformer.detection.require
        monkeypatch.setattr(
            biformer.detection, "require", lambda module, install: require(f"{module}_missing", install)
        )
        with pytest.raises(ImportError, match=r"pip install 'biformer\[dense\]'"):
            evaluate(Oracle([]), self.pictures(shapes))


class TestOpenObjects:
    def test_validation(self, coco):
        pictures = open_objects(coco, "validation", num_classes=91)
        assert len(pictures) == 3
        image, target = pictures[0]
        assert_close(image, torch.full((3, 30, 20), 0.2))
        assert target["boxes"].tolist() == [[4, 6, 12, 16], [0, 0, 20, 3]]
        assert (target["labels"].tolist(), target["iscrowd"].tolist()) == ([2, 3], [0, 1])
        assert (target["masks"].dtype, target["masks"].sum((1, 2)).tolist()) == (torch.uint8, [80, 60])
        assert target["masks"][0, 6:16, 4:12].all()
        _, empty = pictures[1]
        assert (empty["boxes"].shape, empty["masks"].shape) == ((0, 4), (0, 30, 20))

    def test_training(self, coco):
        pictures = open_objects(coco, "train", num_classes=91)
        assert len(pictures) == 1
        targets = [pictures[0][1] for _ in range(20)]
        assert {tuple(target["boxes"][0].tolist()) for target in targets} == {(4, 6, 12, 16), (8, 6, 16, 16)}
        for target in targets:
            left, top, right, bottom = target["boxes"][0].int().tolist()
            assert target["labels"].tolist() == [2]
            assert target["masks"][0, top:bottom, left:right].all() and target["masks"].sum() == 80

    def test_without_masks(self, coco):
        assert "masks" not in open_objects(coco, "train", num_classes=91, has_masks=False)[0][1]

    def test_shapes(self):
        _, target = open_objects("shapes", "validation", num_classes=4)[2]
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (left, top, right, bottom) == tuple(map(int, edges))

    def test_errors(self, coco, tmp_path):
        open_here = partial(open_objects, num_classes=91)
        with pytest.raises(FileNotFoundError, match=r"has no .*train2017; it must be in the layout of COCO"):
            open_here(tmp_path / "nowhere", "train")
        with pytest.raises(ValueError, match="category id 3; num_classes=3 must be above it"):
            open_here(coco, "train", num_classes=3)
        with pytest.raises(ValueError, match="num_classes=3 is too few for the 4 of the shapes"):
            open_here("shapes", "train", num_classes=3)
        (coco / "annotations/instances_val2017.json").write_text("{ no JSON")
        with pytest.raises(ValueError, match=r"instances_val2017.json is no annotation file of COCO"):
            open_here(coco, "validation")


class TestTrain:
    def test_retinanet(self, tmp_path):
        result = train(micro_recipe("retinanet", updates=20), None, tmp_path / "run")
        assert {"box_ap", "box_ap50", "box_ap75", "classification", "bbox_regression"} <= set(result.metrics)
        model = load_detection_model(result.weights)
        pictures = open_objects("shapes", "validation", num_classes=4, has_masks=False)
        measured = evaluate(model, pictures, show_progress=False)
        assert measured["box_ap"] == pytest.approx(result.metrics["box_ap"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("head", "metric", "least"), [("retinanet", "box_ap50", 30), ("maskrcnn", "mask_ap50", 50)]
    )
    def test_learns(self, tmp_path, head, metric, least):
        result = train(micro_recipe(head, updates=256), None, tmp_path / "run")
        assert result.metrics[metric] > least

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="has no data of its own; give --data FOLDER"):
            train(DENSE_RECIPES["biformer_small_coco_retinanet"], None, tmp_path / "run")
        torch.save({"model": {"stages.0.0.norm1.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other.pth holds no detection of `biformer train`"):
            load_detection_model(tmp_path / "other.pth")
