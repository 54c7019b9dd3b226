"""How several processes commonly share a model: what a rank holds under tensor, pipeline and expert parallelism.

For plans and tests: an engine that shares a model brings the slots that it has made itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evo.checkpoint import Checkpoint
from evo.copies import tied_heads
from evo.merge.blocks import Region, matrix_shape
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
    return part.shape_in(checkpoint.entries[part.tensor].shape)


@dataclass(frozen=True)
class Place:
    """Which ranks hold a part, and how much of it."""

    owner: int | None = None
    """None: all of them."""
    cut: int | None = None
    """The dimension of its matrix that they share; None: each holds all."""

    def region(self, shape: Sequence[int], rank: int, n_ranks: int) -> Region | None:
        """What a rank holds of a part of this shape, or None for nothing. The last share may be larger."""
        if self.owner not in (None, rank):
            return None
        sizes = matrix_shape(shape)
        ends = [_share(n, rank, n_ranks) if self.cut == d else slice(0, n) for d, n in enumerate(sizes)]
        return (ends[0], ends[1]) if all(end.start < end.stop for end in ends) else None


def place(layout: str, part: Part, n_ranks: int, n_blocks: int) -> Place:
    """Where a part goes.

    Tensor-parallel ranks cut what projects up by rows and what projects down by columns, and repeat all else; pipeline
    stages have runs of blocks; expert-parallel ranks deal out the routed experts in turn, and repeat all else.

    Args:
        layout: one of LAYOUTS.
        part: of the model.
        n_ranks: how many there are.
        n_blocks: of the model.
    """
    if layout == "tensor":
        return Place(cut=0 if _BY_ROWS.search(part.tensor) else 1 if _BY_COLUMNS.search(part.tensor) else None)
    if layout == "expert":
        return Place(None if part.expert is None else part.expert % n_ranks)
    outside = 0 if part.role is Role.EMBEDDING else n_ranks - 1
    return Place(outside if part.block is None else part.block * n_ranks // n_blocks)


def _share(n: int, rank: int, n_ranks: int) -> slice:
    return slice(rank * (n // n_ranks), (rank + 1) * (n // n_ranks) if rank < n_ranks - 1 else n)
