"""What a search keeps of its sources between candidates, in bytes, from headers alone.

The materializer's choice of a residency and a plan both rest on it. Knows what is kept; where, is evo.residency's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from evo.checkpoint import Checkpoint
from evo.deltas import Deltas
from evo.encodings import TensorHeader
from evo.merge.blocks import matrix_shape
from search_spaces.layout import Part


@dataclass(frozen=True)
class Holding:
    """Bytes of one source; tensors that several sources share are counted with the first."""

    stored: int
    """Of its tensors that merges read, as its files have them."""
    made: int
    """Of its tensors that are made when they are read: factors of an adapter."""
    pinned: int
    """Of both in pinned memory, where PyTorch takes a power of two for each tensor."""
    deltas: int | None
    """Of its compressed differences, if it has such: then its own tensors are not kept."""

    @property
    def kept(self) -> int:
        """What stays for the next candidate."""
        return self.stored + self.made if self.deltas is None else self.deltas

    @property
    def kept_pinned(self) -> int:
        """The same in pinned memory; differences are not pinned."""
        return self.pinned if self.deltas is None else self.deltas


def kept_bytes(found: Iterable[Holding]) -> tuple[int, int]:
    """What stays of all sources for the next candidate: as it is, and in pinned memory."""
    pairs = [(holding.kept, holding.kept_pinned) for holding in found]
    return sum(kept for kept, _ in pairs), sum(pinned for _, pinned in pairs)


def holdings(
    checkpoints: Mapping[str, Checkpoint],
    parts: Collection[Part],
    deltas: Deltas | None = None,
    base: str | None = None,
    exact: Collection[str] = (),
) -> dict[str, Holding]:
    """What is kept of each source.

    Args:
        checkpoints: source name -> checkpoint; all of one layout.
        parts: that are merged.
        deltas: how differences are compressed; None if they are not.
        base: the source that they are taken to.
        exact: tensors that are never compressed.
    """
    seen: set[tuple[object, str]] = set()
    tensors, found = {part.tensor: part for part in parts}, {}
    for source, checkpoint in checkpoints.items():
        pieces = dict.fromkeys(held for name in tensors for held in checkpoint.holders(name))
        new = [(holder, piece) for holder, piece in pieces if (holder.path, piece) not in seen]
        seen |= {(holder.path, piece) for holder, piece in new}
        stored = [holder.header(piece).n_bytes for holder, piece in new if piece in holder.headers]
        made = [holder.header(piece).n_bytes for holder, piece in new if piece not in holder.headers]
        pinned = sum(1 << (n - 1).bit_length() for n in (*stored, *made) if n)
        compressed = None
        if deltas is not None and source != base:
            matrices = (matrix_of(checkpoint, part) for part in parts if part.tensor not in exact)
            compressed = deltas.n_bytes(matrices)
        found[source] = Holding(sum(stored), sum(made), pinned, compressed)
    return found


def most_at_once(checkpoints: Mapping[str, Checkpoint], parts: Collection[Part], n: int) -> int:
    """Bytes of what is read of all sources for a part (n = 1), or for it and the one after it (n = 2), at most."""
    read = [sum(h.n_bytes for c in checkpoints.values() for h in part_headers(c, part)) for part in parts]
    return max(read if n == 1 or len(read) < 2 else (a + b for a, b in pairwise(read)), default=0)


def part_headers(checkpoint: Checkpoint, part: Part) -> Iterator[TensorHeader]:
    """Of the pieces that a part is stored as."""
    for holder, piece in checkpoint.holders(part.tensor):
        header = holder.header(piece)
        yield TensorHeader(header.dtype, part.shape_in(header.shape))


def matrix_of(checkpoint: Checkpoint, part: Part) -> tuple[int, int]:
    """Shape of a part's matrix."""
    return matrix_shape(part.shape_in(checkpoint.entries[part.tensor].shape))
