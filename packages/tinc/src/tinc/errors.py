"""The errors for files that cannot be read, or not within the memory that the caller allows."""

from visionkernels.checks import InputError
from visionkernels.files import CorruptFileError

__all__ = ["MemoryLimitError", "TincFormatError"]


class TincFormatError(CorruptFileError):
    """A file is not a `.tinc` file, is damaged or truncated, or was written by a newer version."""


class MemoryLimitError(InputError):
    """What is asked for decodes to more bytes than the limit; the message says how many."""
