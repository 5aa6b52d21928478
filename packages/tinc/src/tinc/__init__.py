"""TINC: volumes as trees of small coordinate networks, and a codec that people can use."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from tinc.compression import compress
    from tinc.errors import TincFormatError
    from tinc.file import TincFile, decompress
    from tinc.file import open_file as open

__all__ = ["TincFile", "TincFormatError", "compress", "decompress", "open"]
