"""The error for files that cannot be read."""

from visionkernels.files import CorruptFileError

__all__ = ["TincFormatError"]


class TincFormatError(CorruptFileError):
    """A file is not a `.tinc` file, is damaged or truncated, or was written by a newer version."""
