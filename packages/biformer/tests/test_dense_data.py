"""Pictures for segmentation and detection: in the layouts of ADE20K and COCO, and drawn shapes."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from biformer.data import CorruptPictureError
from biformer.dense_data import (
    IGNORED,
    CorruptAnnotationError,
    aligned_size,
    draw_shapes,
    open_objects,
    open_scenes,
)
from biformer.dense_recipes import SceneRecipe

SCENE = SceneRecipe(short_side=96, long_side=192, crop=64, stride=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures in ADE20K's layout; labels 0 (none) to 3 in four quarters."""
    quarters = np.kron(np.array([[0, 1], [2, 3]], dtype=np.uint8), np.ones((24, 32), np.uint8))
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(np.stack([60 * quarters] * 3, -1)).save(tmp_path / f"images/{split}/{name}.jpg")
            Image.fromarray(quarters).save(tmp_path / f"annotations/{split}/{name}.png")
    return tmp_path


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


class TestOpenScenes:
    def test_folder(self, folder):
        scenes = open_scenes(folder, "validation", SCENE, num_classes=3)
        image, labels = scenes[1]
        assert len(scenes) == 2
        assert (image.shape, labels.shape, labels.dtype) == ((3, 48, 64), (48, 64), torch.int64)
        assert [labels[y, x].item() for y, x in ((0, 0), (0, 63), (47, 0), (47, 63))] == [IGNORED, 0, 1, 2]
        assert_close(
            image[:, 47, 63], (180 / 255 - torch.tensor(SCENE.mean)) / torch.tensor(SCENE.std), rtol=0, atol=0.05
        )

    def test_training_crops(self, folder):
        scene = SceneRecipe(
            short_side=48, long_side=64, crop=80, stride=53, scale_range=(0.5, 2.0), max_class_share=0.6
        )
        scenes = open_scenes(folder, "train", scene, num_classes=3)
        samples = [scenes[0] for _ in range(20)]
        assert {(tuple(image.shape), tuple(labels.shape)) for image, labels in samples} == {((3, 80, 80), (80, 80))}
        assert all(set(labels.unique().tolist()) <= {0, 1, 2, IGNORED} for _, labels in samples)
        # what lies outside the picture is mean colour without a label
        labels = next(labels for _, labels in samples if (labels[-1] == IGNORED).all())
        assert (labels != IGNORED).any()

    def test_order_does_not_matter(self):
        scenes = open_scenes("shapes", "train", SCENE, num_classes=4)
        torch.manual_seed(1)
        first = scenes[5]
        scenes[6]
        torch.manual_seed(1)
        assert_close(scenes[5], first, rtol=0, atol=0)

    def test_has_an_end(self):
        scenes = open_scenes("shapes", "validation", SCENE, num_classes=4)
        assert_close(scenes[-1], scenes[31])
        with pytest.raises(IndexError):
            scenes[32]

    def test_errors(self, folder, tmp_path):
        open_here = partial(open_scenes, scene=SCENE, num_classes=3)
        with pytest.raises(FileNotFoundError, match=r"has no pictures .*images/training"):
            open_here(tmp_path / "nowhere", "train")
        with pytest.raises(CorruptAnnotationError, match="label 3; there are 2 classes"):
            open_here(folder, "validation", num_classes=2)[0]
        with pytest.raises(ValueError, match="num_classes=3 is too few for the 4 of the shapes"):
            open_here("shapes", "train")
        (folder / "annotations/validation/a.png").write_bytes(b"no picture")
        with pytest.raises(CorruptAnnotationError, match=r"annotation .*a.png cannot be read"):
            open_here(folder, "validation")[0]
        Image.new("L", (5, 5)).save(folder / "annotations/validation/a.png")
        with pytest.raises(ValueError, match=r"shape \(5, 5\); its picture is \(48, 64\)"):
            open_here(folder, "validation")[0]
        (folder / "images/training/a.jpg").write_bytes(b"no picture")
        with pytest.raises(CorruptPictureError, match=r"picture .*a.jpg cannot be read"):
            open_here(folder, "train")[0]
        (folder / "annotations/validation/a.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks 1 annotations; the first is .*a.png"):
            open_here(folder, "validation")

    def test_error_of_a_loading_process_is_one_line(self, folder):
        scenes = open_scenes(folder, "validation", SCENE, num_classes=2)
        with pytest.raises(CorruptAnnotationError) as caught:
            list(DataLoader(scenes, batch_size=None, num_workers=1))
        assert str(caught.value) == f"annotation {folder}/annotations/validation/a.png has label 3; there are 2 classes"


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
        for data in (coco, "shapes"):
            assert "masks" not in open_objects(data, "train", num_classes=91, has_masks=False)[0][1]

    def test_what_is_not_needed(self, coco):
        """Files of other tools leave out iscrowd, and segmentation where they have boxes alone."""
        edit(coco, lambda content: [each.pop("iscrowd") for each in content["annotations"]])
        assert open_objects(coco, "validation", num_classes=91)[0][1]["iscrowd"].tolist() == [0, 0]
        edit(coco, lambda content: [each.pop("segmentation") for each in content["annotations"]])
        assert len(open_objects(coco, "validation", num_classes=91, has_masks=False)[0][1]["boxes"]) == 2

    def test_shapes(self):
        _, target = open_objects("shapes", "validation", num_classes=4)[2]
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (left, top, right, bottom) == tuple(map(int, edges))

    def test_missing_files(self, coco, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no .*train2017; it must be in the layout of COCO"):
            open_objects(tmp_path / "nowhere", "train", num_classes=91)
        (coco / "train2017/1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks 1 pictures; the first is .*train2017/1\.png"):
            open_objects(coco, "train", num_classes=91)

    def test_too_few_classes(self, coco):
        with pytest.raises(ValueError, match="category id 3; num_classes=3 allows 1 to 2"):
            open_objects(coco, "train", num_classes=3)
        with pytest.raises(ValueError, match="num_classes=3 is too few for the 4 of the shapes"):
            open_objects("shapes", "train", num_classes=3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category_id": 0}, "has category id 0; num_classes=91 allows 1 to 90"),
            ({"category_id": 91}, "has category id 91; num_classes=91 allows 1 to 90"),
            ({"category_id": "2"}, "has category id '2'; num_classes=91 allows 1 to 90"),
            ({"bbox": [1, 2, 3]}, "has a bbox that is not four numbers"),
            ({"bbox": [1, 2, 3, float("nan")]}, "has a bbox that is not four numbers"),
            ({"bbox": "left"}, "is no annotation file of COCO: ValueError"),
            ({"bbox": [1, 2, 0.5, 9]}, "has no objects of a pixel or more a side"),
            ({"image_id": 99}, "has no objects"),
            ({"iscrowd": 1}, "has no objects"),
            ({"segmentation": []}, "has annotation 1 without segmentation, which masks need"),
        ],
        ids=str,
    )
    def test_annotations(self, coco, change, message):
        edit(coco, lambda content: [each.update(change) for each in content["annotations"]])
        with pytest.raises(ValueError, match=rf"instances_val2017\.json {message}"):
            open_objects(coco, "validation", num_classes=91)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{ no JSON", "is no annotation file of COCO: JSONDecodeError"),
            ("[]", "is no annotation file of COCO: AssertionError"),
            ("{}", "is no annotation file of COCO: KeyError 'annotations'"),
            ('{"images": null, "annotations": []}', "is no annotation file of COCO: TypeError"),
            ('{"images": [{"id": 1}], "annotations": []}', "is no annotation file of COCO: KeyError 'file_name'"),
            ('{"images": [], "annotations": []}', "has no objects"),
        ],
    )
    def test_content(self, coco, content, message):
        (coco / "annotations/instances_val2017.json").write_text(content)
        with pytest.raises(ValueError, match=rf"instances_val2017\.json {message}"):
            open_objects(coco, "validation", num_classes=91)

    def test_damaged_pictures(self, coco):
        Image.new("RGB", (30, 20)).save(coco / "val2017/1.png")
        with pytest.raises(CorruptAnnotationError, match=r"1\.png is \(20, 30\); its annotations are for \(30, 20\)"):
            open_objects(coco, "validation", num_classes=91)[0]
        (coco / "val2017/1.png").write_bytes(b"no picture")
        with pytest.raises(CorruptPictureError, match=r"picture .*1\.png cannot be read"):
            open_objects(coco, "validation", num_classes=91)[0]

    def test_missing_extra(self, coco, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
        with pytest.raises(ImportError, match=r"pip install 'biformer\[dense\]'"):
            open_objects(coco, "train", num_classes=91)


def edit(coco: Path, change: Callable[[dict], object]) -> None:
    """Change the annotations of both splits."""
    for file in coco.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


class TestAlignedSize:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [((512, 683), (512, 704)), ((683, 512), (704, 512)), ((300, 2000), (320, 2048)), ((1, 1), (512, 512))],
    )
    def test_sizes(self, size, expected):
        assert aligned_size(*size, SceneRecipe()) == expected


class TestDrawShapes:
    def test_repeats(self):
        first, again, other = draw_shapes(3), draw_shapes(3), draw_shapes(4)
        for one, two in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, two)
        assert (first[0] != other[0]).any()

    def test_shapes(self):
        kinds = set()
        for index in range(30):
            picture, masks, labels = draw_shapes(index, size=(40, 60))
            assert (picture.shape, picture.dtype) == ((40, 60, 3), np.uint8)
            assert (masks.shape, masks.sum(0).max()) == ((len(labels), 40, 60), 1)
            assert masks.sum((1, 2)).min() >= 16
            for mask, kind in zip(masks, labels, strict=True):
                assert picture[mask].mean(0).argmax() == kind - 1
            kinds |= set(labels.tolist())
        assert kinds == {1, 2, 3}

    def test_areas(self):
        """A lone shape fills its circle by its kind: 1, 3 sqrt(3) / 4 pi and 2 / pi."""
        shares: dict[int, list[float]] = {1: [], 2: [], 3: []}
        for index in range(60):
            _, (mask,), (kind,) = draw_shapes(index, size=(300, 300), max_shapes=1)
            rows, columns = np.nonzero(mask)
            points = np.stack([rows, columns], 1)
            centre = points.mean(0)
            radius = np.hypot(*(points - centre).T).max()
            shares[int(kind)].append(mask.sum() / (np.pi * radius**2))
        expected = {1: 1.0, 2: 3 * 3**0.5 / (4 * np.pi), 3: 2 / np.pi}
        assert {kind: np.mean(each) for kind, each in shares.items()} == pytest.approx(expected, rel=0.03)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"size=\(301, 40\) must be 16 to 300"):
            draw_shapes(0, size=(301, 40))
