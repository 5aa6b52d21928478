"""A codec for volumes, with trees of small coordinate networks (TINC, CVPR 2023)."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from tinc.compression import compress
    from tinc.errors import MemoryLimitError, TincFormatError
    from tinc.file import TincFile, decompress
    from tinc.file import open_file as open

__all__ = ["MemoryLimitError", "TincFile", "TincFormatError", "compress", "decompress", "open"]
