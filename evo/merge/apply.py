"""One part merged: block by block on tensors, or by a compiled loop in one pass. Both give the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.merge import Method
from evo.merge.blocks import Block, Operand, blocks
from evo.merge.kernels import Fused, fuse, log
from evo.merge.noise import Key, uniforms

FUSE_FROM_ELEMENTS = 1 << 16
"""Smaller parts are not worth compiling a loop for."""
_CHECKED_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class PartMerge:
    """A merge of one part.

    Letters: the part is a matrix (R, C), see blocks.py.
    """

    method: Method
    base: Operand
    """Shape (R, C)."""
    donors: Sequence[Operand]
    """D matrices (R, C)."""
    coefficients: Sequence[float]
    """D numbers."""
    arguments: Mapping[str, Any]
    """Of the method's merge: knobs, and `stats` of the whole part where it measures."""
    keys: Sequence[Key]
    """D streams of noise, for a random method."""

    def block(self, block: Block) -> Tensor:
        """A block of the merge on tensors, shape (r, c), float32."""
        arguments = dict(self.arguments)
        if "stats" in arguments:
            stats = arguments["stats"]
            arguments["stats"] = [s.at(block[0]) for s in stats] if isinstance(stats, list) else stats.at(block[0])
        if self.method.random:
            arguments["noise"] = [_noise(key, self.base, block) for key in self.keys]
        floats = [donor[block].float() for donor in self.donors]
        return self.method.merge(floats, self.base[block].float(), self.coefficients, **arguments)

    def compiled(self) -> Fused | None:
        """The compiled loop that does the same, if there is one and it has the same bits."""
        tensors = [operand for operand in (self.base, *self.donors) if isinstance(operand, Tensor)]
        if len(tensors) <= len(self.donors):
            return None
        large = self.base.numel() >= FUSE_FROM_ELEMENTS
        fused = fuse(self.method, tensors, self.coefficients, self.arguments, self.keys, may_compile=large)
        if fused is not None and fused.loop.is_right is None:
            fused.loop.is_right = self._has_same_bits(fused)
        return fused if fused is not None and fused.loop.is_right else None

    def _has_same_bits(self, fused: Fused) -> bool:
        """Compare the first block. A compiler that does not keep to the rules must not change a merge."""
        expected = self.block(next(blocks(self.base, _CHECKED_ELEMENTS))).to(fused.dtype).contiguous()
        found = torch.empty_like(expected)
        fused.run(found)
        integers = torch.int32 if found.element_size() == 4 else torch.int16
        same = (found.view(integers) == expected.view(integers)) | (found.isnan() & expected.isnan())
        if not same.all():
            log.warning("the compiled loop of a merge has other bits than the merge on tensors, and is not used")
        return bool(same.all())


def _noise(key: Key, matrix: Operand, block: Block) -> Tensor:
    """Uniform numbers for a block, numbered by the elements of the matrix."""
    rows, columns = block
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
    start = rows.start * matrix.shape[1] + columns.start
    return uniforms(key, start, n_rows * n_columns, matrix.device).view(n_rows, n_columns)
