"""TINC: volumes as trees of small coordinate networks, and a codec that people can use."""

from tinc.compression import compress
from tinc.errors import TincFormatError
from tinc.file import TincFile, decompress
from tinc.file import open_file as open

__all__ = ["TincFile", "TincFormatError", "compress", "decompress", "open"]
