"""Teachers: refused where the user's flags contradict, frozen, and fed as they were trained."""

import pytest
import timm
import torch

from visionkernels.checks import InputError
from visionkernels.tasks.teachers import Teacher, open_teacher


def build():
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture
def weights(tmp_path):
    torch.save(build().state_dict(), tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def test_by_name_with_weights(weights):
    teacher = open_teacher("timm:test_resnet", checkpoint=weights, num_classes=3)
    assert not teacher.training and teacher.num_classes == 3


def test_errors(weights, tmp_path):
    with pytest.raises(InputError, match=r"is a file; --teacher-checkpoint is for a teacher by name"):
        open_teacher(weights, checkpoint=weights)
    with pytest.raises(InputError, match=r"teacher timm:test_resnet has 3 classes, the data 4"):
        open_teacher("timm:test_resnet", checkpoint=weights, num_classes=4)
    with pytest.raises(FileNotFoundError, match=r"teacher .*none.pth is not a file"):
        open_teacher(tmp_path / "none.pth")
    with pytest.raises(InputError, match="unknown model 'test_resne'; did you mean 'test_resnet'"):
        open_teacher("test_resne")


def test_frozen():
    teacher = Teacher(build(), mean=None, std=None).train()
    assert not teacher.training and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_normalised_as_it_was_trained():
    """The student's images, normalised otherwise, give the logits of the teacher's own normalisation."""
    model = build().eval()
    own = model.pretrained_cfg
    raw = torch.rand(2, 3, 64, 64)

    def normalised(mean, std):
        return (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    teacher = Teacher(model, mean=mean, std=std)
    expected = model(normalised(own["mean"], own["std"]))
    torch.testing.assert_close(teacher(normalised(mean, std)), expected, rtol=1e-4, atol=1e-5)
