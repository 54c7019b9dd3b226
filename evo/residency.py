"""Where the tensors of base and donors live between candidates: on the device, in pinned host memory, or on disk.

On a CPU, `device` is memory of the process's own, and `disk` the mapped files, whose pages the system keeps as long as
it has room. From pinned memory and from disk a part's tensors are copied to the device when it is merged. From
pinned memory the next part's copies run on a stream of their own while a part is merged: two parts are on the device.
Bits are the same everywhere. Knows nothing of recipes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.checkpoint import Checkpoint, Cut
from fitness.engines.memory import free_bytes

SHARE = 0.5
"""Of the free memory, how much sources may take where the choice is automatic; the rest is for generating."""

_Key = tuple[Path, str, str]
_PlacedKey = tuple[_Key, int | None, torch.device]


class Residency(StrEnum):
    """Where sources live."""

    AUTO = "auto"
    DEVICE = "device"
    PINNED = "pinned"
    DISK = "disk"


def choose(
    residency: Residency,
    device: torch.device,
    n_bytes: int,
    n_pinned: int,
    *,
    shards: bool = False,
    free: Callable[[torch.device], int] = free_bytes,
) -> Residency:
    """What `auto` means here, or a check that the choice can be had.

    Args:
        residency: what was asked for.
        device: where the resident model is.
        n_bytes: of what would be kept of all sources.
        n_pinned: of the same in pinned memory, where it takes more.
        shards: whether pieces of tensors are held, which are cut out of the files and so copies.
        free: bytes that are free on a device.

    Raises:
        ValueError: if pinned memory was asked for and there is no GPU to copy it to.
    """
    if residency is Residency.PINNED and device.type != "cuda":
        raise ValueError(
            f"memory.residency: 'pinned' is host memory that a GPU copies from, but the model is on {device.type!r}: "
            "expected 'device', 'disk' or 'auto'"
        )
    if residency is not Residency.AUTO:
        return residency
    if device.type != "cuda":  # mapped pages are memory already, as long as there is room
        return Residency.DEVICE if shards else Residency.DISK
    if n_bytes <= SHARE * free(device):
        return Residency.DEVICE
    fits = n_pinned <= SHARE * free(torch.device("cpu"))
    return Residency.PINNED if fits else Residency.DISK


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint's files, or what is wanted of it."""

    holder: Checkpoint
    name: str
    cut: Cut | None = None
    """Kept by itself: a process that holds a shard holds nothing else of the tensor."""
    row: int | None = None
    """One expert of a packed tensor that is kept whole."""
    check: bool = True
    """Whether to look for NaN and Inf when it is read; what is kept is looked through in any case."""

    @property
    def key(self) -> _Key:
        """Of what is kept."""
        return self.holder.path, self.name, str(self.cut)

    def of(self, kept: Tensor) -> Tensor:
        """What is wanted of it."""
        return kept if self.row is None else kept[self.row]


@dataclass(frozen=True)
class _Copies:
    """What a part's merge reads, on its way from pinned memory."""

    tensors: dict[_PlacedKey, Tensor] = field(default_factory=dict)
    arrived: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)
    """By GPU: when all of them are there."""


class Pieces:
    """Brings pieces to a device, and keeps them where its residency says.

    Args:
        residency: not AUTO.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._kept: dict[_Key, Tensor] = {}
        self._copies = _Copies(), _Copies()
        """What is merged now, and what is merged next."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stay_on(self, device: torch.device) -> bool:
        """Whether what is read and kept is read once only, and then is on the device."""
        return self._residency is Residency.DEVICE or (self._residency is Residency.DISK and device.type == "cpu")

    @property
    def prefetches(self) -> bool:
        """Whether there is anything to gain by saying beforehand what is wanted."""
        return self._residency is Residency.PINNED

    def read(self, piece: Piece, device: torch.device, *, keep: bool = True) -> Tensor:
        """A piece on a device. `keep` lets it stay for the next candidate."""
        if not keep:
            return piece.of(piece.holder.tensor(piece.name, piece.cut, check=piece.check)).to(device)
        for copies in self._copies:
            if (tensor := copies.tensors.get((piece.key, piece.row, device))) is not None:
                _receive(tensor, copies.arrived.get(device))
                return tensor
        return piece.of(self._keep(piece, device)).to(device, non_blocking=True)

    def prefetch(self, wanted: Sequence[tuple[Piece, torch.device]]) -> None:
        """Begin to copy from pinned memory what is wanted after the next reads.

        Waits until all that has been asked of a GPU so far is done: what has been merged makes room for these copies.
        Else Python, which asks sooner than a GPU merges, would have the copies of a whole model there.
        """
        following = _Copies()
        self._copies = self._copies[1], following
        for device in self._streams:
            torch.cuda.current_stream(device).synchronize()
        copies: dict[_PlacedKey, Tensor] = {}
        for piece, device in wanted:
            key = piece.key, piece.row, device
            if key not in copies:  # sources share what they are both adapters of
                host = piece.of(self._keep(piece, device))
                with self._copying_to(device):
                    copies[key] = host.to(device, non_blocking=True)
        following.arrived.update({device: stream.record_event() for device, stream in self._streams.items()})
        following.tensors.update(copies)  # not before: nobody may read a copy that no event speaks of

    def _copying_to(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if device.type != "cuda":
            return contextlib.nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._streams[device])

    def _keep(self, piece: Piece, device: torch.device) -> Tensor:
        """The whole piece, where it lives."""
        if (kept := self._kept.get(piece.key)) is not None:
            return kept
        read = piece.holder.tensor(piece.name, piece.cut)
        if self._residency is Residency.PINNED:
            read = read.pin_memory() if device.type == "cuda" else read.clone()
        elif self._residency is Residency.DEVICE:
            read = read.to(device, copy=True)
        elif device.type != "cpu" or piece.cut is not None:
            return read
        self._kept[piece.key] = read
        return read


def _receive(tensor: Tensor, arrived: torch.cuda.Event | None) -> None:
    """Let whoever merges wait for a copy, not for those after it, and the copy's memory for whoever merges."""
    if arrived is not None:
        merging = torch.cuda.current_stream(tensor.device)
        merging.wait_event(arrived)
        tensor.record_stream(merging)
