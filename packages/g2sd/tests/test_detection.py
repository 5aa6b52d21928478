"""Detection: imitation of a teacher, the paper's settings, and training on shapes drawn on photographs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from g2sd.cli import main
from g2sd.detection import (
    DetectionDistillTask,
    DistilledDetector,
    detection_model,
    load_official_detection,
    train,
)
from g2sd.detection_losses import objectness_weighted_losses
from g2sd.inspection import inspect_file
from g2sd.jitter import large_scale_jitter
from g2sd.recipes import RECIPES, DetectionRecipe, DetectionSizes
from visionkernels.pictures import shapes
from visionkernels.pictures.objects import collate_detection, open_objects
from visionkernels.tasks.detection import evaluate
from visionkernels.training.optimization import create_optimizer
from visionkernels.weights import CheckpointError, read_checkpoint

SIZES = {
    "size": "tiny", "num_classes": 4, "img_size": 64, "depth": 2, "num_heads": 3, "embed_dim": 24, "window_size": 2,
    "window_blocks": (0,), "pretrain_size": 64, "drop_path_rate": 0.0, "pyramid_channels": 16, "head_width": 32,
    "regions_per_image": 16,
}  # fmt: skip
TEACHER = SIZES | {"pyramid_channels": 24}
ALL_PICTURES = dict(shapes.NUM_PICTURES)


def micro(mode=None, **fit) -> DetectionRecipe:
    """A recipe of few updates; a teacher's has a wider pyramid."""
    recipe = RECIPES["finetune_objects" if mode is None else "specific_objects"]
    model = DetectionSizes(**(TEACHER if mode is None else SIZES))
    changes = {"updates": 2, "device": "cpu", "evaluate_every_epochs": 1, "save_every_epochs": 1} | fit
    return replace(recipe, model=model, fit=replace(recipe.fit, **changes))


@pytest.fixture(autouse=True, scope="module")
def _few_pictures():
    """Keep evaluation short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.NUM_PICTURES, "validation", 8)
        yield


@pytest.fixture(scope="module")
def batch():
    """Four pictures of at most 64 pixels a side, and their objects."""
    torch.manual_seed(0)
    pictures = open_objects("shapes", "train", num_classes=4, steps=large_scale_jitter(64, (0.8, 1.2)))
    return collate_detection([pictures[index] for index in range(4)])


@pytest.fixture
def task() -> DetectionDistillTask:
    torch.manual_seed(0)
    return DetectionDistillTask(detection_model(**SIZES), detection_model(**TEACHER), ramp_updates=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The weights of a teacher of two updates."""
    return train(micro(), None, tmp_path_factory.mktemp("teacher")).weights


class TestDetectionDistillTask:
    def test_loss(self, task, batch):
        """The detector's own losses, and the weighted imitation times the ramp."""
        names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
        for update, ramp in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
            task.begin_update(update, 10)
            found = task(*batch)
            own = sum(found[name] for name in names)
            imitation = 0.001 * found["feature_imitation"] + 0.1 * found["objectness_imitation"]
            assert_close(found["loss"], own + ramp * imitation)

    def test_what_is_compared(self, task, batch):
        """The student's adapted pyramid with the teacher's own, of the same prepared pictures."""
        torch.manual_seed(1)
        found = task(*batch)
        torch.manual_seed(1)
        student = task.trainable_module
        outputs = student.model.outputs(*batch)
        told = task.teacher.maps(outputs.images)
        expected = objectness_weighted_losses(student.adapter(outputs.features), told[0], outputs.objectness, told[1])
        assert_close(found["feature_imitation"], expected.features)
        assert_close(found["objectness_imitation"], expected.objectness)
        assert [each.shape[1] for each in told[0]] == [24] * 5

    def test_only_the_student_learns(self, task, batch):
        task.train()
        assert task.trainable_module.training and not task.teacher.training
        task.begin_update(4, 10)
        task(*batch)["loss"].backward()
        assert [n for n, each in task.trainable_module.named_parameters() if each.grad is None] == []
        assert not any(each.requires_grad for each in task.teacher.parameters())

    def test_the_teacher_needs_no_labels(self, task, monkeypatch):
        """It computes its backbone and its objectness, and no proposals."""
        monkeypatch.setattr(task.teacher.roi_heads, "forward", None)
        monkeypatch.setattr(task.teacher.rpn, "forward", None)
        features, objectness = task.teacher.maps(torch.zeros(1, 3, 64, 64))
        assert len(features) == len(objectness) == 5

    def test_loss_falls(self, task, batch):
        task.begin_update(4, 10)
        optimizer = torch.optim.AdamW(task.trainable_module.parameters(), 5e-3)
        found = []
        for _ in range(20):
            losses = task(*batch)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            found.append({name: value.item() for name, value in losses.items()})
        # boxes and masks get harder while proposals get better
        for name, share in (("loss", 0.9), ("feature_imitation", 0.8), ("loss_objectness", 0.8)):
            assert found[-1][name] < share * found[0][name]

    def test_bfloat16(self, task, batch):
        task.begin_update(4, 10)
        torch.manual_seed(2)
        exact = task(*batch)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            found = task(*batch)
        assert {each.dtype for each in found.values()} == {torch.float32}
        for name in ("feature_imitation", "objectness_imitation"):
            assert found[name].item() == pytest.approx(exact[name].item(), rel=0.05)

    def test_layer_decay(self, index):
        """The paper's rate of every part of a detector of twelve blocks."""
        golden = index["vitdet_lr_decay"]
        model = DistilledDetector(detection_model(**(SIZES | {"depth": golden["num_layers"]})), 16)
        recipe = RECIPES["specific_small_coco"].fit.optimizer
        assert recipe.layer_decay == golden["lr_decay_rate"]
        optimizer = create_optimizer(model, recipe)
        scales = {id(each): group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
        decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        ours = {"stu_adapter.": "adapter.", "roi_heads.box_head.fc1": "model.roi_heads.box_head.5"}
        for official, scale in golden["values"].items():
            name = next((official.replace(*pair) for pair in ours.items() if official.startswith(pair[0])), None)
            parameter = model.get_parameter(name or f"model.{official}")
            assert scales[id(parameter)] == pytest.approx(scale), official
        assert decays[id(model.model.backbone.net.pos_embed)] == 0
        assert decays[id(model.model.roi_heads.box_head[5].weight)] == 0.05

    def test_errors(self):
        teacher = detection_model(**TEACHER)
        for options, message in (
            ({"feature_weight": -1}, "feature_weight=-1 must be at least 0"),
            ({"objectness_weight": -1}, "objectness_weight=-1 must be at least 0"),
            ({"ramp_updates": -1}, "ramp_updates=-1 must be at least 0"),
        ):
            with pytest.raises(ValueError, match=message):
                DetectionDistillTask(detection_model(**SIZES), teacher, **options)
        with pytest.raises(ValueError, match="teacher='the student' must be another detector"):
            DetectionDistillTask(teacher, teacher)
        larger = detection_model(**(SIZES | {"img_size": 96}))
        with pytest.raises(
            ValueError, match="teacher takes images of 64 pixels a side in patches of 16, the student of 96"
        ):
            DetectionDistillTask(larger, teacher)


class TestRecipes:
    @pytest.mark.parametrize("size", ["tiny", "small"])
    def test_paper(self, size):
        """The settings of section 5 of the specification."""
        recipe = RECIPES[f"specific_{size}_coco"]
        assert (recipe.mode, recipe.feature_weight, recipe.objectness_weight) == ("imitation", 0.001, 0.1)
        assert (recipe.ramp_updates, recipe.scale_range, recipe.model.img_size) == (500, (0.1, 2.0), 1024)
        fit, schedule = recipe.fit, recipe.fit.schedule
        assert (fit.updates, fit.batch_size, fit.precision) == (184_375, 64, "no")
        assert (fit.optimizer.lr, fit.optimizer.weight_decay, fit.optimizer.layer_decay) == (1e-4, 0.05, 0.7)
        assert (schedule.milestones, schedule.milestone_unit) == ((163_889, 177_546), "update")
        assert (schedule.warmup, schedule.warmup_lr) == (250, pytest.approx(1e-7))
        assert RECIPES[f"finetune_{size}_coco"].mode is None

    def test_errors(self):
        sizes = DetectionSizes()
        common = {"name": "x", "summary": "", "model": sizes, "fit": micro().fit}
        for options, message in (
            ({"mode": "hard"}, "mode='hard' must be imitation or None"),
            ({"feature_weight": -0.1}, "feature_weight=-0.1 must be at least 0"),
            ({"scale_range": (2.0, 1.0)}, r"scale_range=\(2.0, 1.0\) must be two rising numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                DetectionRecipe(**(common | options))
        with pytest.raises(ValueError, match="size='huge' must be one of"):
            DetectionSizes(size="huge")


class TestTrain:
    def test_files(self, teacher):
        """Weights in detectron2's layout, which tell all sizes; the metrics are those of `evaluate`."""
        run = json.loads((teacher.parent / "run.json").read_text())
        assert (run["trained"]["kind"], run["trained"]["details"]) == ("detector", {"is_ranked": True})
        state = read_checkpoint(teacher).state
        assert state["roi_heads.box_predictor.cls_score.weight"].shape == (4, 32)
        assert {key.split(".")[0] for key in state} == {"backbone", "proposal_generator", "roi_heads"}
        model = load_official_detection(teacher)
        assert (model.img_size, model.backbone.out_channels) == (64, 24)

    def test_with_a_teacher(self, teacher, tmp_path):
        result = train(micro("imitation"), None, tmp_path, teacher=teacher)
        for name in ("feature_imitation", "objectness_imitation", "box_ap", "mask_ap"):
            assert name in result.metrics
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["trained"]["details"]["teacher"] == str(teacher)
        assert not any("adapter" in key for key in read_checkpoint(result.weights).state)
        pictures = open_objects("shapes", "validation", num_classes=4)
        measured = evaluate(load_official_detection(result.weights), pictures, show_progress=False)
        assert measured["box_ap"] == pytest.approx(result.metrics["box_ap"])

    def test_goes_on_bit_for_bit(self, teacher, tmp_path):
        """Stopped within the ramp, whose place is not lost."""
        whole = train(micro("imitation", updates=4, save_every_updates=2), None, tmp_path / "whole", teacher=teacher)
        recipe = micro("imitation", updates=4, save_every_updates=2)
        stopped, seen = tmp_path / "stopped", []

        class StopError(Exception):
            pass

        original = DetectionDistillTask.begin_update

        def begin(self, update, total):
            seen.append(update)
            if len(seen) == 4:
                raise StopError
            original(self, update, total)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DetectionDistillTask, "begin_update", begin)
            with pytest.raises(StopError):
                train(recipe, None, stopped, teacher=teacher)
        result = train(recipe, None, stopped, teacher=teacher)
        assert seen == [0, 1, 2, 3]
        assert_close(read_checkpoint(result.weights).state, read_checkpoint(whole.weights).state, rtol=0, atol=0)

    def test_start(self, teacher, tmp_path):
        result = train(micro(updates=1), None, tmp_path, init=teacher)
        assert "vitdet" in json.loads((tmp_path / "run.json").read_text())["trained"]["details"]["started_from"]
        assert result.metrics["update"] == 1

    def test_errors(self, teacher, tmp_path, runs):
        with pytest.raises(ValueError, match="finetune_objects does not take --teacher"):
            train(micro(), None, tmp_path, teacher=teacher)
        with pytest.raises(ValueError, match="specific_objects has mode='imitation' and needs --teacher"):
            train(micro("imitation"), None, tmp_path)
        with pytest.raises(CheckpointError, match="holds 'generic', not a detector"):
            train(micro("imitation"), None, tmp_path, teacher=runs["generic"])
        with pytest.raises(ValueError, match="has no built-in data; give --data FOLDER"):
            train(RECIPES["finetune_tiny_coco"], None, tmp_path)
        with pytest.raises(ValueError, match="num_classes=3 is too few for the 4 of the shapes"):
            train(replace(micro(), model=DetectionSizes(**(SIZES | {"num_classes": 3}))), None, tmp_path)

    @pytest.mark.slow
    def test_learns(self, tmp_path):
        """A student that finds most shapes after a teacher's lessons; its losses fall from epoch to epoch."""

        def shortened(name):
            recipe = RECIPES[name]
            return replace(recipe, fit=replace(recipe.fit, updates=384, device="cpu", evaluate_every_epochs=1))

        told = train(shortened("finetune_teacher_objects"), None, tmp_path / "teacher")
        result = train(shortened("specific_objects"), None, tmp_path / "student", teacher=told.weights)
        losses = [epoch["loss"] for epoch in result.history]
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
        assert told.metrics["box_ap50"] > 50 and result.metrics["box_ap50"] > 40


@pytest.mark.slow
class TestTwoProcesses:
    def test_learns_and_measures(self, teacher, tmp_path, save_recipe, monkeypatch):
        """Both processes train one detector, and measure it as one process does."""
        # the processes measure all pictures
        monkeypatch.setattr(shapes, "NUM_PICTURES", ALL_PICTURES)
        recipe = save_recipe(micro("imitation", updates=4))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "g2sd", "train", recipe]
        command += ["--teacher", teacher, "--out", tmp_path / "run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout.count("weights: ")) == (0, 1), ran.stderr
        assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == 2
        (line,) = (tmp_path / "run/log.jsonl").read_text().splitlines()
        pictures = open_objects("shapes", "validation", num_classes=4)
        model = load_official_detection(tmp_path / "run/weights.safetensors")
        assert evaluate(model, pictures, show_progress=False)["box_ap"] == pytest.approx(json.loads(line)["box_ap"])


class TestCategories:
    """Classes are places of COCO's category ids."""

    @pytest.fixture
    def coco(self, tmp_path):
        """A picture to train and one to validate, with a square each."""
        (tmp_path / "annotations").mkdir()
        square = {"id": 1, "image_id": 1, "category_id": 90, "bbox": [8, 8, 30, 30], "area": 900, "iscrowd": 0}
        square["segmentation"] = [[8, 8, 38, 8, 38, 38, 8, 38]]
        for name in ("train2017", "val2017"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (64, 64)).save(tmp_path / name / "1.png")
            images = [{"id": 1, "file_name": "1.png", "height": 64, "width": 64}]
            content = {"images": images, "annotations": [square], "categories": [{"id": i} for i in (1, 3, 90)]}
            (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        return tmp_path

    def edit(self, coco, name, categories):
        file = coco / "annotations" / f"instances_{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": [{"id": i} for i in categories]}))

    def test_the_same_in_training_and_evaluation(self, coco, tmp_path, capsys):
        result = train(micro(updates=1, batch_size=1), coco, tmp_path / "run")
        assert read_checkpoint(result.weights).trained.details["category_ids"] == (1, 3, 90)
        command = ["eval", "--checkpoint", str(result.weights), "--data", str(coco)]
        assert main(command) == 0
        self.edit(coco, "val2017", (1, 90))
        assert main(command) != 0
        assert "trained for categories [1, 3, 90]" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"lists categories \(1, 3, 90\) to train and \(1, 90\) to validate"):
            train(micro(updates=1, batch_size=1), coco, tmp_path / "other")

    def test_ids_as_they_are(self, coco, tmp_path, capsys):
        """Told by the file, also after conversion."""
        sizes = DetectionSizes(**(TEACHER | {"num_classes": 91}))
        recipe = replace(micro(updates=1, batch_size=1), is_ranked=False, model=sizes)
        result = train(recipe, coco, tmp_path / "run")
        out = str(tmp_path / "run/w.pth")
        assert main(["convert", str(result.weights), "--to", "vitdet", "--out", out]) == 0
        assert read_checkpoint(out).trained.details["is_ranked"] is False
        assert main(["eval", "--checkpoint", out, "--data", str(coco)]) == 0


class TestCommands:
    def test_from_teacher_to_figures(self, teacher, tmp_path, save_recipe, capsys):
        recipe = save_recipe(micro("imitation"))
        assert (
            main(["distill", "specific", str(recipe), "--teacher", str(teacher), "--out", str(tmp_path / "run")]) == 0
        )
        assert "box ap50" in capsys.readouterr().out
        weights = tmp_path / "run/weights.safetensors"
        assert main(["eval", "--checkpoint", str(weights), "--data", "shapes", "--json", str(tmp_path / "m.json")]) == 0
        measured = json.loads((tmp_path / "m.json").read_text())
        assert {"box_ap", "box_ap50", "mask_ap75"} <= set(measured)
        assert main(["inspect", str(weights)]) == 0
        assert re.search(r"ViTDet detector.*3 classes.*eval --checkpoint", capsys.readouterr().out, re.DOTALL)

    def test_errors(self, teacher, tmp_path, save_recipe, capsys):
        recipe, out = save_recipe(micro("imitation")), ["--out", str(tmp_path / "run")]
        distill = ["distill", "specific", str(recipe), "--teacher", str(teacher), *out]
        assert main([*distill, "--loss", "hard"]) != 0
        assert "mode='hard' must be imitation or None" in capsys.readouterr().err
        assert main(["finetune", str(recipe), *out]) != 0
        assert "needs a teacher" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_backbone_is_no_detector(self, runs, tmp_path, capsys):
        assert main(["convert", str(runs["generic"]), "--to", "vitdet", "--out", str(tmp_path / "b.pth")]) == 0
        found = inspect_file(tmp_path / "b.pth")
        assert found.lacks == "a detector's heads" and not any("eval" in use for use in found.uses)
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(tmp_path / "b.pth"), "--data", "shapes"]) != 0
        assert "holds a backbone without heads, not a detector" in capsys.readouterr().err
