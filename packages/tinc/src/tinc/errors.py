"""What goes wrong with files."""

from visionkernels.files import CorruptFileError

__all__ = ["TincFormatError"]


class TincFormatError(CorruptFileError):
    """A file is no `.tinc` file, is damaged or truncated, or was written by a newer version."""
