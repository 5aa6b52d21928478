"""The fixture of all tests of a package; its conftest.py imports it."""

import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["reproducible"]


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds and one thread; whatever opens a connection to another machine fails."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
