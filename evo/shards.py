"""Shards: the pieces of a model that one process of several holds, however they split it between them.

Tensor parallelism cuts matrices by rows or columns, pipeline parallelism deals out blocks of layers, expert
parallelism experts; here they are all the same, a mapping from names to what is held. Knows no process groups: what a
rank merges needs nothing from the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from evo.checkpoint import CheckpointError
from evo.encodings import EncodingError, Entry
from evo.merge.blocks import Region, cut_shape, matrix_shape
from search_spaces.layout import Part


@dataclass(frozen=True)
class Shard:
    """A slot for some rows and columns of a part's matrix (R, C), see merge/blocks.py; a vector is one row."""

    slot: Tensor
    """The resident tensor, of any float dtype, on any device; shape (rows, columns) or one that can be viewed so."""
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    expert: int | None = None
    """Which expert of a packed tensor; None where the tensor is not packed."""


Slots = Mapping[str, Tensor | Sequence[Shard]]
"""Tensor name -> the resident tensor, or shards of it."""


@dataclass(frozen=True)
class Target:
    """Where a part, or a region of it, is written."""

    slot: Tensor
    region: Region | None = None
    """What the slot holds of the part's matrix; None for all."""


def targets_of(part: Part, entries: Sequence[Entry], slots: Slots) -> list[Target]:
    """Where a part goes; nowhere, if this process does not hold it.

    Args:
        part: what is written.
        entries: how each source stores it.
        slots: what this process holds.

    Raises:
        CheckpointError: if a shard does not fit its part, its slot, or how the tensor is stored.
    """
    found = slots.get(part.tensor, ())
    if isinstance(found, Tensor):
        return [Target(found if part.row is None else found[part.row])]
    return [_target(part, entries, shard) for shard in found if shard.expert == part.row]


def _target(part: Part, entries: Sequence[Entry], shard: Shard) -> Target:
    """Raises CheckpointError as `targets_of` does."""
    name, full = part.tensor, max((entry.shape for entry in entries), key=math.prod)
    shape = part.shape_in(full)
    n_rows, n_columns = matrix_shape(shape)
    rows, columns = (slice(*s.indices(n)) for s, n in ((shard.rows, n_rows), (shard.columns, n_columns)))
    asked = [end or 0 for s in (shard.rows, shard.columns) for end in (s.start, s.stop)]
    inside = min(asked) >= 0 and asked[1] <= n_rows and asked[3] <= n_columns
    if not inside or rows.step != 1 or columns.step != 1 or rows.start >= rows.stop or columns.start >= columns.stop:
        raise CheckpointError(
            f"{name}: expected a shard inside a matrix of {n_rows} x {n_columns}, got {shard.rows} and {shard.columns}"
        )
    try:
        for encoding in (e for entry in entries for e in (entry.encoding, entry.encoding.output)):
            encoding.cut(shape, (rows, columns))
        return Target(shard.slot.view(cut_shape(shape, (rows, columns))), (rows, columns))
    except EncodingError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except RuntimeError:
        raise CheckpointError(
            f"{name}: expected a slot that views as {rows.stop - rows.start} x {columns.stop - columns.start}, "
            f"got shape {list(shard.slot.shape)} with strides {list(shard.slot.stride())}"
        ) from None
