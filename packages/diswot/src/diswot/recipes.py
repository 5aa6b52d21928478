"""Complete distillations by name: networks, losses, data and training, with the paper's figures."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from diswot.data import CIFAR_MEAN, CIFAR_STD
from diswot.losses import names
from visionkernels.checks import check, check_known
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, by_name, settings
from visionkernels.tasks.classification import LabelledRecipe
from visionkernels.weights import Trained

__all__ = ["RECIPES", "DistillRecipe"]


def _pictures(size: int) -> PictureRecipe:
    return PictureRecipe(size=size, resize=size, interpolation="bilinear", mean=CIFAR_MEAN, std=CIFAR_STD)


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(LabelledRecipe):
    """A training of a student with a teacher, or by the labels alone."""

    trainer: ClassVar[str] = "diswot.training:train"

    student: str
    """Name for `diswot.models.create_network`."""
    teacher: str | None
    """Name of a network, or a weights file; None trains by the labels alone."""
    distiller: str = "none"
    """Loss added to KD, a name of `diswot.losses`; "none" or "kd" for KD alone."""
    ce_weight: float = 0.1
    kd_weight: float = 0.9
    beta: float | None = None
    """Weight of the distiller's loss; None: the published one, or 1 where there is none."""
    temperature: float = 4.0
    """Temperature of KD."""
    pretraining_epochs: int = 0
    """Epochs with the distiller's loss alone, at a constant rate, before a training by KD alone; 0: one training by
    all losses."""
    student_layers: tuple[str, ...] = ()
    """Modules whose maps the distiller takes; () takes the network's stages."""
    teacher_layers: tuple[str, ...] = ()
    pictures: PictureRecipe = field(default_factory=lambda: _pictures(32))
    padding: int = 4
    """Black pixels added on each side before a random crop of the image's size."""
    is_flipped: bool = True
    """Whether half of the training images are mirrored."""

    def __post_init__(self) -> None:
        check_known("distiller", self.distiller, ("none", *names()))
        alone = self.teacher is not None or self.distiller == "none"
        check(alone, "distiller", self.distiller, "'none' without a teacher")
        for name in ("ce_weight", "kd_weight", "beta"):
            weight = getattr(self, name)
            check(weight is None or weight >= 0, name, weight, "at least 0")
        check(self.temperature > 0, "temperature", self.temperature, "above 0")
        check(self.pretraining_epochs >= 0, "pretraining_epochs", self.pretraining_epochs, "at least 0")
        idle = self.pretraining_epochs > 0 and self.distiller in ("none", "kd")
        check(not idle, "pretraining_epochs", self.pretraining_epochs, f"0 for distiller={self.distiller!r}")
        check(self.padding >= 0, "padding", self.padding, "at least 0")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of the student."""
        options = {} if num_classes is None else {"num_classes": num_classes}
        return Trained(
            kind="classifier", package="diswot", model=self.student, options=options,
            inputs=self.pictures.inputs(), settings=settings(self),
        )  # fmt: skip

    def losses(self) -> dict[str, Any]:
        """Return the keyword arguments of `diswot.task.DistillationTask`."""
        fields = ("distiller", "ce_weight", "kd_weight", "beta", "temperature", "student_layers", "teacher_layers")
        return {name: getattr(self, name) for name in fields}


def _fit(lr: float, batch_size: int, epochs: int, milestones: tuple[int, ...]) -> FitRecipe:
    return FitRecipe(
        epochs=epochs,
        batch_size=batch_size,
        # timm's name for SGD without Nesterov momentum
        optimizer=OptimizerRecipe(name="momentum", lr=lr, momentum=0.9, weight_decay=5e-4, decay="all"),
        schedule=ScheduleRecipe(name="multistep", milestones=milestones, decay_rate=0.1),
        num_workers=2,
    )


_CIFAR100 = DistillRecipe(
    name="cifar100_kd",
    summary="CIFAR-100, 240 epochs: 71.01 % top-1 in the paper's figures",
    student="s0_713",
    teacher="cifar_resnet56",
    fit=_fit(0.05, 64, 240, (150, 180, 210)),
)
# only the length and the rate are published; the steps lie at the same shares of it as those of 240 epochs
_NB201_FIT = _fit(0.1, 256, 90, (56, 67, 78))
_NB201 = replace(
    _CIFAR100,
    name="nb201_cifar100_kd",
    summary="CIFAR-100, a student of NAS-Bench-201, 90 epochs",
    student="nb201_diswot",
    fit=_NB201_FIT,
)
_DIGITS = DistillRecipe(
    name="mnist5k_kd",
    summary="5,000 handwritten digits: a teacher and its student in minutes on a CPU",
    student="s0_111",
    teacher="cifar_resnet20",
    data="mnist5k",
    fit=FitRecipe(
        epochs=5,
        batch_size=64,
        optimizer=OptimizerRecipe(name="momentum", lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all"),
        schedule=ScheduleRecipe(name="onecycle", unit="update"),
    ),
    pictures=_pictures(28),
    padding=2,
    is_flipped=False,
)


def _plain(recipe: DistillRecipe, name: str, summary: str) -> DistillRecipe:
    return replace(recipe, name=name, summary=summary, teacher=None)


RECIPES: dict[str, DistillRecipe] = by_name(
    (
        _CIFAR100,
        replace(
            _CIFAR100,
            name="cifar100_kd_light",
            summary="the same for MobileNets and ShuffleNets, whose learning rate is .01",
            student="cifar_mobilenetv2",
            fit=_fit(0.01, 64, 240, (150, 180, 210)),
        ),
        *(
            replace(
                _CIFAR100,
                name=f"cifar100_kd_{distiller}",
                summary=f"the same after 30 epochs with the loss {distiller} alone",
                distiller=distiller,
                pretraining_epochs=30,
            )
            for distiller in ("fsp", "ab")
        ),
        _plain(_CIFAR100, "cifar100_plain", "the same student without a teacher: 69.13 % top-1 in the paper's figures"),
        _NB201,
        replace(
            _NB201,
            name="imagenet16_kd",
            summary="ImageNet-16-120, a student of NAS-Bench-201, 90 epochs",
            pictures=_pictures(16),
            padding=2,
        ),
        _DIGITS,
        _plain(_DIGITS, "mnist5k_plain", "the same student without a teacher"),
    )
)
