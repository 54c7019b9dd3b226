"""Writes a safetensors file block by block, in any order, so that no whole tensor need be in memory.

The format (https://github.com/huggingface/safetensors#format): the length of a JSON header, the header, which places
every tensor, and the tensors. All shapes are known before the first tensor is there, so the header comes first. The
bytes are those that safetensors' own `save_file` writes, which wants all tensors at once.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evo.encodings import ITEM_BYTES, TensorHeader

_ALIGNMENT = 8


class SafetensorsWriter:
    """One file.

    Args:
        path: of a file that is not there yet.
        headers: name -> dtype and shape of every tensor that will be written.
    """

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        rank = {dtype: i for i, dtype in enumerate(ITEM_BYTES)}
        order = sorted(headers, key=lambda name: (rank[headers[name].dtype], name))
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            start, end = end, end + headers[name].n_bytes
            self._places[name] = (start, end)
        text = _header(headers, self._places)
        self._start = 8 + len(text)
        self._missing = {name: end - start for name, (start, end) in self._places.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(self._file, memoryview(struct.pack("<Q", len(text)) + text), 0)
            os.posix_fallocate(self._file, 0, self._start + end)  # a full disk is noticed now
        except OSError:
            os.close(self._file)  # nobody else will, and an open file takes its room though it is removed
            raise

    def write(self, name: str, numbers: Tensor, at: int = 0) -> None:
        """Write consecutive elements of a tensor, from byte `at` of it on; each once."""
        start, end = self._places[name]
        data = numbers.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert start + at + len(data) <= end, f"{name} has the shape and dtype that were announced"
        _write_all(self._file, data, self._start + start + at)
        self._missing[name] -= len(data)

    def sync(self) -> None:
        """Wait until the disk has what has been written."""
        os.fdatasync(self._file)

    def close(self) -> bool:
        """Close the file.

        Returns:
            whether all of its tensors have been written.
        """
        os.close(self._file)
        return not any(self._missing.values())


def _header(headers: Mapping[str, TensorHeader], places: Mapping[str, tuple[int, int]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, ends in places.items():
        entries[name] = {"dtype": headers[name].dtype, "shape": headers[name].shape, "data_offsets": ends}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(file, data, offset)
        data, offset = data[n:], offset + n
