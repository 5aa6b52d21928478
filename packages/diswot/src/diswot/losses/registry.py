"""Distillation losses by name."""

from typing import Any

from diswot.losses.contrastive import CRD
from diswot.losses.distiller import Distiller, Features
from diswot.losses.logits import KD, PearsonInterclass
from diswot.losses.maps import AT, FT, ICKD, NST, SP, Hint, Unified
from diswot.losses.stages import AB, FSP, KDSVD, RMI, VID
from diswot.losses.vectors import CC, PKT, RKD
from visionkernels.checks import InputError, check_known

__all__ = ["create", "names"]

DISTILLERS: dict[str, type[Distiller]] = {
    "kd": KD,
    "hint": Hint,
    "at": AT,
    "sp": SP,
    "ickd": ICKD,
    "cc": CC,
    "rkd": RKD,
    "pkt": PKT,
    "nst": NST,
    "fsp": FSP,
    "ab": AB,
    "ft": FT,
    "vid": VID,
    "kdsvd": KDSVD,
    "crd": CRD,
    "rmi": RMI,
    "unified": Unified,
    "pearson_interclass": PearsonInterclass,
}


def create(
    name: str,
    *,
    student: Features | None = None,
    teacher: Features | None = None,
    num_samples: int | None = None,
    **options: Any,
) -> Distiller:
    """Return the distillation loss `name`, with what it trains itself.

    `student` and `teacher` are example features, of the kind that its `source` says: from their shapes it makes the
    layers between networks of unequal widths (hint, cc, vid and crd always have some; vid and crd cannot do without
    examples). Train its parameters with the student's. `num_samples`, the size of the training set, is for crd alone.
    `options` are those of its class. Raises ValueError for an unknown name, or one example without the other.

    >>> import torch
    >>> loss = create("kd", temperature=2.0)
    >>> loss(torch.zeros(4, 10), torch.zeros(4, 10)).item()
    0.0
    """
    check_known("distiller", name, DISTILLERS)
    if (student is None) != (teacher is None):
        raise InputError(f"{name}: example features of student and teacher belong together; give both or neither")
    return DISTILLERS[name].build(student, teacher, num_samples, **options)


def names() -> list[str]:
    """Return the names that `create` knows."""
    return list(DISTILLERS)
