"""Zarr arrays in a folder, whose damaged chunks are named when they are read."""

from pathlib import Path
from typing import Any

import zarr

from tinc.volumes.description import damage_named

__all__ = ["StoredArray"]


class StoredArray(zarr.Array):
    """A Zarr array in a folder. Reading a damaged chunk raises CorruptFileError with the folder's path."""

    def __getitem__(self, selection: Any) -> Any:
        """Return a part, as a Zarr array does."""
        try:
            with damage_named(Path(getattr(self.store, "root", ""), self.path)):
                return super().__getitem__(selection)
        except ValueError as error:
            # an index that does not fit the array is a mistake of the caller
            if isinstance(error.__cause__, IndexError):
                raise error.__cause__ from None
            raise
