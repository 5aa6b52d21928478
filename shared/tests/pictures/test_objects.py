"""Pictures with objects."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from visionkernels.pictures.annotated import CorruptAnnotationError
from visionkernels.pictures.objects import open_objects
from visionkernels.pictures.reading import CorruptPictureError


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

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_objects_outside(self, coco, split, caplog):
        """Boxes end where the picture ends; what is left of an object outside is nothing."""
        for file in (coco / "annotations").iterdir():
            content = json.loads(file.read_text())
            polygon = content["annotations"][0]
            beyond = {**polygon, "id": 4, "bbox": [-3, 25, 8, 10], "segmentation": [[-3, 25, 5, 25, 5, 35, -3, 35]]}
            outside = {**polygon, "id": 5, "bbox": [20, 0, 5, 5], "segmentation": [[20, 0, 25, 0, 25, 5, 20, 5]]}
            content["annotations"] = [beyond, outside]
            file.write_text(json.dumps(content))
        target = open_objects(coco, split, num_classes=91)[0][1]
        left, top, right, bottom = target["boxes"].int().tolist()[0]
        assert len(target["labels"]) == 1 and (right - left, top, bottom) == (5, 25, 30) and 0 in (left, 20 - right)
        assert target["masks"].sum() == target["masks"][0, top:bottom, left:right].sum() > 0
        assert "1 of 2 objects lie outside their pictures and are left out; the first is annotation 5" in caplog.text

    @pytest.mark.parametrize("size", ["30", -3, None, 2.5])
    def test_odd_size(self, coco, size):
        file = coco / "annotations/instances_val2017.json"
        content = json.loads(file.read_text())
        content["images"][1]["height"] = size
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="has an image without name or size"):
            open_objects(coco, "validation", num_classes=91)

    def test_training(self, coco):
        pictures = open_objects(coco, "train", num_classes=91)
        assert len(pictures) == 1
        targets = [pictures[0][1] for _ in range(20)]
        assert {tuple(target["boxes"][0].tolist()) for target in targets} == {(4, 6, 12, 16), (8, 6, 16, 16)}
        for target in targets:
            left, top, right, bottom = target["boxes"][0].int().tolist()
            assert target["labels"].tolist() == [2]
            assert target["masks"][0, top:bottom, left:right].all() and target["masks"].sum() == 80

    def test_ranks(self, coco):
        """Labels are the places of the ids among the file's categories."""
        file = coco / "annotations" / "instances_val2017.json"
        content = json.loads(file.read_text())
        content["categories"] = [{"id": key, "name": str(key)} for key in (90, 7, 2, 3, 1)]
        content["annotations"][0]["category_id"] = 90
        file.write_text(json.dumps(content))
        pictures = open_objects(coco, "validation", num_classes=6, is_ranked=True)
        assert pictures[0][1]["labels"].tolist() == [5, 3]
        assert pictures.category_ids == (1, 2, 3, 7, 90)
        with pytest.raises(ValueError, match="has category 5; num_classes=5 allows 1 to 4"):
            open_objects(coco, "validation", num_classes=5, is_ranked=True)
        content["annotations"][0]["category_id"] = 4
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="has category id 4, which its categories do not list"):
            open_objects(coco, "validation", num_classes=6, is_ranked=True)

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
            ({"bbox": [9, 9, -5, 5]}, r"has annotation 1 with a bbox of negative width or height: \[9, 9, -5, 5\]"),
            ({"id": 7}, "has id 7 twice among its annotations; give each its own"),
            ({"iscrowd": 1}, "has no objects"),
            ({"iscrowd": "no"}, "has annotation 1 whose iscrowd is neither 0 nor 1"),
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
            ("[" * 100_000, "is no annotation file of COCO: RecursionError"),
        ],
    )
    def test_content(self, coco, content, message):
        (coco / "annotations/instances_val2017.json").write_text(content)
        with pytest.raises(ValueError, match=rf"instances_val2017\.json {message}"):
            open_objects(coco, "validation", num_classes=91)

    def test_ids(self, coco):
        """Two images of one id would lose one of them in silence."""
        edit(coco, lambda content: content["images"][1].update(id="2"))
        with pytest.raises(ValueError, match="is no annotation file of COCO: TypeError"):
            open_objects(coco, "validation", num_classes=91)
        for part in ("images", "categories"):
            edit(coco, lambda content: content["images"][1].update(id=2))
            edit(coco, lambda content, part=part: content[part][1].update(id=3))
            with pytest.raises(ValueError, match=rf"instances_val2017\.json has id 3 twice among its {part}"):
                open_objects(coco, "validation", num_classes=91)
            edit(coco, lambda content, part=part: content[part][1].update(id=2))

    def test_objects_of_absent_images(self, coco, caplog):
        edit(coco, lambda content: content["annotations"][1].update(image_id=99))
        assert len(open_objects(coco, "validation", num_classes=91)[0][1]["labels"]) == 1
        assert "1 of 3 objects belong to images that it does not list and are left out" in caplog.text
        assert "the first is annotation 2" in caplog.text

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ([[4, 6, 12, 6]], "TypeError"),
            ([[]], "Exception"),
            ("polygon", "TypeError"),
            ({"size": [30, 20], "counts": [5, 1000]}, "ValueError"),
            ({"size": [100_000, 100_000], "counts": [10**10]}, r"ValueError it is for a picture of \[100000, 100000\]"),
        ],
        ids=str,
    )
    def test_damaged_segmentations(self, coco, code, message):
        edit(coco, lambda content: content["annotations"][0].update(segmentation=code))
        pictures = open_objects(coco, "validation", num_classes=91)
        with pytest.raises(CorruptAnnotationError, match=rf"1\.png has annotation 1 with a segmentation .*: {message}"):
            pictures[0]

    def test_damaged_pictures(self, coco):
        Image.new("RGB", (30, 20)).save(coco / "val2017/1.png")
        with pytest.raises(CorruptAnnotationError, match=r"1\.png is \(20, 30\); its annotations are for \(30, 20\)"):
            open_objects(coco, "validation", num_classes=91)[0]
        (coco / "val2017/1.png").write_bytes(b"no picture")
        with pytest.raises(CorruptPictureError, match=r"picture .*1\.png cannot be read"):
            open_objects(coco, "validation", num_classes=91)[0]

    def test_missing_extra(self, coco, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
        with pytest.raises(ImportError, match=r"pip install 'pycocotools'"):
            open_objects(coco, "train", num_classes=91)


def edit(coco: Path, change: Callable[[dict], object]) -> None:
    """Change the annotations of both splits."""
    for file in coco.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
