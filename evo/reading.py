"""Reads parts of the sources, or regions of them, as they are stored.

Knows what a part is stored as in each source; where that lives between candidates is evo.residency's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from evo.checkpoint import Checkpoint, Cut
from evo.encodings import Stored
from evo.merge.blocks import Operand, Region, matrix_shape
from evo.residency import Piece, Pieces
from evo.vocabulary import CommonRows
from search_spaces.layout import Part

Wanted = tuple[str, Part, torch.device, Region | None]
"""A source, a part, where it is merged, and what of it."""


class Reader:
    """Reads from checkpoints that stay open.

    Args:
        checkpoints: source name -> checkpoint; all of one layout.
        pieces: brings them to a device, and keeps them.
        common: tensors of which the sources have some rows in common.
        kept: sources whose tensors stay for the next candidate.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        pieces: Pieces,
        common: Mapping[str, CommonRows],
        kept: Collection[str],
    ) -> None:
        self._checkpoints, self._pieces, self._common, self._kept = checkpoints, pieces, common, kept
        self._there: dict[tuple[str, Part, torch.device], Stored] = {}
        """Whole parts that stay where they are merged, for which nothing is left to do."""

    def read(
        self,
        source: str,
        part: Part,
        device: torch.device,
        keep: bool,
        region: Region | None = None,
        *,
        check: bool = True,
    ) -> Stored:
        """A part of a source, or no more than a region of it.

        Args:
            source: its name.
            part: which.
            device: where it is wanted.
            keep: let it stay for the next candidate.
            region: what of it; None for all.
            check: whether to look for NaN and Inf, if it does not stay.

        Raises:
            CheckpointError: if it cannot be read, or holds one.
        """
        keep = keep and source in self._kept
        stays = keep and region is None and self._pieces.stay_on(device)
        if stays and (stored := self._there.get((source, part, device))):
            return stored
        pieces = (self._pieces.read(piece, device, keep=keep) for piece in self._wanted(source, part, region, check))
        stored = Stored(self._checkpoints[source].entries[part.tensor].encoding, tuple(pieces))
        if stays:
            self._there[source, part, device] = stored
        return stored

    def whole(self, part: Part, device: torch.device) -> Callable[[str], Operand]:
        """Reads sources of a part as a whole, to be measured; nothing is kept beyond that."""

        @functools.cache
        def read(source: str) -> Operand:
            stored, rows = self.read(source, part, device, keep=False), self._common.get(part.tensor)
            return (rows.cut(stored) if rows else stored).operand

        return read

    def prefetch(self, following: Iterable[Wanted]) -> None:
        """Begin to bring what will be merged next to where it is merged, where that takes a copy."""
        if not self._pieces.prefetches:
            return
        wanted = [
            (piece, device)
            for source, part, device, region in following
            if source in self._kept
            for piece in self._wanted(source, part, region)
        ]
        self._pieces.prefetch(wanted)

    def _wanted(self, source: str, part: Part, region: Region | None, check: bool = True) -> list[Piece]:
        """What a part of a source, or a region of it, is stored as."""
        checkpoint = self._checkpoints[source]
        entry, holders = checkpoint.entries[part.tensor], checkpoint.holders(part.tensor)
        if region is None:
            return [Piece(*held, row=part.row, check=check) for held in holders]
        expert: Cut = () if part.row is None else (part.row,)
        shape, (rows, columns) = entry.shape[len(expert) :], region
        n_rows, _ = matrix_shape(shape)  # fewer where only others have a token
        cuts = entry.encoding.cut(shape, (slice(min(rows.start, n_rows), min(rows.stop, n_rows)), columns))
        return [Piece(*held, cut=expert + cut) for held, cut in zip(holders, cuts, strict=True)]
