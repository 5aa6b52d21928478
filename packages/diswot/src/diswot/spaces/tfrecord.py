"""Records of a TFRecord file, one at a time, with their checksums verified."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from visionkernels.files import CorruptFileError

__all__ = ["crc32c", "masked_crc32c", "read_records"]

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
# the table of checksums grows with the longest record, by 1 KiB a byte
_LONGEST = 1 << 14


def read_records(path: str | Path, *, max_bytes: int = _LONGEST) -> Iterator[bytes]:
    """Go through the records of a file: u64 length, u32 checksum of it, the data, u32 checksum of the data.

    One record is held at a time; one of more than `max_bytes` is an error. Raises FileNotFoundError, and
    CorruptFileError that names the file and the byte where the damaged record starts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with path.open("rb") as file:
        start = 0
        while True:
            header = file.read(_HEADER.size)
            if not header:
                return
            where = f"{path} is damaged: the record at byte {start}"
            if len(header) < _HEADER.size:
                raise CorruptFileError(f"{where} ends within its header")
            length, checksum = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != checksum:
                raise CorruptFileError(f"{where} has a wrong checksum of its length, or this is no TFRecord file")
            if length > max_bytes:
                raise CorruptFileError(f"{where} has {length} bytes; at most {max_bytes} are expected")
            yield _read_data(file, length, where)
            start = file.tell()


def _read_data(file: BinaryIO, length: int, where: str) -> bytes:
    data, footer = file.read(length), file.read(_FOOTER.size)
    if len(data) < length or len(footer) < _FOOTER.size:
        raise CorruptFileError(f"{where} ends after {len(data)} of {length} bytes")
    if masked_crc32c(data) != _FOOTER.unpack(footer)[0]:
        raise CorruptFileError(f"{where} has a wrong checksum")
    return data


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of TFRecord: CRC-32C, rotated by 15 bits, plus a constant."""
    checksum = crc32c(data)
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of up to some thousand bytes.

    The checksum is linear: each byte adds what it leaves after all bytes behind it, which a table holds.
    """
    if not data:
        return 0
    # the start value of all ones is the same as inverting the first four bytes, or what there is of them
    padded = bytes(max(0, 4 - len(data))) + data
    values = np.frombuffer(padded, dtype=np.uint8).copy()
    first = len(padded) - len(data)
    values[first : first + 4] ^= 0xFF
    table = _table(len(values))
    behind = np.arange(len(values) - 1, -1, -1)
    total = int(np.bitwise_xor.reduce(table[behind, values]))
    # where there are fewer than four bytes, the rest of the start value is only shifted
    rest = 0xFFFFFFFF >> (8 * len(data)) if len(data) < 4 else 0
    return (total ^ rest) ^ 0xFFFFFFFF


_tables = np.zeros((0, 256), dtype=np.uint32)


def _table(length: int) -> np.ndarray:
    """Return what byte value j leaves with i zero bytes behind it, in row i."""
    global _tables
    if len(_tables) < length:
        rows = np.zeros((1 << (length - 1).bit_length(), 256), dtype=np.uint32)
        first = np.arange(256, dtype=np.uint32)
        for _ in range(8):
            first = np.where(first & 1, (first >> 1) ^ np.uint32(0x82F63B78), first >> 1).astype(np.uint32)
        rows[0] = first
        for index in range(1, len(rows)):
            rows[index] = (rows[index - 1] >> 8) ^ first[rows[index - 1] & 0xFF]
        _tables = rows
    return _tables
