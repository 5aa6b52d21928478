"""Distillation losses: `create(name)` gives one as a module that takes features of a student and of its teacher."""

from diswot.losses.distiller import Distiller, Features, Source
from diswot.losses.registry import create, names

__all__ = ["Distiller", "Features", "Source", "create", "names"]
