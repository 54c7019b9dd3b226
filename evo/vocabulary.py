"""Vocabularies that differ by added or padded rows: which rows of embedding and head all sources have in common.

Statistics of a merge are taken over the rows that all sources have; those of them that only some have a token for
are overwritten afterwards, and the rest appended, from the interface parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evo.checkpoint import Checkpoint, CheckpointError, read_vocabulary
from evo.encodings import Stored
from evo.encodings.plain import Plain
from search_spaces.layout import is_by_token


@dataclass(frozen=True)
class CommonRows:
    """The rows of a tensor that can be merged."""

    n_rows: int
    """Rows that all sources have."""
    foreign: tuple[int, ...]
    """Of these, rows whose token some source does not know."""

    def within(self, rows: slice) -> CommonRows:
        """The same of a region of the tensor."""
        n_rows = max(0, min(self.n_rows, rows.stop) - rows.start)
        return CommonRows(n_rows, tuple(i - rows.start for i in self.foreign if 0 <= i - rows.start < n_rows))

    def cut(self, stored: Stored) -> Stored:
        """The rows that all sources have."""
        return Stored(stored.encoding, (stored.pieces[0][: self.n_rows],))

    def complete(self, merged: Stored, interface: Stored) -> Stored:
        """All rows of the interface parent, with the common ones merged."""
        (ours,), (theirs,) = merged.pieces, interface.pieces
        tensor = torch.cat([ours, theirs[self.n_rows :]])
        foreign = list(self.foreign)
        tensor[foreign] = theirs[foreign]
        return Stored(merged.encoding, (tensor,))


def common_rows(checkpoints: Mapping[str, Checkpoint]) -> dict[str, CommonRows]:
    """Tensor -> its common rows, for those that differ between the sources in some.

    Raises:
        CheckpointError: if such a tensor is not stored as plain numbers.
    """
    foreign = _foreign_ids(checkpoints)
    first, found = next(iter(checkpoints.values())), {}
    for name in filter(is_by_token, first.scored):
        entries = [checkpoint.scored[name] for checkpoint in checkpoints.values()]
        heights = [entry.shape[0] for entry in entries]
        rows = CommonRows(min(heights), tuple(i for i in foreign if i < min(heights)))
        if rows.foreign or max(heights) > rows.n_rows:
            if not all(isinstance(entry.encoding, Plain) for entry in entries):
                raise CheckpointError(f"{name}: rows can only be told apart in float32, float16 and bfloat16")
            found[name] = rows
    return found


def n_padded(checkpoint: Checkpoint) -> int:
    """Rows of the embedding behind those that the tokenizer has tokens for; 0 where there is no fast tokenizer."""
    vocabulary = read_vocabulary(checkpoint.path)
    if not vocabulary:
        return 0
    heights = [entry.shape[0] for name, entry in checkpoint.scored.items() if is_by_token(name)]
    return max([0, *(height - max(vocabulary.values()) - 1 for height in heights)])


def _foreign_ids(checkpoints: Mapping[str, Checkpoint]) -> list[int]:
    """Ids of tokens that some source does not know."""
    vocabularies = [v for c in checkpoints.values() if c.has_interface and (v := read_vocabulary(c.path)) is not None]
    everywhere = set.intersection(*(set(v) for v in vocabularies)) if vocabularies else set()
    return sorted({i for v in vocabularies for token, i in v.items() if token not in everywhere})
