"""Generic-to-specific distillation of masked autoencoders (G2SD, CVPR 2023)."""

from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder

__all__ = ["GenericDistiller", "MaskedAutoencoder"]
