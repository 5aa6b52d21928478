"""A codec for volumes, with trees of small coordinate networks (TINC, CVPR 2023)."""

from tinc.compression import compress
from tinc.errors import TincFormatError
from tinc.file import TincFile, decompress
from tinc.file import open_file as open

__all__ = ["TincFile", "TincFormatError", "compress", "decompress", "open"]
