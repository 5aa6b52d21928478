"""Detection: both detectors, their losses and average precision, and training."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from biformer.detection import detection_model, train
from biformer.official import load_model
from biformer.recipes import RECIPES
from visionkernels.pictures.objects import collate_detection, open_objects
from visionkernels.tasks.detection import DetectionTask, evaluate
from visionkernels.weights import CheckpointError

HEADS = ("retinanet", "maskrcnn")


def micro_model(head: str, **options):
    sizes = {"depth": (1,) * 4, "embed_dim": (32, 32, 64, 64), "topks": (1, 4, 4, -2), "n_win": 4}
    small = {"num_classes": 4, "min_size": 96, "max_size": 128, "pyramid_channels": 32, "regions_per_image": 32}
    return detection_model("biformer_tiny", head, **(small | sizes | options))


def micro_recipe(head: str, **fit):
    recipe = RECIPES["biformer_micro_shapes_maskrcnn"]
    return replace(recipe, head=head, fit=replace(recipe.fit, **fit))


@pytest.fixture(scope="module")
def shapes() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Four pictures and their objects."""
    pictures = open_objects("shapes", "validation", num_classes=4)
    return collate_detection([pictures[index] for index in range(4)])


class TestDetectionModel:
    @pytest.mark.parametrize(("head", "first"), [("retinanet", 8), ("maskrcnn", 4)])
    @pytest.mark.parametrize("size", [(96, 128), (75, 101)], ids=str)
    def test_levels(self, head, first, size):
        """There are five levels, each half of the one before, rounded up."""
        maps = micro_model(head).backbone(torch.zeros(1, 3, *size))
        strides = [first * 2**level for level in range(5)]
        expected = [(1, 32, *(-(-side // stride) for side in size)) for stride in strides]
        assert [tuple(level.shape) for level in maps.values()] == expected

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
        """torchvision would take level 5 where backbone and pyramid are equally wide."""
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
        for image, objects in zip(odd, model(odd), strict=True):
            height, width = image.shape[-2:]
            count = len(objects["boxes"])
            assert 0 < count <= 100
            assert (objects["boxes"] >= 0).all() and (
                objects["boxes"].amax(0) <= torch.tensor([width, height] * 2)
            ).all()
            assert set(objects["labels"].tolist()) <= {0, 1, 2, 3}
            if head == "maskrcnn":
                assert objects["masks"].shape == (count, 1, height, width)
                assert objects["masks"].min() >= 0 and objects["masks"].max() <= 1

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


class TestEvaluate:
    @pytest.mark.slow
    def test_two_processes(self, tmp_path):
        """Two processes cannot share an odd number of images evenly."""
        run, script = tmp_path / "run", tmp_path / "measure.py"
        train(micro_recipe("maskrcnn", updates=1), None, run)
        script.write_text(_MEASURE)
        measured = []
        for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2"]):
            command = [sys.executable, *launcher, str(script), str(run)]
            ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            measured.append([json.loads(path.read_text()) for path in sorted(run.glob("rank*.json"))])
        (one,), both = measured
        assert one["box_ap"] > 0
        assert both == [pytest.approx(one)] * 2


_MEASURE = """
import datetime, json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
from visionkernels.pictures.objects import open_objects
from biformer.official import load_model
from visionkernels.tasks.detection import evaluate

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
pictures = replace(open_objects("shapes", "validation", num_classes=4), num_pictures=5)
run, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
measured = evaluate(load_model(run / "weights.safetensors"), pictures, show_progress=False)
(run / f"rank{rank}.json").write_text(json.dumps(measured))
"""


class TestTrain:
    def test_retinanet(self, tmp_path):
        result = train(micro_recipe("retinanet", updates=2), None, tmp_path / "run")
        assert {"box_ap", "box_ap50", "box_ap75", "classification", "bbox_regression"} <= set(result.metrics)
        model = load_model(result.weights)
        pictures = open_objects("shapes", "validation", num_classes=4, has_masks=False)
        measured = evaluate(model, pictures, show_progress=False)
        assert measured["box_ap"] == pytest.approx(result.metrics["box_ap"])

    @pytest.mark.slow
    def test_maskrcnn_learns(self, tmp_path):
        result = train(micro_recipe("maskrcnn", updates=256), None, tmp_path / "run")
        assert result.metrics["mask_ap50"] > 50

    @pytest.mark.slow
    def test_retinanet_learns(self, tmp_path):
        """The heads start with such small weights that narrow ones learn nothing in minutes."""
        recipe = replace(micro_recipe("retinanet", updates=256), pyramid_channels=160)
        optimizer = replace(recipe.fit.optimizer, lr=5e-4, clip_norm=1.0)
        result = train(replace(recipe, fit=replace(recipe.fit, optimizer=optimizer)), None, tmp_path / "run")
        assert result.metrics["box_ap50"] > 15

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="has no built-in data; give --data FOLDER"):
            train(RECIPES["biformer_small_coco_retinanet"], None, tmp_path / "run")
        torch.save({"model": {"stages.0.0.norm1.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other.pth fits none of biformer_tiny"):
            load_model(tmp_path / "other.pth")
