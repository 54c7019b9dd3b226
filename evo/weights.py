"""Writes the weights of a checkpoint: while a block of a tensor is merged, those before it are hashed and written.

Memory is a few blocks, whatever the size of tensors and checkpoint, where merges are compiled loops; what is merged on
tensors is held one tensor at a time. The disk is asked early to take what has been written, so that little is left to
wait for at the end.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from evo.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from evo.heap import GivingBack
from evo.merge.kernels import Fused
from evo.safetensors_writer import SafetensorsWriter

BLOCK_BYTES = 1 << 20
"""Merged, hashed and written while it is in the cache."""
N_BLOCKS = 8
"""Blocks in memory: one is filled, the others wait to be hashed and written."""
SYNC_BYTES = 32 << 20
"""How much is written before the disk is asked to take it."""
TRIM_BYTES = 256 << 20
"""How much is made before memory is given back: every page of it costs as much again when it is next used."""

Stretch = Tensor | Fused
"""Consecutive elements of a tensor, or the loop that makes them."""


def write_weights(
    tensors: Iterable[tuple[str, Iterable[Stretch]]], interface: Checkpoint, folder: Path
) -> dict[str, str]:
    """Write the files of a checkpoint that is laid out as the interface parent is.

    Args:
        tensors: every tensor of the files, in any order.
        interface: the parent.
        folder: an empty folder.

    Returns:
        tensor -> BLAKE3 of its bytes.

    Raises:
        OSError: if they cannot be written.
    """
    files, hashes = _Files(interface, folder), {}
    try:
        with _Worker(files) as worker:
            for name, stretches in tensors:
                hashes[name] = worker.write(name, stretches)
    finally:
        files.close()
    files.write_index()
    return {name: digest.hexdigest() for name, digest in hashes.items()}


class _Worker:
    """A thread behind the one that merges. Hashing, writing and compiled loops let go of the interpreter."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._thread = ThreadPoolExecutor(1)
        self._in_flight: deque[Future[None]] = deque()
        self._memory = GivingBack(TRIM_BYTES)
        self._blocks = deque(torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(N_BLOCKS))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            self._wait_for_all_but(0)

    def write(self, name: str, stretches: Iterable[Stretch]) -> Any:
        """Hash and write a tensor, block by block.

        Returns:
            its hash, which is complete once the worker is done.
        """
        digest, at = blake3(), 0
        for block in _blocks(stretches, self._free):
            self._in_flight.append(self._thread.submit(self._take, digest, name, block, at))
            self._wait_for_all_but(N_BLOCKS - 1)
            at += len(block)
        self._memory.looked_at(at)
        return digest

    def _take(self, digest: Any, name: str, block: Tensor, at: int) -> None:
        digest.update(block.numpy().data)
        self._files.write(name, block, at)

    def _free(self) -> Tensor:
        """The block of memory that was handed out longest ago; all but those handed out since are done with."""
        self._blocks.rotate(-1)
        return self._blocks[-1]

    def _wait_for_all_but(self, n: int) -> None:
        while len(self._in_flight) > n:
            self._in_flight.popleft().result()


def _blocks(stretches: Iterable[Stretch], free: Callable[[], Tensor]) -> Iterator[Tensor]:
    """The bytes of stretches, in blocks."""
    for stretch in stretches:
        if isinstance(stretch, Tensor):
            yield from stretch.contiguous().reshape(-1).view(torch.uint8).split(BLOCK_BYTES)  # type: ignore[no-untyped-call]
            continue
        for begin in range(0, stretch.n_elements, BLOCK_BYTES // stretch.dtype.itemsize):
            block = free().view(stretch.dtype)[: stretch.n_elements - begin]
            stretch.run(block, begin)
            yield block.view(torch.uint8)


class _Files:
    """The files of a checkpoint; each is begun when its first tensor comes."""

    def __init__(self, interface: Checkpoint, folder: Path) -> None:
        self._folder, self._weight_map, self._headers = folder, interface.written_map(), interface.written_headers()
        self._writers: dict[str, SafetensorsWriter] = {}
        self._syncing = ThreadPoolExecutor(1)
        self._synced = self._syncing.submit(lambda: None)
        self._n_bytes = self._n_synced = 0

    def write(self, name: str, data: Tensor, at: int) -> None:
        """Write bytes of a tensor, from byte `at` of it on."""
        if (file := self._weight_map[name]) not in self._writers:
            inside = {n: header for n, header in self._headers.items() if self._weight_map[n] == file}
            self._writers[file] = SafetensorsWriter(self._folder / file, inside)
        self._writers[file].write(name, data, at)
        self._n_bytes += len(data)
        if self._n_bytes - self._n_synced >= SYNC_BYTES and self._synced.done():
            self._synced.result()  # the disk tells of an error once
            self._synced, self._n_synced = self._syncing.submit(self._writers[file].sync), self._n_bytes

    def close(self) -> None:
        """Close all files."""
        self._syncing.shutdown()
        self._complete = [writer.close() for writer in self._writers.values()]
        self._synced.result()

    def write_index(self) -> None:
        """Write the index, where there are several files."""
        names = set(self._weight_map.values())
        assert all(self._complete) and self._writers.keys() == names, "every tensor of every file has been written"
        if names != {SINGLE_FILE}:
            index = {"metadata": {"total_size": self._n_bytes}, "weight_map": self._weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
