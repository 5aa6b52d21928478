"""The paper's tables as data: the figures, and how this package measures them or what that would need."""

import tempfile
from collections.abc import Callable
from functools import cache, partial

import timm
import torch
from torch import Tensor, nn

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.detection_checkpoint import detector_rules
from g2sd.mae import MaskedAutoencoder, create_autoencoder
from g2sd.mask_rcnn import DetectorSize, detection_model
from g2sd.masking import draw_noise, mask_patches
from g2sd.miniature import ARMS, compare_arms
from g2sd.upernet import Size, segmentation_model
from visionkernels.profiling import FlopCount, count_flops, count_parameters
from visionkernels.tables import CHECKPOINT, DATASET, GPU, SAMPLES, TIME, Cell, Measured, Table, installed

__all__ = ["tables"]

# (parameters in millions, GMACs at 224 pixels) of classifiers of 1,000 classes, counted on the official code
_CLASSIFIERS = {
    ("tiny", False): (5.717, 1.254), ("small", False): (22.051, 4.599), ("base", False): (86.568, 17.564),
    ("tiny", True): (5.911, 1.261), ("small", True): (22.436, 4.624), ("base", True): (87.337, 17.657),
}  # fmt: skip
# parameters in millions of students with heads to 768 and 512 channels, and of teachers without
_STUDENTS = {
    "mae_vit_tiny_patch16_dec128d4b": 7.471, "mae_vit_tiny_patch16_12h_dec128d4b": 7.471,
    "mae_vit_tiny_patch16_dec64d4b": 6.784, "mae_vit_small_patch16_dec256d4b": 26.326,
    "mae_vit_small_patch16_dec128d2b": 23.350, "mae_vit_small_patch16_dec128d4b": 23.747,
    "mae_vit_small_patch16_dec128d8b": 24.540, "mae_vit_small_patch16_dec192d4b": 24.840,
    "mae_vit_small_patch16_dec256d2b": 24.747, "mae_vit_small_patch16_dec256d8b": 29.485,
    "mae_vit_small_patch16_dec512d2b": 29.899, "mae_vit_small_patch16_dec512d4b": 36.204,
    "mae_vit_small_patch16_dec512d8b": 48.813, "mae_vit_base_patch16_dec256d4b": 90.777,
    "mae_vit_base_patch16_dec512d4b": 100.753,
}  # fmt: skip
_TEACHERS = {
    "mae_vit_base_patch16_dec512d8b": 111.655, "mae_vit_large_patch16_dec512d8b": 329.239,
    "mae_vit_huge_patch14_dec512d8b": 656.614,
}  # fmt: skip
SWEEPS = installed("joblib", pip="g2sd-vision[sweeps]")
TRAIN = installed("accelerate", "torchmetrics", pip="g2sd-vision[train]")
# parameters in millions, with 150 classes and the auxiliary head
_SEGMENTERS: dict[Size, float] = {"tiny": 11.028, "small": 41.998, "base": 163.877}
# parameters in millions, with 80 classes
_DETECTORS: dict[DetectorSize, float] = {"tiny": 27.73, "small": 44.50, "base": 110.90}
# top-1 in percent: (figure, whether it was read from the paper)
_IMAGENET = {
    "MAE ViT-B, the teacher": (83.6, True), "DeiT-Ti": (72.2, True), "DeiT-S": (79.8, True),
    "G2SD ViT-S": (82.5, False), "G2SD ViT-Ti": (77.0, False), "G2SD ViT-S, generic only": (82.0, False),
    "G2SD ViT-Ti, generic only": (76.3, False),
}  # fmt: skip


def tables() -> tuple[Table, ...]:
    """Return all tables, the paper's first."""
    return (_imagenet(), _segmenters(), _detectors(), _classifiers(), _autoencoders(), _steps(), _few_labels())


def _imagenet() -> Table:
    def command(row: str) -> str:
        size = "tiny" if "Ti" in row else "small"
        if "only" in row:
            return f"g2sd finetune finetune_{size}_in1k --init GENERIC --data IMAGENET --out RUN"
        if row.startswith("G2SD"):
            return f"g2sd distill specific specific_{size}_in1k --init GENERIC --teacher FILE --data IMAGENET --out RUN"
        return "g2sd eval --checkpoint FILE --data IMAGENET"

    cells = [
        Cell(row=row, column="top-1 %", paper=figure, digits=1, tolerance=0.3, command=command(row),
             source="read" if is_read else "recalled", needs=(DATASET, CHECKPOINT, GPU))
        for row, (figure, is_read) in _IMAGENET.items()
    ]  # fmt: skip
    convention = (
        "224 x 224, one crop. GENERIC is the file of `g2sd distill generic generic_SIZE_in1k`. That of G2SD ViT-S is "
        "98.7 % of its teacher's, which was read, of 83.6; those of ViT-Ti and of the generic stage only are recalled."
    )
    return Table("imagenet", "ImageNet-1K classification", convention, tuple(cells))


def _classifiers() -> Table:
    cells = []
    for (size, distilled), (parameters, gmacs) in _CLASSIFIERS.items():
        row = f"ViT-{size}{', distillation token' if distilled else ''}"
        for column, figure, measure in (("params M", parameters, _parameters), ("GMACs", gmacs, _gmacs)):
            build = partial(timm.create_model, f"g2sd_vit_{size}_patch16_224", distilled=distilled)
            cells.append(
                Cell(row=row, column=column, paper=figure, digits=3, tolerance=0.0005, command="g2sd reproduce",
                     measure=partial(measure, build))
            )  # fmt: skip
    convention = "1,000 classes, 224 x 224. GMACs are multiply-adds of convolutions, linear layers and attention."
    return Table("classifiers", "Sizes of the classifiers", convention, tuple(cells))


def _autoencoders() -> Table:
    widths = {"teacher_width": 768, "teacher_decoder_width": 512}
    builds: dict[str, tuple[float, Callable[[], nn.Module]]] = {
        f"{name}, student": (figure, partial(create_autoencoder, name, **widths)) for name, figure in _STUDENTS.items()
    }
    builds |= {name: (figure, partial(create_autoencoder, name)) for name, figure in _TEACHERS.items()}
    cells = [
        Cell(row=row, column="params M", paper=figure, digits=3, tolerance=0.001, command="g2sd reproduce",
             measure=partial(_parameters, build))
        for row, (figure, build) in builds.items()
    ]  # fmt: skip
    convention = "Trainable parameters; the fixed positional tables do not count."
    return Table("autoencoders", "Sizes of the masked autoencoders", convention, tuple(cells))


def _segmenters() -> Table:
    cells = [
        Cell(row=f"UperNet, ViT-{size}", column="params M", paper=figure, digits=3, tolerance=0.0005,
             command="g2sd reproduce", measure=partial(_all_parameters, size))
        for size, figure in _SEGMENTERS.items()
    ]  # fmt: skip
    cells += [
        Cell(row=row, column="mIoU", paper=figure, digits=1, tolerance=0.3, source="recalled",
             needs=(DATASET, CHECKPOINT, GPU), command=command)
        for row, figure, command in (
            ("UperNet, ViT-base, the teacher", 48.3,
             "g2sd finetune finetune_base_ade20k --init MAE --data ADE20K --out RUN"),
            ("UperNet, ViT-small", 48.0,
             "g2sd distill specific specific_small_ade20k --init GENERIC --teacher FILE --data ADE20K --out RUN"),
        )
    ]  # fmt: skip
    convention = "ADE20K, 150 classes, 512 x 512; parameters with the auxiliary head."
    return Table("segmentation", "Semantic segmentation", convention, tuple(cells))


def _all_parameters(size: Size) -> float:
    with torch.device("meta"):
        model = segmentation_model(size)
    return count_parameters(model) / 1e6


def _detectors() -> Table:
    cells = [
        Cell(row=f"Mask R-CNN, ViT-{size}", column="params M", paper=figure, digits=2, tolerance=0.005,
             command="g2sd reproduce", measure=partial(_official_parameters, size))
        for size, figure in _DETECTORS.items()
    ]  # fmt: skip
    teach = "g2sd finetune finetune_base_coco --init MAE --data COCO --out RUN"
    distil = "g2sd distill specific specific_small_coco --init GENERIC --teacher FILE --data COCO --out RUN"
    cells += [
        Cell(row=row, column=column, paper=figure, digits=1, tolerance=0.3, needs=(DATASET, CHECKPOINT, GPU),
             command=command)
        for row, column, figure, command in (
            ("Mask R-CNN, ViT-base, the teacher", "box AP", 51.6, teach),
            ("Mask R-CNN, ViT-base, the teacher", "mask AP", 45.9, teach),
            ("Mask R-CNN, ViT-small", "box AP", 50.6, distil),
        )
    ]  # fmt: skip
    convention = (
        "COCO, 80 classes, 1024 x 1024. ViT-small's is 98.1 % of its teacher's, which were both read. Parameters are "
        "counted as detectron2 has them, without box and mask of the background, and without the adapter."
    )
    return Table("detection", "Object detection and instance segmentation", convention, tuple(cells))


def _official_parameters(size: DetectorSize) -> float:
    with torch.device("meta"):
        state = detection_model(size).state_dict()
    return sum(weight.numel() for weight in detector_rules().inverse().rename(state).values()) / 1e6


def _steps() -> Table:
    rows = {
        "teacher ViT-B, four decoder blocks": (7.066, "mae_vit_base_patch16", 4, {}),
        "student ViT-Ti": (0.603, "mae_vit_tiny_patch16", None, {"teacher_width": 768, "teacher_decoder_width": 512}),
        "student ViT-S": (1.968, "mae_vit_small_patch16", None, {"teacher_width": 768, "teacher_decoder_width": 512}),
    }
    cells = [
        Cell(row=row, column="GMACs an image", paper=figure, digits=3, tolerance=0.0005, command="g2sd reproduce",
             measure=partial(_pass_gmacs, name, blocks, widths))
        for row, (figure, name, blocks, widths) in rows.items()
    ]  # fmt: skip
    convention = (
        "Forward passes of the official algorithm, 49 visible patches of 196, the student with both feature heads. "
        "Ours skips the encoder's head, and in the first decoder block the projections of removed patches."
    )
    return Table("steps", "Work of generic distillation", convention, tuple(cells))


def _few_labels() -> Table:
    cells = [
        Cell(row=arm, column="top-1 %", paper=None, digits=1, tolerance=0.0, needs=(SAMPLES, SWEEPS, TRAIN, TIME),
             command="g2sd reproduce --full", measure=partial(_arm, arm))
        for arm in ARMS
    ]  # fmt: skip
    cells += [
        Cell(row=f"seeds with {upper!r} above {lower!r}", column="of 5", paper=wanted, digits=0, tolerance=0.0,
             needs=(SAMPLES, SWEEPS, TRAIN, TIME), command="g2sd reproduce --full",
             measure=partial(_seeds_above, upper, lower))
        for upper, lower, wanted in (("generic", "scratch", 5), ("generic, specific", "generic", None))
    ]  # fmt: skip
    convention = (
        "MNIST-5k, 200 labels, mean and spread of five seeds. Students of 24 channels and 3 blocks: labels alone, with "
        "a teacher's, after their own pre-training, after generic distillation, after both distillations."
    )
    return Table("few labels", "The two stages in small", convention, tuple(cells))


@cache
def _arms() -> dict[str, tuple[float, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        return compare_arms(range(5), folder)


def _arm(arm: str) -> Measured:
    values = torch.tensor(_arms()[arm])
    return Measured(float(values.mean()), float(values.std()))


def _seeds_above(upper: str, lower: str) -> float:
    arms = _arms()
    return float(sum(ours > theirs for ours, theirs in zip(arms[upper], arms[lower], strict=True)))


def _parameters(build: Callable[[], nn.Module]) -> float:
    with torch.device("meta"):
        model = build()
    fixed = {name for name, weight in model.named_parameters() if "pos_embed" in name and not weight.requires_grad}
    return sum(weight.numel() for name, weight in model.named_parameters() if name not in fixed) / 1e6


def _gmacs(build: Callable[[], nn.Module]) -> float:
    with torch.device("meta"):
        return _products(count_flops(build(), torch.zeros(1, 3, 224, 224)))


def _products(counted: FlopCount) -> float:
    return (counted.conv + counted.linear + counted.matmul) / 1e9


class _OfficialPass(nn.Module):
    """A forward pass of one image as the official code makes it."""

    def __init__(self, model: MaskedAutoencoder, num_blocks: int | None) -> None:
        super().__init__()
        self.model, self.num_blocks = model, num_blocks

    def forward(self, images: Tensor) -> Tensor:
        from g2sd.baselines import plain_decode, plain_encode

        noise = draw_noise(len(images), self.model.num_patches, generator=torch.Generator().manual_seed(0))
        mask = mask_patches(noise, 0.75)
        encoded = plain_encode(self.model, images, mask)
        decoded = plain_decode(self.model, encoded, mask, self.num_blocks or len(self.model.decoder_blocks))
        if self.model.decoderfeature_pred is None or self.model.encoderfeature_pred is None:
            return decoded
        self.model.encoderfeature_pred(self.model.norm(encoded))
        return self.model.decoderfeature_pred(decoded)


def _pass_gmacs(name: str, num_blocks: int | None, widths: dict[str, int]) -> float:
    model = create_autoencoder(name, **widths)
    # which patches are visible is decided by numbers
    return _products(count_flops(_OfficialPass(model, num_blocks), torch.zeros(1, 3, 224, 224), arithmetic="run"))
