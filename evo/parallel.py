"""How several processes commonly share a model: the shards of a rank under tensor, pipeline and expert parallelism.

For plans and tests: an engine that shares a model brings the slots that it has made itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from evo.checkpoint import Checkpoint
from evo.copies import tied_heads
from evo.merge.blocks import Region, cut_shape, matrix_shape
from evo.shards import Shard
from search_spaces.layout import Part, Role

LAYOUTS = ("tensor", "pipeline", "expert")
_BY_ROWS = re.compile(r"\.(q|k|v|qkv|q_b|kv_b|gate|up|gate_up)_proj(\.weight)?$|(embed_tokens|lm_head)\.weight$")
_BY_COLUMNS = re.compile(r"\.(o|down)_proj(\.weight)?$")


def own_parts(checkpoint: Checkpoint) -> list[Part]:
    """The parts of a model that have a place of their own in memory: a tied head has not."""
    tied = tied_heads(checkpoint)
    return [part for part in checkpoint.layout.parts if part.tensor not in tied]


def part_shape(checkpoint: Checkpoint, part: Part) -> tuple[int, ...]:
    """Shape of a part."""
    shape = checkpoint.entries[part.tensor].shape
    return shape if part.row is None else shape[1:]


def region_of(layout: str, part: Part, shape: Sequence[int], rank: int, n_ranks: int, n_blocks: int) -> Region | None:
    """What a rank holds of a part's matrix, or None for nothing.

    Tensor-parallel ranks cut what projects up by rows and what projects down by columns, the last share taking the
    rest, and repeat all else; pipeline stages have runs of blocks; expert-parallel ranks deal out the routed experts
    in turn, and repeat all else.

    Args:
        layout: one of LAYOUTS.
        part: of the model.
        shape: of the part.
        rank: from 0.
        n_ranks: how many there are.
        n_blocks: of the model.
    """
    rows, columns = (slice(0, n) for n in matrix_shape(shape))
    if layout == "tensor":
        if _BY_ROWS.search(part.tensor):
            rows = _share(rows.stop, rank, n_ranks)
        elif _BY_COLUMNS.search(part.tensor):
            columns = _share(columns.stop, rank, n_ranks)
        return None if rows.start == rows.stop or columns.start == columns.stop else (rows, columns)
    if layout == "pipeline":
        last = 0 if part.role is Role.EMBEDDING else n_ranks - 1
        owner = last if part.block is None else part.block * n_ranks // n_blocks
    else:
        owner = rank if part.expert is None else part.expert % n_ranks
    return (rows, columns) if owner == rank else None


def _share(n: int, rank: int, n_ranks: int) -> slice:
    return slice(rank * (n // n_ranks), (rank + 1) * (n // n_ranks) if rank < n_ranks - 1 else n)


def slots_of(
    layout: str, checkpoint: Checkpoint, rank: int, n_ranks: int, new: Callable[[str, Sequence[int]], Tensor]
) -> dict[str, list[Shard]]:
    """Slots of a rank.

    Args:
        layout: one of LAYOUTS.
        checkpoint: of the model.
        rank: from 0.
        n_ranks: how many there are.
        new: makes a tensor for some of the tensor of that name, of a shape.
    """
    found: dict[str, list[Shard]] = {}
    for part in own_parts(checkpoint):
        shape = part_shape(checkpoint, part)
        if region := region_of(layout, part, shape, rank, n_ranks, checkpoint.layout.n_blocks):
            slot = new(part.tensor, cut_shape(shape, region))
            found.setdefault(part.tensor, []).append(Shard(slot, *region, expert=part.row))
    return found
