"""Pictures with a class for every pixel."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from visionkernels.pictures.annotated import CorruptAnnotationError
from visionkernels.pictures.reading import CorruptPictureError
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, aligned_size, open_scenes

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

    @pytest.mark.parametrize("mode", ["1", "P", "I;16", "RGB", "LA", "F"])
    def test_modes_of_annotations(self, folder, mode):
        """Numbers of classes in any form; colours are no numbers."""
        file = folder / "annotations/validation/a.tiff"
        numbers = np.kron(np.array([[0, 1], [1, 0]], dtype=np.uint8), np.ones((24, 32), np.uint8))
        opened = {
            "1": Image.fromarray(numbers.astype(bool)),
            "P": Image.frombytes("P", (64, 48), numbers.tobytes()),
            "I;16": Image.fromarray(numbers.astype(np.uint16)),
        }.get(mode, Image.fromarray(numbers))
        (opened if opened.mode == mode else opened.convert(mode)).save(file)
        file.rename(file.with_suffix(".png"))
        scenes = open_scenes(folder, "validation", SCENE, num_classes=3)
        if mode in ("RGB", "LA", "F"):
            with pytest.raises(CorruptAnnotationError, match=rf"a\.png cannot be read: its mode is {mode}; a pixel"):
                scenes[0]
        else:
            assert scenes[0][1][::24, ::32].flatten().tolist() == [IGNORED, 0, 0, IGNORED]

    def test_annotation_without_picture(self, folder):
        (folder / "images/training/b.jpg").rename(folder / "images/training/b.JPEG")
        with pytest.raises(FileNotFoundError, match=r"lacks 1 pictures; the first is .*images/training/b\.jpg"):
            open_scenes(folder, "train", SCENE, num_classes=3)

    def test_error_of_a_loading_process_is_one_line(self, folder):
        scenes = open_scenes(folder, "validation", SCENE, num_classes=2)
        with pytest.raises(CorruptAnnotationError) as caught:
            list(DataLoader(scenes, batch_size=None, num_workers=1))
        assert str(caught.value) == f"annotation {folder}/annotations/validation/a.png has label 3; there are 2 classes"


class TestAlignedSize:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [((512, 683), (512, 704)), ((683, 512), (704, 512)), ((300, 2000), (320, 2048)), ((1, 1), (512, 512))],
    )
    def test_sizes(self, size, expected):
        assert aligned_size(*size, SceneRecipe()) == expected


class TestLayouts:
    """Labels 0, 1, 2 and 255 in the quarters of a picture, in the layouts of other sets."""

    LABELS = np.kron(np.array([[0, 1], [2, 255]], dtype=np.uint8), np.ones((24, 32), np.uint8))

    def save(self, picture: Path, annotation: Path, labels: np.ndarray = LABELS) -> None:
        for path in (picture, annotation):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([labels] * 3, -1)).save(picture)
        Image.fromarray(labels).save(annotation)

    def classes(self, root: Path, split="validation", num_classes=19) -> list[int]:
        scenes = open_scenes(root, split, SCENE, num_classes=num_classes)
        return scenes[0][1][::24, ::32].flatten().tolist()

    def test_pascal_voc(self, tmp_path):
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("a\nb\n")
        for name in ("a", "b"):
            self.save(tmp_path / f"JPEGImages/{name}.jpg", tmp_path / f"SegmentationClass/{name}.png")
        assert len(open_scenes(tmp_path, "validation", SCENE, num_classes=21)) == 2
        assert self.classes(tmp_path) == [0, 1, 2, IGNORED]
        with pytest.raises(FileNotFoundError, match=r"has no list .*train\.txt of its pictures"):
            open_scenes(tmp_path, "train", SCENE, num_classes=21)
        (lists / "train.txt").write_text("a\n")
        (lists / "trainaug.txt").write_text("a\nb\n")
        with pytest.raises(FileNotFoundError, match=r"lacks 2 annotations; the first is .*SegmentationClassAug/a\.png"):
            open_scenes(tmp_path, "train", SCENE, num_classes=21)
        shutil.copytree(tmp_path / "SegmentationClass", tmp_path / "SegmentationClassAug")
        assert len(open_scenes(tmp_path, "train", SCENE, num_classes=21)) == 2
        for content, message in (
            (b"", "trainaug.txt lists no pictures"),
            (b"\xff\xfea", "is no list of names"),
        ):
            (lists / "trainaug.txt").write_bytes(content)
            with pytest.raises(ValueError, match=message):
                open_scenes(tmp_path, "train", SCENE, num_classes=21)
        (lists / "trainaug.txt").write_text("a\nb\n")
        (tmp_path / "JPEGImages/b.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks 1 pictures; the first is .*b\.jpg"):
            open_scenes(tmp_path, "train", SCENE, num_classes=21)

    def test_cityscapes(self, tmp_path):
        picture = tmp_path / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png"
        annotation = tmp_path / "gtFine/val/ulm/ulm_1_gtFine_labelIds.png"
        # ids 7, 33, 4 and 18 are road, bicycle, static and a rail that does not count
        ids = np.select([label == self.LABELS for label in (0, 1, 2, 255)], [7, 33, 4, 18]).astype(np.uint8)
        self.save(picture, annotation, ids)
        assert self.classes(tmp_path) == [0, 18, IGNORED, IGNORED]
        self.save(picture, annotation.with_name("ulm_1_gtFine_labelTrainIds.png"))
        assert self.classes(tmp_path) == [0, 1, 2, IGNORED]
        with pytest.raises(CorruptAnnotationError, match="has label 2; there are 2 classes"):
            self.classes(tmp_path, num_classes=2)
        self.save(tmp_path / "x.png", annotation.with_name("ulm_2_gtFine_labelTrainIds.png"))
        with pytest.raises(FileNotFoundError, match=r"lacks 1 pictures; the first is .*ulm/ulm_2_leftImg8bit\.png"):
            self.classes(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"has no pictures .*leftImg8bit/train/CITY"):
            self.classes(tmp_path, "train")
