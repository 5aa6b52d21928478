"""Generic-to-specific distillation of masked autoencoders (G2SD, CVPR 2023)."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from g2sd.generic import GenericDistiller
    from g2sd.mae import MaskedAutoencoder

__all__ = ["GenericDistiller", "MaskedAutoencoder"]
