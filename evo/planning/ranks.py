"""Bytes and seconds of each of several processes that hold one model together, by the way in which they share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from evo.checkpoint import Checkpoint, CheckpointError
from evo.encodings import TensorHeader
from evo.holdings import part_headers
from evo.merge.blocks import Region, cut_shape
from evo.parallel import LAYOUTS, own_parts, part_shape, place
from evo.planning.times import size, span
from evo.shards import Shard, targets_of
from search_spaces.layout import Part


@dataclass(frozen=True)
class Share:
    """What a rank holds, in bytes."""

    model: int
    """Of the resident model."""
    sources: int
    """Of the checkpoints, as they are stored."""

    def __add__(self, other: Share) -> Share:
        return Share(self.model + other.model, self.sources + other.sources)

    def __mul__(self, n: int) -> Share:
        return Share(self.model * n, self.sources * n)

    def seconds(self, bandwidth: float) -> float:
        """To merge a candidate: every source is read and the model written, at bytes a second."""
        return (self.model + self.sources) / bandwidth


def shares(layout: str, sources: Sequence[Checkpoint], dtype: torch.dtype, n_ranks: int) -> list[Share]:
    """What each rank holds. Of parts that are alike and go to the same place, such as experts, one is looked at.

    Raises:
        CheckpointError: if a shard cannot be cut out of what is stored.
    """
    first, totals = sources[0], [Share(0, 0)] * n_ranks
    alike: dict[tuple[object, ...], list[Part]] = {}
    for part in own_parts(first):
        headers = tuple(header for source in sources for header in part_headers(source, part))
        where = place(layout, part, n_ranks, first.layout.n_blocks)
        alike.setdefault((where, part_shape(first, part), headers), []).append(part)
    for part, *more in alike.values():
        where, shape = place(layout, part, n_ranks, first.layout.n_blocks), part_shape(first, part)
        for rank in range(n_ranks):
            if region := where.region(shape, rank, n_ranks):
                totals[rank] += _share(part, sources, region, dtype) * (1 + len(more))
    return totals


def _share(part: Part, sources: Sequence[Checkpoint], region: Region, dtype: torch.dtype) -> Share:
    """Of a region of a part: what evo.shards would write there, and what would be read for it."""
    shape, entries = part_shape(sources[0], part), [source.entries[part.tensor] for source in sources]
    slot = torch.empty(cut_shape(shape, region), dtype=dtype, device="meta")
    (target,) = targets_of(part, entries, {part.tensor: [Shard(slot, *region, expert=part.row)]})
    read, seen = 0, set()
    for source, entry in zip(sources, entries, strict=True):
        held, cuts = source.holders(part.tensor), entry.encoding.cut(shape, region)
        for (holder, piece), header, cut in zip(held, part_headers(source, part), cuts, strict=True):
            if (holder.path, piece) in seen:  # the base that an adapter was trained on
                continue
            seen.add((holder.path, piece))
            taken = [len(range(n)[s]) for n, s in zip(header.shape, cut, strict=False)]
            read += TensorHeader(header.dtype, (*taken, *header.shape[len(taken) :])).n_bytes
    return Share(target.slot.nbytes, read)


def rank_table(sources: Sequence[Checkpoint], dtype: torch.dtype, n_ranks: int, bandwidth: float) -> Iterator[str]:
    """Lines of a table of all layouts; ranks that hold as much as the one before them share its line.

    Args:
        sources: what is merged, all of one layout.
        dtype: of the resident model.
        n_ranks: how many there are.
        bandwidth: bytes a second that a rank reads and writes.
    """
    yield f"{f'one of {n_ranks} ranks':<28}{'model':>12}{'sources':>12}{'a merge':>12}"
    for layout in LAYOUTS:
        try:
            found = shares(layout, sources, dtype, n_ranks)
        except CheckpointError as error:
            yield f"  {layout}-parallel: cannot be, {error}"
            continue
        for share, ranks in groupby(range(n_ranks), found.__getitem__):
            who = sorted({min(held := list(ranks)), max(held)})
            name = f"{layout}-parallel {'-'.join(map(str, who))}"
            time = span(share.seconds(bandwidth))
            yield f"  {name:<26}{size(share.model):>12}{size(share.sources):>12}{time:>12}"
